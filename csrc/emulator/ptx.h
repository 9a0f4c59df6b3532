// The names of sm90/ptx.cuh on the emulated machine, which forward to machine.h.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>

#include "machine.h"

#define FA_DEVICE inline
#define FA_GLOBAL(THREADS) void
#define FA_KERNEL_ARGUMENT const
#define FA_MODULE_VARIABLE static
#define FA_UNROLL

namespace fa::sm90 {

struct Bf16 {};
struct F16 {};
using TensorMap = emu::Map;
using emu::Site;

inline int thread_index() { return emu::thread_index(); }
inline int block_index() { return emu::block_index(); }
inline int block_count() { return emu::block_count(); }
inline int warp_uniform(int x) { return static_cast<int>(emu::meet("shfl", static_cast<uint32>(x)).of_lane[0][0]); }
inline bool elect_one() {
  emu::meet("elect");
  return thread_index() % 32 == 0;
}
inline uint32 shared_base() { return emu::kSharedBase; }
inline uint32 recomputed(uint32 x) { return x; }

inline void mbarrier_begin(uint32 barrier, uint32 arrivals) { emu::mbarrier_init(barrier, arrivals); }
inline void mbarrier_fence_init(Site site = Site::here("mbarrier_fence_init")) {
  if (!site.is_left_out()) emu::mbarrier_fence_init();
}
inline void mbarrier_arrive(uint32 barrier, Site site = Site::here("mbarrier_arrive")) {
  if (!site.is_left_out()) emu::mbarrier_arrive(barrier, 0);
}
inline void mbarrier_expect(uint32 barrier, uint32 bytes, Site site = Site::here("mbarrier_expect")) {
  if (!site.is_left_out()) emu::mbarrier_arrive(barrier, bytes);
}
#ifndef FA_WATCHDOG
inline void mbarrier_init(uint32 barrier, uint32 arrivals) { mbarrier_begin(barrier, arrivals); }
inline void mbarrier_wait(uint32 barrier, uint32 parity, Site site = Site::here("mbarrier_wait")) {
  if (!site.is_left_out()) emu::mbarrier_wait(barrier, parity);
}
#else
inline bool mbarrier_try_wait(uint32 barrier, uint32 parity) { return emu::mbarrier_try_wait(barrier, parity); }
inline uint64 watch_time() { return emu::rounds(); }
inline void end_in_sentence(char const* role, int number, int block, int barrier, uint32 parity) {
  char text[200];
  std::snprintf(text, sizeof(text), FA_WATCHDOG_SENTENCE, role, number, block, barrier, parity);
  emu::error(text);
}
#endif

constexpr uint64 kEvictFirst = 0, kEvictLast = 0;
inline void tma_prefetch(const TensorMap*) {}
inline void tma_load(uint32 to, const TensorMap* map, uint32 barrier, int column, int row, int head, int batch,
                     uint64) {
  emu::tma_load(to, map, barrier, {column, row, head, batch});
}
inline void bulk_load(uint32 to, void const* from, uint32 bytes, uint32 barrier) {
  emu::bulk_load(to, from, bytes, barrier);
}
inline void tma_store(const TensorMap* map, uint32 from, int column, int row, int head, int batch) {
  emu::tma_store(map, from, {column, row, head, batch});
}
inline void tma_store_commit(Site site = Site::here("tma_store_commit")) {
  if (!site.is_left_out()) emu::tma_store_commit();
}
inline void tma_store_wait_read(Site site = Site::here("tma_store_wait_read")) {
  if (!site.is_left_out()) emu::tma_store_wait(true, 0);
}
inline void tma_store_wait(Site site = Site::here("tma_store_wait")) {
  if (!site.is_left_out()) emu::tma_store_wait(false, 0);
}
template <int GROUPS>
void tma_store_wait_read_but(Site site = Site::here("tma_store_wait_read_but")) {
  if (!site.is_left_out()) emu::tma_store_wait(true, GROUPS);
}
inline void bulk_add(float* to, uint32 from, uint32 bytes) { emu::bulk_add(to, from, bytes); }
inline void fence_proxy_async(Site site = Site::here("fence_proxy_async")) {
  if (!site.is_left_out()) emu::fence_proxy_async();
}

inline void let_next_begin() {}
inline void wait_for_kernel_before(Site site = Site::here("wait_for_kernel_before")) {
  if (!site.is_left_out()) emu::wait_for_kernel_before();
}
template <int BYTES>
void copy_async(uint32 to, void const* from, bool exists) {
  emu::copy_async(to, from, BYTES, exists);
}
inline void copies_commit(Site site = Site::here("copies_commit")) {
  if (!site.is_left_out()) emu::copies_commit();
}
template <int GROUPS>
void copies_wait(Site site = Site::here("copies_wait")) {
  if (!site.is_left_out()) emu::copies_wait(GROUPS);
}

inline bool is_half(Bf16) { return false; }
inline bool is_half(F16) { return true; }
inline void wgmma_fence(Site site = Site::here("wgmma_fence")) {
  if (!site.is_left_out()) emu::wgmma_fence();
}
inline void wgmma_commit(Site site = Site::here("wgmma_commit")) {
  if (!site.is_left_out()) emu::wgmma_commit();
}
template <int TRANSPOSE_A, int TRANSPOSE_B, class T, int R>
void wgmma_ss(T t, float (&d)[R], uint32 a, uint32 b, int accumulate) {
  emu::wgmma_issue({2 * R, is_half(t), false, TRANSPOSE_A != 0, TRANSPOSE_B != 0, accumulate != 0, a, b}, d, {});
}
// The registers of A by reference: the machine checks that they do not change until the wait.
template <int TRANSPOSE_B, class T, int R>
void wgmma_rs(T t, float (&d)[R], uint32 const& a0, uint32 const& a1, uint32 const& a2, uint32 const& a3, uint32 b,
              int accumulate) {
  emu::wgmma_issue({2 * R, is_half(t), true, false, TRANSPOSE_B != 0, accumulate != 0, 0, b}, d, {&a0, &a1, &a2, &a3});
}
template <int GROUPS, int R>
void wgmma_wait(float (&)[R], Site site = Site::here("wgmma_wait")) {
  if (!site.is_left_out()) emu::wgmma_wait(GROUPS);
}
inline void pin_above_wait(uint32, float) {}

template <int REGISTERS>
void take_registers() {
  emu::set_registers(REGISTERS, true);
}
template <int REGISTERS>
void give_registers(Site site = Site::here("give_registers")) {
  if (!site.is_left_out()) emu::set_registers(REGISTERS, false);
}
inline void warp_sync(Site site = Site::here("warp_sync")) {
  if (!site.is_left_out()) emu::sync_warp("syncwarp");
}
inline void named_sync(int barrier, int threads, Site site = Site::here("named_sync")) {
  if (!site.is_left_out()) emu::named_barrier(barrier, threads, true);
}
inline void named_arrive(int barrier, int threads, Site site = Site::here("named_arrive")) {
  if (!site.is_left_out()) emu::named_barrier(barrier, threads, false);
}
inline void block_sync(Site site = Site::here("block_sync")) {
  if (!site.is_left_out()) emu::named_barrier(0, 0, true);
}

inline float negative_infinity() { return -INFINITY; }
inline float positive_infinity() { return INFINITY; }
inline float joined(float a, float b) { return std::fmin(a, b); }
inline float shuffle(float x, int lane) {
  uint32 bits;
  std::memcpy(&bits, &x, 4);
  bits = static_cast<uint32>(emu::meet("shfl", bits).of_lane[lane][0]);
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, (thread_index() % 32) ^ mask); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1.f / x; }
inline uint32 pack(Bf16, float low, float high) { return emu::to_bf16(low) | uint32{emu::to_bf16(high)} << 16; }
inline uint32 pack(F16, float low, float high) { return emu::to_half(low) | uint32{emu::to_half(high)} << 16; }

inline float low(Bf16, uint32 packed) { return emu::decoder(false)[packed & 0xffff]; }
inline float high(Bf16, uint32 packed) { return emu::decoder(false)[packed >> 16]; }
inline float low(F16, uint32 packed) { return emu::decoder(true)[packed & 0xffff]; }
inline float high(F16, uint32 packed) { return emu::decoder(true)[packed >> 16]; }
inline uint32 pair_of_e4m3(uint32 bytes) {
  return pack(F16{}, emu::e4m3_value(bytes & 0xff), emu::e4m3_value(bytes >> 8 & 0xff));
}

inline void store_matrices(uint32 row, uint32 m0, uint32 m1, uint32 m2, uint32 m3) {
  emu::Collected const& all = emu::meet("stmatrix", row, m0, m1, m2, m3);
  int const lane = thread_index() % 32;  // writes row lane % 8 of matrix lane / 8, which four lanes hold in pairs
  uint32 pieces[4];
  for (int i = 0; i < 4; ++i) pieces[i] = static_cast<uint32>(all.of_lane[lane % 8 * 4 + i][1 + lane / 8]);
  emu::store_shared(row, pieces, 16);
}
struct alignas(16) Int4 {
  int x, y, z, w;
};
inline void store_shared(uint32 to, Int4 v) { emu::store_shared(to, &v, 16); }
inline Int4 load_shared(uint32 from) {
  Int4 v;
  emu::load_shared(from, &v, 16);
  return v;
}
inline void store_shared_float(uint32 to, float x) { emu::store_shared(to, &x, 4); }
inline float load_shared_float(uint32 from) {
  float x;
  emu::load_shared(from, &x, 4);
  return x;
}
struct alignas(8) Float2 {
  float x, y;
};
inline Float2 load_shared_pair(uint32 from) {
  Float2 v;
  emu::load_shared(from, &v, 8);
  return v;
}
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Packed4 {
  uint32 pair[2];
};
inline void store_shared_floats(uint32 to, Float4 v) { emu::store_shared(to, &v, 16); }
inline Float4 load_shared_floats(uint32 from) {
  Float4 v;
  emu::load_shared(from, &v, 16);
  return v;
}
struct alignas(16) Packed8 {
  uint32 pair[4];
};
inline void add_global(float* to, Float4 v) {
  if (!emu::may_add(to, 16)) return;
  to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
}
inline int32 draw(int32* counter) { return emu::may_add(counter, sizeof(int32)) ? (*counter)++ : 0; }
template <class T>
T load_global(T const* from) {
  return emu::may_load(from, sizeof(T)) ? *from : T{};
}
template <class T>
void store_global(T* to, T x) {
  if (emu::may_store(to, sizeof(T))) *to = x;
}

}  // namespace fa::sm90
