// The state of the emulated machine, shared by machine.cpp, tma.cpp and tensor_core.cpp only.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <random>
#include <vector>

#include "machine.h"

namespace fa::emu {

// For every agent (races.cpp) the time of its that is known to be over.
using Clock = std::vector<uint32_t>;

struct Access {
  uint32_t agent, time;
};

struct Grain {  // 16 bytes of shared memory
  Access written{0, 0};
  std::vector<Access> reads;  // since then, one of each agent
};

constexpr uint32_t kMostMbarriers = 32;

struct Accumulator {  // of one thread, while products on it are in flight
  std::vector<float> values;
  int in_flight = 0;
};

struct Copy {  // by a thread, which has not waited for it yet
  uint32_t to;
  void const* from;  // null: zeros
  int bytes;
  bool is_there;
};

struct Fiber {
  ucontext_t context;  // to begin in
  jmp_buf place;       // to go on from
  bool has_begun = false;
  std::vector<char> stack;
  int thread = 0;
  bool done = false;
  bool is_ahead = false;  // of the end of the kernel before
  Clock clock;
  std::function<bool()> condition;  // null: it can run
  std::string waiting_for;
  std::vector<uint32_t> unfenced;           // granules of 16 bytes it wrote since its last proxy fence
  std::vector<size_t> open_stores, stores;  // TMA stores before and after commit
  std::vector<size_t> store_groups;         // how many were committed at each commit
  std::deque<Copy> copies;
  size_t open_copies = 0;           // of these, not committed
  std::deque<size_t> copy_groups;   // the sizes of the groups
  uint64_t resume_at = 0;  // round, where it paused
  bool is_wgmma_fenced = false;
  size_t issued = 0, retired = 0;    // wgmmas
  std::vector<size_t> group_ends;    // how many were issued at each commit
  std::map<float*, Accumulator> accumulators;
};

struct Product {  // one warp's part of a wgmma: 16 rows
  Wgmma op;
  int lanes = 0;  // that have issued it
  float* d[32];
  uint32_t const* a[32][4];
  uint32_t a_values[32][4];
  std::vector<uint32_t> granules;  // of shared memory that the whole wgmma reads, sorted
};

struct Warp {
  Collected coming, collected;
  char const* meeting = "";
  int arrived = 0;
  uint64_t generation = 0;
  Clock arriving, known;  // of a meeting that orders memory: what its lanes did before it
  int registers = 0;                     // of each thread
  std::deque<Product> products;
  size_t computed = 0, retired = 0;  // products before these are computed; waited for
};

struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  int phase = 0;
  bool is_fenced = false;
  uint32_t number = 0, completed = 0;  // which of the block's mbarriers, and how many of its phases are over
  Clock arriving, known;               // what those did who arrived; until the last phase ended
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
  Clock arriving, known;
};

struct Store {
  uint32_t from;
  std::vector<uint8_t> data;
  std::function<void(std::vector<uint8_t> const&)> write;
  bool is_read, is_written;
};

struct Step {  // what a warp did that others can notice, in the order of the run (csrc/proofs/protocol.cpp)
  int run, warp;
  char const* what;
  uint64_t a, b, c;
};

struct Region {  // of global memory
  char const* begin;
  std::vector<bool> is_stored;  // each byte, by a kernel
};

struct Machine {
  Report* report = nullptr;
  bool is_stopped = false;
  std::function<void()> kernel;
  int block = 0, blocks = 1;
  std::mt19937 random;
  uint64_t rounds = 0;  // of the scheduler
  jmp_buf scheduler;
  Fiber* running = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int register_pool = 0;
  std::vector<uint8_t> shared;
  std::vector<uint16_t> unfenced_writer;  // per granule: 1 + the thread that wrote it without a proxy fence, or 0
  std::vector<bool> is_written;           // per granule: by ordinary stores
  std::vector<Grain> grains;
  std::map<uint32_t, Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<std::function<void()>> loads;
  std::vector<Store> stores;
  std::vector<Region> global;  // memory that kernels may access, except by TMA loads
  bool follows = false;  // the kernel may begin before the one before has ended
  bool is_trusting = false;    // kernels may access all memory
  bool is_traced = false;
  int runs = 0;  // blocks run so far
  std::vector<Step> trace;
};

inline Machine the_machine;
inline Machine& machine() { return the_machine; }
Warp& my_warp();
void note(char const* what, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0);  // by the running thread; if traced
void block_until(std::function<bool()> condition, char const* waiting_for);
void pause();
uint8_t* shared_bytes(uint32_t address, int bytes);
void check_write(uint32_t from, uint32_t bytes, char const* who);
void complete_bytes(uint32_t mbarrier, int64_t bytes);
void check_is_not_ahead(char const* what);
void check_async_read(uint32_t from, uint32_t bytes, char const* who);
uint32_t swizzled(uint32_t address);
Mbarrier& mbarrier_at(uint32_t address);

void learn(Clock& clock, Clock const& known);
void tell(Clock& known);
size_t agent_count();
uint32_t products_of(uint32_t warp);
uint32_t stores_of(uint32_t warp);
uint32_t loads_of(uint32_t mbarrier);
// By the running thread, or by an agent that it sets going.
void note_read(uint32_t grain, Access const& access);
void note_write(uint32_t grain, Access const& access);

bool is_operand_in_flight(uint32_t from, uint32_t bytes);
bool run_product(bool wanted);  // computes one that is waiting, if there is any

}  // namespace fa::emu
