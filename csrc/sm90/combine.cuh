// combine: out and lse of every row from the partial results of its splits.
//
// One warp for each row of q and query head. A split whose lse is -inf has no keys of that row, and its out may hold
// anything.
#pragma once
#include "../common/softmax.h"
#include "decode.h"

namespace fa::sm90 {

constexpr int kCombineThreads = 128;

struct Weights {             // of the splits lane, lane + 32, ..., which this lane holds
  float of[kMostSplits / 32];
  float lse;                 // of all splits together
};

FA_DEVICE Weights weigh_splits(DecodeParams const& p, int64 output, int64 outputs) {
  int const lane = thread_index() % 32;
  Parts const* const partial = reinterpret_cast<Parts const*>(p.partial_lse);
  Parts lse[kMostSplits / 32], top = {negative_infinity(), negative_infinity()};  // both parts of the largest lse
  float total = 0;
  FA_UNROLL
  for (int i = 0; i < kMostSplits / 32; ++i) {
    int const split = lane + 32 * i;
    lse[i] = {negative_infinity(), 0.f};
    if (split < p.splits) lse[i] = load_global(partial + split * outputs + output);
    top.high = maximum(top.high, lse[i].high);
  }
  FA_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) top.high = maximum(top.high, shuffle_xor(top.high, mask));
  FA_UNROLL
  for (int i = 0; i < kMostSplits / 32; ++i) {
    if (lse[i].high == top.high) top.low = maximum(top.low, lse[i].low);
  }
  FA_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) top.low = maximum(top.low, shuffle_xor(top.low, mask));
  Weights weights;
  FA_UNROLL
  for (int i = 0; i < kMostSplits / 32; ++i) {
    float const difference = (lse[i].high - top.high) + (lse[i].low - top.low);
    weights.of[i] = lse[i].high == negative_infinity() ? 0.f : exp2_approx(difference * kLog2E);
    total += weights.of[i];
  }
  FA_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  float const small = multiply_add(log2_approx(total), kLn2, top.low);
  weights.lse = total > 0.f ? top.high + small : negative_infinity();
  FA_UNROLL
  for (int i = 0; i < kMostSplits / 32; ++i) weights.of[i] = total > 0.f ? weights.of[i] / total : 0.f;
  return weights;
}

// Columns 4 piece .. 4 piece + 3 of a row, all lanes together (each its own piece).
template <class T>
FA_DEVICE void combine_columns(DecodeParams const& p, Weights const& weights, int64 output, int64 outputs, int piece) {
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  bool const exists = 4 * piece < p.head_dim_v;
  FA_UNROLL
  for (int i = 0; i < kMostSplits / 32; ++i) {
    int const left = smaller(static_cast<int>(p.splits) - 32 * i, 32);
    for (int lane = 0; lane < left; ++lane) {
      float const weight = shuffle(weights.of[i], lane);
      if (weight == 0.f || !exists) continue;
      int64 const from = ((32 * i + lane) * outputs + output) * p.head_dim_v + 4 * piece;
      Float4 const x = load_global(reinterpret_cast<Float4 const*>(p.partial_out + from));
      sum[0] = multiply_add(weight, x.x, sum[0]);
      sum[1] = multiply_add(weight, x.y, sum[1]);
      sum[2] = multiply_add(weight, x.z, sum[2]);
      sum[3] = multiply_add(weight, x.w, sum[3]);
    }
  }
  if (!exists) return;
  uint16* const to = static_cast<uint16*>(p.out) + output * p.head_dim_v + 4 * piece;
  store_global(reinterpret_cast<Packed4*>(to), Packed4{{pack(T{}, sum[0], sum[1]), pack(T{}, sum[2], sum[3])}});
}

template <class T>
FA_DEVICE void combine(DecodeParams const& p) {
  int64 const outputs = rows_of(p) * p.heads_q;
  int64 const output = int64{block_index()} * (kCombineThreads / 32) + warp_uniform(thread_index() / 32);
  if (output >= outputs) return;
  wait_for_kernel_before();
  Weights const weights = weigh_splits(p, output, outputs);
  int const lane = thread_index() % 32;
  for (int first = 0; 4 * first < p.head_dim_v; first += 32) {
    combine_columns<T>(p, weights, output, outputs, first + lane);
  }
  if (lane == 0) store_global(p.lse + lse_index(p, output / p.heads_q, output % p.heads_q), weights.lse);
}

template <class T>
FA_GLOBAL(kCombineThreads)
combine_kernel(FA_KERNEL_ARGUMENT DecodeParams params) {
  combine<T>(params);
}

}  // namespace fa::sm90
