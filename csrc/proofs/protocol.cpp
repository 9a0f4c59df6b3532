// The barrier protocol of a kernel, explored: every order in which its roles, its TMA loads and its TMA stores can take their
// steps. The roles are what the kernel itself did in one block of the emulator (machine_state.h, Step), so that the model
// cannot differ from the source; control flow depends on the problem alone, and so the steps are the same in every order.
//
//   protocol < trace
//
// Reported: a state from which nothing can go on; a read of bytes that are on their way, or are not those that the same read
// found in the emulator (too early, or too late); bytes that are overwritten while a wgmma or a TMA store reads them; an
// mbarrier with more arrivals or bytes than it counts. Then waits, arrivals and barriers are left out, one kind at a time, and
// each such protocol has to fail.
//
// A warpgroup is one role: its four warps take the same steps, as the emulator's clocks hold them to. Steps that others
// cannot tell apart (Lipton's reduction) are taken together: a role goes on until it is about to wait, or has arrived.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

struct Line {
  int warp;
  std::string what;
  uint64_t a, b, c;
};

struct Step {
  std::string what;
  int at = 0;  // mbarrier or named barrier
  int parity = 0, count = 0;  // of a wait; threads or arrivals
  int64_t bytes = 0;
  uint64_t from = 0, to = 0;  // shared memory
  std::vector<int> cells;  // of it
  std::vector<int> content;  // of each, as the emulator found it
  int number = 0;  // of a load or store among all
  int kept = 0;  // groups of products or stores that a wait leaves in flight
};

using Role = std::vector<Step>;

struct Protocol {
  std::vector<Role> roles;
  std::vector<std::string> names;
  std::vector<int> arrivals;  // that an mbarrier counts
  int cells = 0, loads = 0, stores = 0;
};

// ---- from the trace to roles -------------------------------------------------------------------------------------------
class Reader {
 public:
  explicit Reader(std::vector<Line> const& all) {
    for (Line const& line : all) {
      if (line.what == "init") mbarrier(line.a, static_cast<int>(line.b));
    }
    std::map<int, int> begun;  // steps before the block's first barrier only set it up
    for (Line const& line : all) {
      if (!begun[line.warp]) begun[line.warp] = line.what == "meet" && line.a == 0;
      else take(line);
    }
    for (auto const& [warp, role] : of_warp) {
      if (warp >= 4 && warp % 4) continue;
      made.roles.push_back(role);
      made.names.push_back(warp < 4 ? "warp " + std::to_string(warp) : "consumer " + std::to_string(warp / 4 - 1));
    }
    count_arrivals();
    divide();
  }
  Protocol made;

 private:
  std::map<int, Role> of_warp;
  std::map<uint64_t, int> mbarriers;

  int mbarrier(uint64_t address, int arrivals = 0) {
    auto const [found, is_new] = mbarriers.try_emplace(address, static_cast<int>(mbarriers.size()));
    if (is_new) made.arrivals.push_back(arrivals);
    return found->second;
  }

  void take(Line const& line) {
    Role& role = of_warp[line.warp];
    Step step;
    step.what = line.what;
    if (line.what == "arrive" || line.what == "wait") {
      step.at = mbarrier(line.a), step.count = 1;
      (line.what == "wait" ? step.parity : step.count) = line.what == "wait" ? static_cast<int>(line.b) : 1;
      if (line.what == "arrive") step.bytes = static_cast<int64_t>(line.b);
    } else if (line.what == "meet" || line.what == "pass") {
      step.at = static_cast<int>(line.a), step.count = static_cast<int>(line.b);
    } else if (line.what == "retire" || line.what == "store_wait") {
      step.kept = static_cast<int>(line.a);
    } else {
      step.from = line.a, step.to = line.b;
      if (line.what == "load") step.at = mbarrier(line.c), step.bytes = static_cast<int64_t>(line.b - line.a);
      // The boxes of one tile, or one by each lane; or a product that goes on with its operands.
      auto const last = std::find_if(role.rbegin(), role.rend(), [&](Step const& x) {
        return step.what != "load" || (x.at == step.at && (x.what == "load" || x.what == "arrive"));
      });
      bool const goes_on = last != role.rend() && last->what == step.what;
      if (goes_on && step.what == "load") {
        last->from = std::min(last->from, step.from), last->to = std::max(last->to, step.to), last->bytes += step.bytes;
        return;
      }
      if (goes_on && last->from == step.from && last->to == step.to) return;
    }
    role.push_back(step);
  }

  // Where each of the four warps arrives, their role does four times.
  void count_arrivals() {
    std::map<std::pair<int, int>, int> of_group, of_role;
    for (auto const& [warp, role] : of_warp) {
      for (Step const& step : role) {
        if (step.what != "arrive") continue;
        ++of_group[{warp / 4, step.at}];
        of_role[{warp / 4, step.at}] += warp % 4 == 0;
      }
    }
    size_t n = 0;
    for (auto const& [warp, unused] : of_warp) {
      if (warp >= 4 && warp % 4) continue;
      for (Step& step : made.roles[n]) {
        if (step.what == "arrive" && warp >= 4)
          step.count = of_group[{warp / 4, step.at}] / of_role[{warp / 4, step.at}];
        if (step.what == "meet" || step.what == "pass") step.parity = warp < 4 ? 32 : 128;  // threads that come
      }
      ++n;
    }
  }

  // Shared memory in cells, so that every step touches whole ones.
  void divide() {
    std::set<uint64_t> ends;
    for (Role const& role : made.roles) {
      for (Step const& step : role) {
        if (step.to > step.from) ends.insert({step.from, step.to});
      }
    }
    std::vector<uint64_t> const cuts(ends.begin(), ends.end());
    made.cells = static_cast<int>(cuts.size());
    for (Role& role : made.roles) {
      for (Step& step : role) {
        if (step.to <= step.from) continue;
        auto cell = std::lower_bound(cuts.begin(), cuts.end(), step.from) - cuts.begin();
        for (; cuts[static_cast<size_t>(cell)] < step.to; ++cell) step.cells.push_back(static_cast<int>(cell));
        if (step.what == "load") step.number = made.loads++;
        if (step.what == "store") step.number = made.stores++;
      }
    }
  }
};

// ---- exploring ---------------------------------------------------------------------------------------------------------
struct State {
  std::vector<int16_t> next, came;  // of each role; the barrier's round in which it came to where it is, or -1
  std::vector<int16_t> phase, pending;  // of mbarriers
  std::vector<int32_t> bytes;
  std::vector<int16_t> round, there;  // of named barriers
  std::vector<int16_t> content;  // of each cell: 1 + the load that filled it, plus stores since, times 256
  std::vector<int16_t> loads, stores;  // in flight: which role's which step

  std::string key() const {
    std::string all;
    auto const add = [&](auto const& x) {
      all.append(reinterpret_cast<char const*>(x.data()), x.size() * sizeof(x[0]));
      all += '|';
    };
    add(next), add(came), add(phase), add(pending), add(bytes), add(round), add(there), add(content), add(loads),
        add(stores);
    return all;
  }
};

class Explorer {
 public:
  explicit Explorer(Protocol const& of) : p(of) { find_reads(); }

  // What can go wrong, or nothing. The run that comes first takes the content of what is read as right if `learns`.
  std::string explore(bool learns) {
    State start;
    start.next.assign(p.roles.size(), 0), start.came.assign(p.roles.size(), -1);
    start.phase.assign(p.arrivals.size(), 0), start.bytes.assign(p.arrivals.size(), 0);
    start.pending.assign(p.arrivals.begin(), p.arrivals.end());
    start.round.assign(16, 0), start.there.assign(16, 0);
    start.content.assign(static_cast<size_t>(p.cells), 0);
    std::vector<State> todo{start};
    std::unordered_set<std::string> seen{start.key()};
    while (!todo.empty() && wrong.empty()) {
      State const state = todo.back();
      todo.pop_back();
      std::vector<State> const after = successors(state);
      if (after.empty() && !is_done(state)) wrong = deadlock(state);
      for (State const& next : after) {
        if (seen.insert(next.key()).second) todo.push_back(next);
        if (learns && todo.size() > 1) todo.erase(todo.begin());  // one order is enough to learn from
      }
      states = seen.size();
    }
    return wrong;
  }
  Protocol p;
  size_t states = 0;
  bool is_learning = false;

 private:
  std::string wrong;
  std::vector<std::vector<std::set<int>>> reading;  // cells that a role's products read, before each of its steps
  std::vector<std::vector<int>> committed;  // stores of a role, in groups, as its steps have committed them

  void find_reads() {
    for (Role const& role : p.roles) {
      std::vector<std::set<int>> groups(1), before;
      for (Step const& step : role) {
        std::set<int> all;
        for (auto const& group : groups) all.insert(group.begin(), group.end());
        before.push_back(all);
        if (step.what == "read") groups.back().insert(step.cells.begin(), step.cells.end());
        if (step.what == "commit") groups.emplace_back();
        if (step.what == "retire") {
          while (static_cast<int>(groups.size()) - 1 > step.kept) groups.erase(groups.begin());
        }
      }
      before.emplace_back();
      reading.push_back(before);
    }
  }

  bool is_done(State const& s) const {
    for (size_t r = 0; r < p.roles.size(); ++r) {
      if (static_cast<size_t>(s.next[r]) < p.roles[r].size()) return false;
    }
    return s.loads.empty() && s.stores.empty();
  }

  static bool ends_together(std::string const& what) { return what == "arrive" || what == "pass" || what == "load"; }
  static bool begins_alone(std::string const& what) {
    return what == "wait" || what == "meet" || what == "retire" || what == "store_wait";
  }

  std::vector<State> successors(State const& s) {
    std::vector<State> after;
    for (size_t r = 0; r < p.roles.size(); ++r) {
      State next = s;
      bool moved = false;
      while (wrong.empty() && static_cast<size_t>(next.next[r]) < p.roles[r].size()) {
        Step& step = p.roles[r][static_cast<size_t>(next.next[r])];
        if (moved && begins_alone(step.what)) break;
        if (!take(next, r, step)) break;
        moved = true;
        if (next.came[r] >= 0) break;  // it waits at a named barrier now
        if (static_cast<size_t>(++next.next[r]) == p.roles[r].size()) end(next, r);
        if (ends_together(step.what)) break;
      }
      if (moved) after.push_back(std::move(next));
    }
    for (size_t i = 0; i < s.loads.size(); ++i) after.push_back(arrived(s, i));
    for (size_t i = 0; i < s.stores.size(); ++i) after.push_back(stored(s, i));
    return after;
  }

  // A role has taken its last step.
  void end(State const& s, size_t r) {
    for (Step const& step : p.roles[r]) {
      if (step.what == "store" && holds(s.stores, step.number))
        fail(r, step, "ends before what it stores has been read");
    }
  }

  // One step of a role; false if it cannot be taken yet.
  bool take(State& s, size_t r, Step& step) {
    size_t const at = static_cast<size_t>(step.at);
    if (step.what == "wait") return s.phase[at] != step.parity;
    if (step.what == "arrive") {
      if (s.pending[at] < step.count) fail(r, step, "more arrivals than an mbarrier counts");
      s.pending[at] = static_cast<int16_t>(s.pending[at] - step.count);
      s.bytes[at] += static_cast<int32_t>(step.bytes);
      finish(s, at);
    } else if (step.what == "meet" || step.what == "pass") {
      return meet(s, r, step);
    } else if (step.what == "load") {
      overwrite(s, r, step);
      s.loads.push_back(static_cast<int16_t>(step.number));
    } else if (step.what == "store") {
      s.stores.push_back(static_cast<int16_t>(step.number));
    } else if (step.what == "store_wait") {
      for (Step const& other : p.roles[r]) {
        if (other.what == "store" && is_waited_for(r, other, step) && holds(s.stores, other.number)) return false;
      }
    } else if (step.what == "write") {
      overwrite(s, r, step);
      for (int const cell : step.cells)
        s.content[static_cast<size_t>(cell)] = static_cast<int16_t>(s.content[static_cast<size_t>(cell)] + 256);
    } else if (step.what == "read" || step.what == "get") {
      check(s, r, step);
    }
    return true;
  }

  // Stores that come before a wait, but for the groups committed last.
  bool is_waited_for(size_t r, Step const& store, Step const& wait) const {
    Role const& role = p.roles[r];
    auto const from = &store - role.data(), to = &wait - role.data();
    if (from > to) return false;
    auto const groups =
        std::count_if(role.begin() + from, role.begin() + to, [](Step const& x) { return x.what == "store_commit"; });
    return groups > wait.kept;
  }

  static bool holds(std::vector<int16_t> const& all, int number) {
    return std::find(all.begin(), all.end(), number) != all.end();
  }

  bool meet(State& s, size_t r, Step const& step) {
    size_t const at = static_cast<size_t>(step.at);
    if (s.came[r] >= 0) {  // it came before, and goes on once the round is over
      if (s.round[at] == s.came[r]) return false;
      s.came[r] = -1;
      return true;
    }
    int16_t const round = s.round[at];
    s.there[at] = static_cast<int16_t>(s.there[at] + step.parity);
    if (s.there[at] > step.count) fail(r, step, "more threads than a named barrier counts");
    if (s.there[at] == step.count) s.there[at] = 0, s.round[at] ^= 1;
    else if (step.what == "meet") s.came[r] = round;
    return true;
  }

  void finish(State& s, size_t at) {
    if (s.pending[at] == 0 && s.bytes[at] < 0) wrong = "more bytes than mbarrier " + std::to_string(at) + " expects";
    if (s.pending[at] || s.bytes[at]) return;
    s.phase[at] ^= 1;
    s.pending[at] = static_cast<int16_t>(p.arrivals[at]);
  }

  Step const& step_of(std::string const& what, int number) const {
    for (Role const& role : p.roles) {
      for (Step const& step : role) {
        if (step.what == what && step.number == number) return step;
      }
    }
    return p.roles[0][0];
  }

  State arrived(State s, size_t i) {
    Step const& load = step_of("load", s.loads[i]);
    s.loads.erase(s.loads.begin() + static_cast<long>(i));
    for (int const cell : load.cells)
      s.content[static_cast<size_t>(cell)] = static_cast<int16_t>(1 + load.number % 200);
    s.bytes[static_cast<size_t>(load.at)] -= static_cast<int32_t>(load.bytes);
    finish(s, static_cast<size_t>(load.at));
    return s;
  }

  State stored(State s, size_t i) {
    for (size_t r = 0; r < p.roles.size(); ++r) {
      for (Step& step : p.roles[r]) {
        if (step.what == "store" && step.number == s.stores[i]) check(s, r, step);
      }
    }
    s.stores.erase(s.stores.begin() + static_cast<long>(i));
    return s;
  }

  // Bytes that are about to be written: nobody may be reading them, nor anything else be on its way to them.
  void overwrite(State const& s, size_t r, Step const& step) {
    auto const touches = [&](std::vector<int> const& cells) {
      return std::any_of(cells.begin(), cells.end(), [&](int cell) {
        return std::find(step.cells.begin(), step.cells.end(), cell) != step.cells.end();
      });
    };
    for (int16_t const load : s.loads) {
      if (touches(step_of("load", load).cells)) fail(r, step, "writes where a load is on its way");
    }
    for (int16_t const store : s.stores) {
      if (touches(step_of("store", store).cells)) fail(r, step, "writes what a TMA store reads");
    }
    for (size_t other = 0; other < p.roles.size(); ++other) {
      auto const& cells = reading[other][static_cast<size_t>(s.next[other])];
      if (touches(std::vector<int>(cells.begin(), cells.end())))
        fail(r, step, "writes what a product of " + p.names[other] + " reads");
    }
  }

  // What is read has to have arrived, and to be what the emulator read there.
  void check(State const& s, size_t r, Step& step) {
    for (int16_t const load : s.loads) {
      for (int const cell : step_of("load", load).cells) {
        if (std::find(step.cells.begin(), step.cells.end(), cell) != step.cells.end())
          fail(r, step, "reads what is on its way");
      }
    }
    std::vector<int> content;
    for (int const cell : step.cells) content.push_back(s.content[static_cast<size_t>(cell)]);
    if (is_learning) step.content = content;
    else if (content != step.content) fail(r, step, "reads something else");
  }

  void fail(size_t r, Step const& step, std::string const& what) {
    if (wrong.empty())
      wrong = p.names[r] + ", step " + std::to_string(&step - p.roles[r].data()) + " (" + step.what + "): " + what;
  }

  std::string deadlock(State const& s) const {
    std::string text = "deadlock:";
    for (size_t r = 0; r < p.roles.size(); ++r) {
      size_t const at = static_cast<size_t>(s.next[r]);
      if (at < p.roles[r].size())
        text += " " + p.names[r] + " at step " + std::to_string(at) + " (" + p.roles[r][at].what + ")";
    }
    return text;
  }
};

// ---- faults ------------------------------------------------------------------------------------------------------------
// Waits, arrivals and barriers of one kind left out by the producers or by the consumers, as a missing line of source would.
std::map<std::string, Protocol> planted(Protocol const& right) {
  std::map<int, std::set<std::string>> parties;  // of named barriers. One role alone stands for warps that meet there
  for (size_t r = 0; r < right.roles.size(); ++r) {
    for (Step const& step : right.roles[r]) {
      if (step.what == "meet" || step.what == "pass") parties[step.at].insert(right.names[r]);
    }
  }
  std::map<std::string, Protocol> all;
  for (size_t r = 0; r < right.roles.size(); ++r) {
    std::string const side = right.names[r].substr(0, right.names[r].find(' '));
    for (Step const& kind : right.roles[r]) {
      bool const is_named = kind.what == "meet" || kind.what == "pass";
      bool const is_at_barrier = is_named || kind.what == "wait" || kind.what == "arrive";
      if (!is_at_barrier && kind.what != "retire" && kind.what != "store_wait") continue;
      if (is_named && parties[kind.at].size() == 1) continue;
      std::string const name =
          side + "s without " + kind.what + (is_at_barrier ? " at " + std::to_string(kind.at) : "");
      if (all.count(name)) continue;
      Protocol faulty = right;
      for (size_t other = 0; other < right.roles.size(); ++other) {
        if (right.names[other].compare(0, side.size(), side)) continue;
        auto& role = faulty.roles[other];
        auto const is_left_out = [&](Step const& x) { return x.what == kind.what && x.at == kind.at; };
        role.erase(std::remove_if(role.begin(), role.end(), is_left_out), role.end());
      }
      all.emplace(name, std::move(faulty));
    }
  }
  return all;
}

}  // namespace

int main() {
  std::vector<Line> lines;
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream in(text);
    int run;
    Line line;
    if (in >> run >> line.warp >> line.what >> line.a >> line.b >> line.c) lines.push_back(line);
  }
  Explorer teacher(Reader(lines).made);
  teacher.is_learning = true;
  if (std::string const wrong = teacher.explore(true); !wrong.empty())
    return std::printf("FAILED %s\n", wrong.c_str()), 1;
  Explorer explorer(teacher.p);
  std::string const wrong = explorer.explore(false);
  if (!wrong.empty()) return std::printf("FAILED %s\n", wrong.c_str()), 1;
  std::printf("ok %zu states\n", explorer.states);
  bool all_found = true;
  for (auto const& [name, faulty] : planted(teacher.p)) {
    std::string const found = Explorer(faulty).explore(false);
    std::printf("%s %s: %s\n", found.empty() ? "MISSED" : "found", name.c_str(), found.c_str());
    all_found = all_found && !found.empty();
  }
  return !all_found;
}
