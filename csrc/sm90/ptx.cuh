// The hardware layer: mbarriers, TMA, wgmma, named barriers and registers, in inline PTX.
//
// Kernels use the hardware only through it. With FA_EMULATE emulator/ptx.h defines the same names, which run on a CPU.
// It compiles with nvcc and NVRTC, without headers of the standard library or of CUDA. Everything is force-inlined,
// since a function call between the issue of a wgmma and its wait makes ptxas serialise it.
#pragma once
#include "../common/params.h"

#define FA_WATCHDOG_SENTENCE "fastattn's watchdog: %s %d of block %d waits in vain for barrier %d (parity %u)\n"
#define FA_DESCRIPTOR_HIGH "0x40000040"  // word of every wgmma descriptor (wgmma.cuh)

#ifdef FA_EMULATE
#include "../emulator/ptx.h"
#else

#define FA_DEVICE __device__ __forceinline__
#define FA_GLOBAL(THREADS) __global__ void __launch_bounds__(THREADS, 1)
#define FA_KERNEL_ARGUMENT const __grid_constant__
#define FA_MODULE_VARIABLE static __device__ volatile
#define FA_UNROLL _Pragma("unroll")

#include "wgmma.cuh"

#if defined(FA_WATCHDOG) && !defined(__CUDACC_RTC__)
extern "C" __host__ __device__ int printf(char const*, ...);
#endif

namespace fa::sm90 {

struct alignas(64) TensorMap {  // CUtensorMap, whose header does not compile under NVRTC
  uint64 opaque[16];
};

// ---- indices -------------------------------------------------------------------------------------------------------
// Volatile, so that values that depend on it are computed where they are used. Otherwise the compiler computes the
// addresses of rarely executed code ahead of the main loop, and spills them.
FA_DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
FA_DEVICE int block_index() { return blockIdx.x; }
FA_DEVICE int block_count() { return gridDim.x; }
FA_DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }
FA_DEVICE bool elect_one() {  // true in one lane of the warp
  uint32 elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}
FA_DEVICE uint32 shared_base() {
  extern __shared__ __align__(1024) uint8 shared_memory[];
  return static_cast<uint32>(__cvta_generic_to_shared(shared_memory));
}

// x, made opaque to the compiler, so that it does not move computations on x out of a loop.
FA_DEVICE uint32 recomputed(uint32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------
FA_DEVICE void mbarrier_begin(uint32 barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FA_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FA_DEVICE void mbarrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and keeps the phase open until `bytes` bytes have arrived by TMA.
FA_DEVICE void mbarrier_expect(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete, after a while of waiting for it. A fresh barrier counts as having completed
// parity 1, so the first wait for something to become empty uses parity 1.
FA_DEVICE bool mbarrier_try_wait(uint32 barrier, uint32 parity) {
  uint32 done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
#ifndef FA_WATCHDOG
FA_DEVICE void mbarrier_init(uint32 barrier, uint32 arrivals) { mbarrier_begin(barrier, arrivals); }
FA_DEVICE void mbarrier_wait(uint32 barrier, uint32 parity) {
  while (!mbarrier_try_wait(barrier, parity)) continue;
}
#else  // watchdog.cuh defines both
FA_DEVICE uint64 watch_time() {  // in milliseconds
  uint64 nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return nanoseconds / 1000000;
}
FA_DEVICE void end_in_sentence(char const* role, int number, int block, int barrier, uint32 parity) {
  printf(FA_WATCHDOG_SENTENCE, role, number, block, barrier, parity);
  __trap();
}
#endif

// ---- TMA -----------------------------------------------------------------------------------------------------------
constexpr uint64 kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

FA_DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Loads the box at (column, row, head, batch). Elements outside the tensor arrive as zeros, and count as bytes.
FA_DEVICE void tma_load(uint32 to, const TensorMap* map, uint32 barrier, int column, int row, int head, int batch,
                        uint64 l2_hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3,%4,%5,%6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(l2_hint)
      : "memory");
}
// Copies `bytes` from global memory; addresses and bytes are multiples of 16.
FA_DEVICE void bulk_load(uint32 to, void const* from, uint32 bytes, uint32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Writes the part of the box that lies inside the tensor.
FA_DEVICE void tma_store(const TensorMap* map, uint32 from, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(map),
               "r"(from), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}
FA_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// This thread's stores have read their shared memory / have reached global memory.
FA_DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
FA_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// The same, except for the GROUPS committed last.
template <int GROUPS>
FA_DEVICE void tma_store_wait_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
}
// Adds floats to global memory, in no fixed order; otherwise like a TMA store. Addresses and bytes are multiples of 16.
FA_DEVICE void bulk_add(float* to, uint32 from, uint32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
// Shared memory written by ordinary stores is visible to wgmma and TMA only after this.
FA_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- kernels that overlap --------------------------------------------------------------------------------------------
// The next kernel of the stream, if it was launched to follow, may begin blocks where there is room.
FA_DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The kernel before, if this one was launched to follow it, has ended, and what it wrote can be read.
FA_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- copies by threads -----------------------------------------------------------------------------------------------
// Copies BYTES bytes, 16 or 4, some time before this thread has waited for their group; zeros where nothing exists.
template <int BYTES>
FA_DEVICE void copy_async(uint32 to, void const* from, bool exists) {
  uint32 const source_bytes = exists ? BYTES : 0;
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(source_bytes) : "memory");
  }
}
FA_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of this thread have arrived, except for the GROUPS committed last.
template <int GROUPS>
FA_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------
FA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the computation of x above the next wait. ptxas moves register arithmetic freely across wgmma.wait_group, but
// not across memory operations: a predicated store that never executes, because x is never negative, pins it.
FA_DEVICE void pin_above_wait(uint32 address, float x) {
  asm volatile("{.reg .pred p; setp.lt.f32 p, %1, 0f00000000; @p st.shared.f32 [%0], %1;}" ::"r"(address), "f"(x)
               : "memory");
}

// ---- registers and barriers between warps --------------------------------------------------------------------------
template <int REGISTERS>
FA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FA_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
FA_DEVICE void block_sync() { __syncthreads(); }
FA_DEVICE void warp_sync() { __syncwarp(); }
FA_DEVICE void named_sync(int barrier, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
FA_DEVICE void named_arrive(int barrier, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- data ----------------------------------------------------------------------------------------------------------
FA_DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }
FA_DEVICE float positive_infinity() { return __uint_as_float(0x7f800000u); }
// Negative if one of the two is: their bits, joined.
FA_DEVICE float joined(float a, float b) { return __uint_as_float(__float_as_uint(a) | __float_as_uint(b)); }
FA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
FA_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
FA_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
FA_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FA_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FA_DEVICE uint32 pack(Bf16, float low, float high) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
FA_DEVICE uint32 pack(F16, float low, float high) {
  uint32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// The numbers of a pair.
FA_DEVICE float low(Bf16, uint32 packed) { return __uint_as_float(packed << 16); }
FA_DEVICE float high(Bf16, uint32 packed) { return __uint_as_float(packed & 0xffff0000u); }
FA_DEVICE float low(F16, uint32 packed) {
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(packed));
  return x;
}
FA_DEVICE float high(F16, uint32 packed) {
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(packed));
  return x;
}
// Two e4m3 numbers as a pair of fp16, which holds them exactly.
FA_DEVICE uint32 pair_of_e4m3(uint32 bytes) {
  uint32 packed;
  asm("{.reg .b16 b; cvt.u16.u32 b, %1; cvt.rn.f16x2.e4m3x2 %0, b;}" : "=r"(packed) : "r"(bytes));
  return packed;
}
// Stores four 8 x 8 matrices of 16-bit elements; lanes 8 m .. 8 m + 7 give the addresses of the rows of matrix m.
FA_DEVICE void store_matrices(uint32 row, uint32 m0, uint32 m1, uint32 m2, uint32 m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}
struct alignas(16) Int4 {
  int x, y, z, w;
};
FA_DEVICE void store_shared(uint32 to, Int4 v) {  // 16 bytes, aligned
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
FA_DEVICE Int4 load_shared(uint32 from) {  // volatile: read again rather than kept in registers
  Int4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
FA_DEVICE void store_shared_float(uint32 to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
FA_DEVICE float load_shared_float(uint32 from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}
struct alignas(8) Float2 {
  float x, y;
};
FA_DEVICE Float2 load_shared_pair(uint32 from) {  // 8 bytes, aligned; volatile as above
  Float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
struct alignas(16) Float4 {
  float x, y, z, w;
};
FA_DEVICE void store_shared_floats(uint32 to, Float4 v) {  // 16 bytes, aligned
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
FA_DEVICE Float4 load_shared_floats(uint32 from) {  // 16 bytes, aligned; volatile as above
  Float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
struct alignas(8) Packed4 {  // 16-bit numbers in pairs
  uint32 pair[2];
};
struct alignas(16) Packed8 {
  uint32 pair[4];
};
// Adds to four numbers in global memory, each atomically but not the four together, in no fixed order.
FA_DEVICE void add_global(float* to, Float4 v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
// Takes the next number of a counter in global memory.
FA_DEVICE int32 draw(int32* counter) { return atomicAdd(counter, 1); }
template <class T>
FA_DEVICE T load_global(T const* from) {
  return *from;
}
template <class T>
FA_DEVICE void store_global(T* to, T x) {
  *to = x;
}

}  // namespace fa::sm90
#endif

#ifdef FA_WATCHDOG
#include "watchdog.cuh"
#endif

namespace fa::sm90 {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// Shared memory holds a [ROWS, columns] tile as chunks of 64 columns (128 bytes). Chunk c begins at c * ROWS * 128,
// 1024-byte aligned; inside, rows are 128 bytes apart and the 16-byte pieces of row r are permuted by XOR with r % 8.
constexpr int kChunkColumns = 64, kRowBytes = 128;

// Low word of a wgmma descriptor: start address and leading offset, both in units of 16 bytes. The address has 14 bits:
// in a cluster, shared addresses carry the rank of their block further up, where the leading offset lies.
FA_DEVICE uint32 start_address(uint32 address) { return address >> 4 & 0x3fff; }
// K-major: the summed dimension lies along the 128-byte rows (Q, K). The leading offset is not used.
FA_DEVICE uint32 k_major(uint32 address) { return start_address(address) | (1u << 16); }
// M- or N-major: the other dimension lies along the rows (V): its next 64 columns are one chunk further.
FA_DEVICE uint32 n_major(uint32 address, int rows) { return start_address(address) | ((rows * kRowBytes >> 4) << 16); }

// Increment of a descriptor for k columns (K-major, chunks of `rows` rows) or k rows (N-major); k is a multiple of 16.
FA_DEVICE constexpr uint32 k_major_step(int rows, int k) {
  return (k / kChunkColumns * rows * kRowBytes + k % kChunkColumns * 2) >> 4;
}
FA_DEVICE constexpr uint32 n_major_step(int k) { return k * kRowBytes >> 4; }

}  // namespace fa::sm90
