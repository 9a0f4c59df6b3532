// Races on shared memory, found by vector clocks and so whatever order the machine happened to run things in: two accesses
// to the same 16 bytes, one of them a write, have to be ordered by barriers.
//
// An agent is what acts by itself: each thread; of each warp its products, and its TMA stores; of each mbarrier the loads
// that report to it. A clock says, for every agent, how much of what it did is over and known. Threads learn it at
// barriers, and from waiting for their products and stores; a load is over with its mbarrier's phase.
#include <algorithm>

#include "machine_state.h"

namespace fa::emu {

void learn(Clock& clock, Clock const& known) {
  for (size_t agent = 0; agent < clock.size(); ++agent) clock[agent] = std::max(clock[agent], known[agent]);
}

static uint32_t threads() { return static_cast<uint32_t>(machine().fibers.size()); }
uint32_t products_of(uint32_t warp) { return threads() + warp; }
uint32_t stores_of(uint32_t warp) { return threads() + threads() / 32 + warp; }
uint32_t loads_of(uint32_t mbarrier) { return threads() + 2 * (threads() / 32) + mbarrier; }
size_t agent_count() { return loads_of(kMostMbarriers); }

// What a thread did so far goes to those who meet it at a barrier; what it does next does not.
void tell(Clock& known) {
  Fiber& self = *machine().running;
  learn(known, self.clock);
  ++self.clock[self.thread];
}

static std::string name_of(uint32_t agent) {
  uint32_t const warps = threads() / 32;
  if (agent < products_of(0)) return "thread " + std::to_string(agent);
  if (agent < stores_of(0)) return "a wgmma of warp " + std::to_string(agent - products_of(0));
  if (agent < loads_of(0)) return "a TMA store of warp " + std::to_string(agent - stores_of(0));
  return "a TMA load on mbarrier " + std::to_string(agent - products_of(0) - 2 * warps);
}

static void report_race(uint32_t grain, char const* does, uint32_t agent, char const* did, uint32_t other) {
  error("a race at +" + std::to_string(grain * 16) + ": " + name_of(agent) + " " + does + " what " + name_of(other) +
        " " + did + ", and nothing orders the two");
}

void note_read(uint32_t grain, Access const& access) {
  Grain& at = machine().grains[grain];
  if (at.written.time > machine().running->clock[at.written.agent]) {
    return report_race(grain, "reads", access.agent, "wrote", at.written.agent);
  }
  auto const same =
      std::find_if(at.reads.begin(), at.reads.end(), [&](Access const& x) { return x.agent == access.agent; });
  if (same == at.reads.end()) at.reads.push_back(access);
  else same->time = access.time;
}

void note_write(uint32_t grain, Access const& access) {
  Grain& at = machine().grains[grain];
  Clock const& known = machine().running->clock;
  if (at.written.time > known[at.written.agent]) {
    return report_race(grain, "writes over", access.agent, "wrote", at.written.agent);
  }
  for (Access const& read : at.reads) {
    if (read.time > known[read.agent]) return report_race(grain, "writes over", access.agent, "reads", read.agent);
  }
  at.reads.clear();
  at.written = access;
}

}  // namespace fa::emu
