// The emulated machine of machine.h: fibers and their scheduler, barriers, and shared memory with its checks. TMA is in
// tma.cpp, the tensor cores in tensor_core.cpp.
#include "machine_state.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace fa::emu {

// Fibers change places by jumps within the process: swapcontext would ask the system for signal masks each time.
static void leave(Fiber& fiber) {
  if (!_setjmp(fiber.place)) _longjmp(machine().scheduler, 1);
}

static void enter(Fiber& fiber) {
  if (_setjmp(machine().scheduler)) return;  // it has left
  if (fiber.has_begun) _longjmp(fiber.place, 1);
  fiber.has_begun = true;
  setcontext(&fiber.context);
}

void error(std::string const& what) {
  Machine& m = machine();
  if (m.report->error.empty()) {
    std::string const thread = m.running ? "thread " + std::to_string(m.running->thread) : "asynchronous";
    m.report->error = "block " + std::to_string(m.block) + ", " + thread + ": " + what;
  }
  m.is_stopped = true;
  if (m.running) leave(*m.running);  // for good
}

// ---- fibers ----------------------------------------------------------------------------------------------------------
void block_until(std::function<bool()> condition, char const* waiting_for) {
  if (condition()) return;
  Fiber* self = machine().running;
  self->condition = std::move(condition);
  self->waiting_for = waiting_for;
  leave(*self);
  self->condition = nullptr;
}

// Sometimes yields to the other warps, as if this one were slow here.
void pause() {
  Machine& m = machine();
  if (m.random() % 3) return;
  Fiber* self = m.running;
  self->resume_at = m.rounds + 1 + m.random() % 12;
  block_until([&m, self] { return m.rounds >= self->resume_at; }, "its turn");
}

int thread_index() { return machine().running->thread; }
int block_index() { return machine().block; }
int block_count() { return machine().blocks; }
Warp& my_warp() { return machine().warps[thread_index() / 32]; }

Collected const& meet(char const* what, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) {
  Warp& warp = my_warp();
  if (warp.arrived == 0) warp.meeting = what;
  if (std::strcmp(warp.meeting, what)) error(std::string("lanes of a warp part: ") + warp.meeting + " and " + what);
  uint64_t const values[5] = {a, b, c, d, e};
  std::copy(values, values + 5, warp.coming.of_lane[thread_index() % 32]);
  uint64_t const generation = warp.generation;
  if (++warp.arrived == 32) {
    warp.collected = warp.coming;
    warp.arrived = 0;
    ++warp.generation;
  } else {
    block_until([&warp, generation] { return warp.generation != generation; }, "the other lanes of its warp");
  }
  return warp.collected;
}

// A meeting after which every lane may rely on what the others did before it.
void sync_warp(char const* what) {
  Warp& warp = my_warp();
  if (warp.arrived == 0) warp.arriving.assign(agent_count(), 0);
  tell(warp.arriving);
  if (warp.arrived == 31) warp.known = std::move(warp.arriving);
  meet(what);
  learn(machine().running->clock, warp.known);
}

static void enter_fiber() {
  machine().kernel();
  machine().running->done = true;
  leave(*machine().running);  // for good
}

static void start_fibers(int threads) {
  Machine& m = machine();
  m.fibers.resize(threads);
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = m.fibers[thread];
    std::vector<char> stack = std::move(fiber.stack);
    fiber = Fiber();
    fiber.stack = std::move(stack);
    fiber.stack.resize(64 * 1024);
    fiber.thread = thread;
    fiber.is_ahead = m.follows;
    fiber.clock.assign(agent_count(), 0);
    fiber.clock[thread] = 1;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
  }
}

// ---- the scheduler ---------------------------------------------------------------------------------------------------
// Holds a warp or a warpgroup back for a while, so that the others get as far ahead as they can.
struct Freezer {
  int first = 0, end = 0, rounds = 0;  // warps first .. end - 1
  bool holds(int warp) const { return warp >= first && warp < end; }
  void next(int warps) {
    if (rounds-- > 0) return;
    auto& random = machine().random;
    int const width = random() % 3 ? random() % 2 ? 4 : 1 : 0;
    first = static_cast<int>(random() % warps) / (width ? width : 1) * width;
    end = first + width;
    rounds = static_cast<int>(random() % (random() % 4 ? 60 : 1500));
  }
};

static bool run_ready_fibers(std::vector<int> const& order, Freezer const& freezer) {
  Machine& m = machine();
  bool moved = false;
  for (int warp : order) {
    if (freezer.holds(warp)) continue;
    for (int lane = 0; lane < 32; ++lane) {
      Fiber& fiber = m.fibers[warp * 32 + lane];
      if (fiber.done || (fiber.condition && !fiber.condition())) continue;
      m.running = &fiber;
      enter(fiber);
      m.running = nullptr;
      moved = true;
      if (m.is_stopped) return true;
    }
  }
  return moved;
}

static bool run_load(bool wanted) {
  Machine& m = machine();
  if (m.loads.empty() || !wanted) return false;
  size_t const i = m.random() % m.loads.size();  // in any order
  std::function<void()> const load = std::move(m.loads[i]);
  m.loads.erase(m.loads.begin() + static_cast<long>(i));
  load();
  return true;
}

static bool run_store(bool wanted) {
  if (!wanted) return false;
  for (Store& store : machine().stores) {
    if (store.is_written) continue;
    if (!store.is_read) {
      check_async_read(store.from, static_cast<uint32_t>(store.data.size()), "a TMA store");
      std::copy_n(shared_bytes(store.from, static_cast<int>(store.data.size())), store.data.size(), store.data.begin());
      store.is_read = true;
    } else {
      store.write(store.data);
      store.is_written = true;
    }
    return true;
  }
  return false;
}

static void report_deadlock() {
  Machine& m = machine();
  std::map<std::string, std::vector<int>> waiting;
  for (Fiber const& fiber : m.fibers) {
    if (!fiber.done) waiting[fiber.waiting_for].push_back(fiber.thread);
  }
  std::string text = "deadlock.";
  for (auto const& [what, threads] : waiting) {
    text += " " + std::to_string(threads.size()) + " threads from " + std::to_string(threads[0]) + " wait for " + what +
            ".";
  }
  for (auto const& [address, barrier] : m.mbarriers) {
    text += " [mbarrier +" + std::to_string(address - kSharedBase) + ": phase " + std::to_string(barrier.phase) +
            ", lacks " + std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) +
            " arrivals and " + std::to_string(barrier.bytes) + " bytes]";
  }
  error(text);
}

static void schedule(int threads) {
  Machine& m = machine();
  std::vector<int> order(threads / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  Freezer freezer;
  while (std::any_of(m.fibers.begin(), m.fibers.end(), [](Fiber const& fiber) { return !fiber.done; })) {
    std::shuffle(order.begin(), order.end(), m.random);
    freezer.next(threads / 32);
    ++m.rounds;
    bool moved = run_ready_fibers(order, freezer);
    if (!moved && freezer.end > freezer.first) {
      freezer = Freezer();
      moved = run_ready_fibers(order, freezer);
    }
    moved |= std::any_of(m.fibers.begin(), m.fibers.end(),
                         [&](Fiber const& f) { return !f.done && f.resume_at > m.rounds; });
    moved |= run_product(!moved || m.random() % 2 == 0);
    moved |= run_load(!moved || m.random() % 3 == 0);
    moved |= run_store(!moved || m.random() % 3 == 0);
    if (!moved) report_deadlock();
    if (m.is_stopped) return;
  }
}

void run_block(int threads, int block, int blocks, uint32_t seed, std::function<void()> const& kernel, Report& report) {
  Machine& m = machine();
  Machine before = std::move(m);
  m = Machine();
  m.fibers = std::move(before.fibers);  // whose stacks are used again
  m.global = std::move(before.global);
  m.is_trusting = before.is_trusting;
  m.follows = before.follows;
  m.is_traced = before.is_traced;
  m.trace = std::move(before.trace);
  m.runs = before.runs + 1;
  m.report = &report;
  m.kernel = kernel;
  m.block = block;
  m.blocks = blocks;
  m.random.seed(seed);
  m.shared.assign(kSharedBytes, 0xff);
  m.unfenced_writer.assign(kSharedBytes / 16, 0);
  m.is_written.assign(kSharedBytes / 16, false);
  m.grains.assign(kSharedBytes / 16, Grain());
  m.warps.resize(threads / 32);
  int const at_launch = 65536 / threads / 8 * 8;
  m.register_pool = at_launch * threads;
  for (Warp& warp : m.warps) warp.registers = at_launch;
  start_fibers(threads);
  for (NamedBarrier& barrier : m.named) barrier.arriving.assign(agent_count(), 0);
  schedule(threads);
  bool const is_finished = std::all_of(m.fibers.begin(), m.fibers.end(), [](Fiber const& f) { return f.done; });
  if (is_finished && !m.loads.empty()) error("the block ended with a TMA load in flight");
  for (Fiber const& fiber : m.fibers) {
    if (is_finished && !fiber.copies.empty()) error("a thread ended with a copy in flight");
  }
  for (Store const& store : m.stores) {
    if (is_finished && !store.is_written) error("the block ended with a TMA store in flight");
  }
}

void run_grid(int threads, int64_t blocks, uint32_t seed, std::function<void()> const& kernel, Report& report,
              bool follows) {
  machine().follows = follows;
  std::vector<int> order(static_cast<size_t>(blocks));
  for (size_t block = 0; block < order.size(); ++block) order[block] = static_cast<int>(block);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (int block : order) {
    run_block(threads, block, static_cast<int>(blocks), seed * 77 + static_cast<uint32_t>(block), kernel, report);
    if (!report.error.empty()) return;
  }
}

// Of a warp its first lane alone, but for loads, which every lane may start.
void note(char const* what, uint64_t a, uint64_t b, uint64_t c) {
  Machine& m = machine();
  if (!m.is_traced || (thread_index() % 32 && std::string(what) != "load")) return;
  m.trace.push_back({m.runs, thread_index() / 32, what, a, b, c});
}

void trace_blocks() { machine().is_traced = true; }

std::string take_trace() {
  std::string lines;
  for (Step const& step : machine().trace) {
    lines += std::to_string(step.run) + " " + std::to_string(step.warp) + " " + step.what;
    for (uint64_t const x : {step.a, step.b, step.c}) lines += " " + std::to_string(x);
    lines += "\n";
  }
  machine().trace.clear();
  return lines;
}

// ---- shared memory ---------------------------------------------------------------------------------------------------
uint8_t* shared_bytes(uint32_t address, int bytes) {
  if (address < kSharedBase || address + bytes > kSharedBase + kSharedBytes) {
    error("shared address " + std::to_string(address) + " is out of range");
    return machine().shared.data();
  }
  return machine().shared.data() + (address - kSharedBase);
}

static bool overlaps(Store const& store, uint32_t from, uint32_t bytes) {
  return !store.is_read && from < store.from + store.data.size() && from + bytes > store.from;
}

// Checks before a write to [from, from + bytes).
void check_write(uint32_t from, uint32_t bytes, char const* who) {
  Machine& m = machine();
  for (Store const& store : m.stores) {
    if (overlaps(store, from, bytes)) error(std::string(who) + " a buffer that a TMA store still reads");
  }
  if (is_operand_in_flight(from, bytes)) error(std::string(who) + " an operand of a wgmma in flight");
}

static Access now() {
  Fiber const& self = *machine().running;
  return {static_cast<uint32_t>(self.thread), self.clock[self.thread]};
}

void store_shared(uint32_t to, void const* from, int bytes) {
  Machine& m = machine();
  if (to % static_cast<uint32_t>(bytes)) error("misaligned store to shared memory");
  uint8_t* const target = shared_bytes(to, bytes);
  check_write(to, static_cast<uint32_t>(bytes), "a store writes over");
  std::copy_n(static_cast<uint8_t const*>(from), bytes, target);
  uint32_t const granule = (to - kSharedBase) / 16;
  note_write(granule, now());
  note("write", to, to + static_cast<uint32_t>(bytes));
  m.unfenced_writer[granule] = static_cast<uint16_t>(thread_index() + 1);
  m.is_written[granule] = true;
  m.running->unfenced.push_back(granule);
}

void load_shared(uint32_t from, void* to, int bytes) {
  uint8_t const* const source = shared_bytes(from, bytes);
  uint32_t const granule = (from - kSharedBase) / 16;
  if (!machine().is_written[granule]) error("a load reads shared memory that was never written");
  note_read(granule, now());
  note("get", from, from + static_cast<uint32_t>(bytes));
  std::copy_n(source, bytes, static_cast<uint8_t*>(to));
}

void fence_proxy_async() {
  Machine& m = machine();
  for (uint32_t granule : m.running->unfenced) {
    if (m.unfenced_writer[granule] == thread_index() + 1) m.unfenced_writer[granule] = 0;
  }
  m.running->unfenced.clear();
}

void check_async_read(uint32_t from, uint32_t bytes, char const* who) {
  for (uint32_t granule = (from - kSharedBase) / 16; granule <= (from + bytes - 1 - kSharedBase) / 16; ++granule) {
    if (int const writer = machine().unfenced_writer[granule]) {
      error(std::string(who) + " reads what thread " + std::to_string(writer - 1) + " wrote without fence.proxy.async");
      return;
    }
  }
}

// ---- mbarriers and named barriers ------------------------------------------------------------------------------------
Mbarrier& mbarrier_at(uint32_t address) {
  auto const found = machine().mbarriers.find(address);
  if (found == machine().mbarriers.end()) {
    error("no mbarrier at +" + std::to_string(address - kSharedBase));
    return machine().mbarriers[address];
  }
  if (!found->second.is_fenced) error("an mbarrier is used before its initialisation was fenced");
  return found->second;
}

static void finish_phase(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
    barrier.arriving[loads_of(barrier.number)] = ++barrier.completed;
    barrier.known = barrier.arriving;
  }
}

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8) error("misaligned mbarrier");
  shared_bytes(barrier, 8);
  note("init", barrier, arrivals);
  auto& all = machine().mbarriers;
  if (all.size() == kMostMbarriers) error("more mbarriers than the emulated machine tells apart");
  Mbarrier& made = all[barrier] = Mbarrier();
  made.arrivals = made.pending = static_cast<int>(arrivals);
  made.number = static_cast<uint32_t>(all.size()) - 1;
  made.arriving.assign(agent_count(), 0);
}

void mbarrier_fence_init() {
  for (auto& [address, barrier] : machine().mbarriers) barrier.is_fenced = true;
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  note("arrive", address, expected_bytes);
  if (barrier.pending == 0) return error("more arrivals at an mbarrier than it counts");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  tell(barrier.arriving);
  finish_phase(barrier);
  pause();
}

void complete_bytes(uint32_t address, int64_t bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  barrier.bytes -= bytes;
  if (barrier.bytes < 0 && barrier.pending == 0) error("more bytes arrived than an mbarrier expects");
  finish_phase(barrier);
}

static bool is_complete(uint32_t address, uint32_t parity) {
  return machine().mbarriers[address].phase != static_cast<int>(parity & 1);
}

static void learn_of(uint32_t address) {
  Clock const& known = machine().mbarriers[address].known;
  if (!known.empty()) learn(machine().running->clock, known);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  mbarrier_at(address);
  note("wait", address, parity);
  block_until([=] { return is_complete(address, parity); }, "an mbarrier");
  learn_of(address);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  mbarrier_at(address);
  Machine& m = machine();
  Fiber* const self = m.running;
  self->resume_at = m.rounds + 1;
  block_until([&m, self] { return m.rounds >= self->resume_at; }, "its turn");
  if (!is_complete(address, parity)) return false;
  note("wait", address, parity);
  learn_of(address);
  return true;
}

uint64_t rounds() { return machine().rounds; }

void named_barrier(int id, int threads, bool wait) {
  Machine& m = machine();
  if (threads == 0) threads = static_cast<int>(m.fibers.size());
  if (id < 0 || id > 15 || threads % 32) return error("a named barrier has number 0 to 15 and whole warps");
  NamedBarrier& barrier = m.named[id];
  note(wait ? "meet" : "pass", static_cast<uint64_t>(id), static_cast<uint64_t>(threads));
  if (barrier.arrived && barrier.threads != threads) error("threads disagree about the size of a named barrier");
  barrier.threads = threads;
  uint64_t const generation = barrier.generation;
  tell(barrier.arriving);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.known = barrier.arriving;
  } else if (wait) {
    block_until([&barrier, generation] { return barrier.generation != generation; }, "a named barrier");
  }
  if (wait) learn(m.running->clock, barrier.known);
}

// setmaxnreg: a warp that needs more registers waits until the pool of the block has them.
void set_registers(int registers, bool more) {
  Machine& m = machine();
  if (registers % 8 || registers < 24 || registers > 256) error("setmaxnreg takes multiples of 8 from 24 to 256");
  meet("setmaxnreg");
  Warp& warp = my_warp();
  auto const fits = [&m, &warp, registers] {
    int used = 0;
    for (Warp const& other : m.warps) used += (&other == &warp ? registers : other.registers) * 32;
    return used <= m.register_pool;
  };
  if (more) block_until(fits, "registers that other warps have not given");
  warp.registers = registers;
}

}  // namespace fa::emu
