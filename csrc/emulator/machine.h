// One streaming multiprocessor on a CPU: it implements the names of sm90/ptx.cuh when kernels are built with
// FA_EMULATE.
//
// Every thread of a block is a fiber. Warps are scheduled at random; a warp or a warpgroup is held back at random.
// Everything asynchronous happens at a random later time: copies by threads, TMA loads and stores, and each wgmma, of which every warp
// computes its own 16 rows between issue and wait, reading its operands through descriptor and swizzle only then.
// Shared memory begins as NaN, the target of a TMA load is NaN until it arrives, and accumulators are NaN until their
// wait. Beyond wrong results this reports, with block, thread and reason:
//
//   a deadlock of a block (each thread's wait, and the state of every mbarrier)
//   an operand that is overwritten, registers that change, or a wait without commit, while a wgmma is in flight
//   two accesses to the same 16 bytes of shared memory, one of them a write, that no barrier orders (races.cpp)
//   wgmma and TMA reading what was written without a proxy fence; a buffer reused while a TMA store reads it
//   a wgmma without wgmma.fence; threads of a warp that disagree about one, or meet in different instructions
//   mbarriers used before init and fence, too many arrivals or bytes; named barriers with differing counts
//   more registers taken than were released; misalignment; addresses out of range; reads of unwritten shared memory;
//   outputs stored twice
//
// It cannot show real latencies, bank conflicts, what ptxas does to registers, or clusters. How it agrees with
// hardware: csrc/README.md.
#pragma once
#include <cstdint>
#include <functional>
#include <set>
#include <string>

namespace fa::emu {

constexpr uint32_t kSharedBase = 1024, kSharedBytes = 232448;

struct Report {
  std::string error;  // empty: none. The block stops at the first
  uint64_t products = 0, loads = 0, stores = 0, copies = 0;
};

// Runs `kernel` as block `block` of `blocks`, and adds to `report`. The same seed gives the same run.
void run_block(int threads, int block, int blocks, uint32_t seed, std::function<void()> const& kernel, Report& report);

// A whole grid, block after block in any order, until the first error. If it `follows`, it may have begun before the grid
// before has ended, and may not read what that wrote until it has waited for it.
void run_grid(int threads, int64_t blocks, uint32_t seed, std::function<void()> const& kernel, Report& report,
              bool follows = false);

void trace_blocks();  // from now on
std::string take_trace();  // a line for each step: which block in the order of their runs, warp, what, and its numbers

// Allows kernels to load from global memory and to store to it once. TMA loads are bounded by their tensor map instead.
void allow_global(void const* begin, size_t bytes);
void forget_global();
void trust_kernels();  // allows all accesses to global memory from now on

// ---- what follows is called by the kernel, through emulator/ptx.h ----------------------------------------------------
struct Map {  // a tiled 4-D tensor map, 128-byte swizzle
  void* base;
  int64_t size[4];  // elements
  int64_t stride[4];  // bytes; stride[0] is the size of an element
  int box[4];
};

void error(std::string const& what);  // does not return to a kernel
int thread_index();
int block_index();
int block_count();

// A call in a kernel that orders something. One of them can be left out, to see that the machine reports it: no kernel
// has to be compiled again for that.
struct Site {
  char const* what;
  char const* file;
  int line;
  static Site here(char const* what, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {what, file, line};
  }
  bool is_left_out() const;  // and notes that the call happened
};
void leave_out(std::string const& site);  // as `sites` names it: "consumer.cuh:53 mbarrier_wait"
std::set<std::string> sites();  // that kernels have come to

struct Collected {  // the arguments of every lane of a warp in a collective
  uint64_t of_lane[32][5];
};
Collected const& meet(char const* what, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0, uint64_t e = 0);
void sync_warp(char const* what);

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_fence_init();
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity);  // whether the phase is complete, after one round
uint64_t rounds();  // of the scheduler
void named_barrier(int barrier, int threads, bool wait);
void set_registers(int registers, bool more);

void tma_load(uint32_t to, Map const* map, uint32_t barrier, int const (&at)[4]);
void bulk_load(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier);
void tma_store(Map const* map, uint32_t from, int const (&at)[4]);
void tma_store_commit();
void tma_store_wait(bool only_read, int groups_left);
void bulk_add(float* to, uint32_t from, uint32_t bytes);
void wait_for_kernel_before();
void copy_async(uint32_t to, void const* from, int bytes, bool exists);
void copies_commit();
void copies_wait(int groups_left);
void fence_proxy_async();

struct Wgmma {
  int n;
  bool is_half;  // float16, else bfloat16
  bool a_in_registers, transpose_a, transpose_b, accumulate;
  uint32_t a, b;  // descriptors
};
void wgmma_fence();
void wgmma_issue(Wgmma const& op, float* d, uint32_t const* const (&a)[4]);
void wgmma_commit();
void wgmma_wait(int groups);

void store_shared(uint32_t to, void const* from, int bytes);
void load_shared(uint32_t from, void* to, int bytes);

bool may_load(void const* address, size_t bytes);  // global memory; reports if not
bool may_store(void const* address, size_t bytes);
bool may_add(void const* address, size_t bytes);

uint16_t to_bf16(float x);
uint16_t to_half(float x);
float e4m3_value(uint32_t byte);
float const* decoder(bool is_half);  // the value of each of the 65536 numbers

}  // namespace fa::emu
