// Online softmax on the fragment of scores that one thread holds, in base 2.
//
// A thread of a warpgroup holds N values of an accumulator [64, 2 N]: element e of group i (4 i + e) belongs to its row
// e / 2 (8 rows apart) and to column 8 i + e % 2 past its first. Four neighbouring threads share a row. It uses the
// functions of sm90/ptx.cuh, so it compiles for the device and for the emulator.
#pragma once
#include "mask.h"
#include "../sm90/ptx.cuh"

namespace fa {
using namespace sm90;

struct RowState {  // of a thread's two rows
  float max[2];  // largest score so far, before its scale
  float sum[2];  // of 2^(scale_log2 * (score - max)) over this thread's columns
};

// Scores become tanh(cap_scale * score), by an exponential and a reciprocal: the error of tanh.approx, 2^-11, would be
// multiplied by softcap.
FA_DEVICE float capped(float score, float cap_scale) {
  float const e = exp2_approx(score * (2 * kLog2E * cap_scale));
  return multiply_add(-2.f, reciprocal_approx(e + 1.f), 1.f);
}

template <int N>
FA_DEVICE void cap_scores(float (&scores)[N], float cap_scale) {
  FA_UNROLL
  for (int i = 0; i < N; ++i) scores[i] = capped(scores[i], cap_scale);
}

// Sets the scores of keys that a thread's two rows do not keep to -inf. `column` is this thread's first.
template <int N>
FA_DEVICE void mask_scores(float (&scores)[N], Range const (&kept)[2], int column) {
  FA_UNROLL
  for (int i = 0; i < N; ++i) {
    if (!contains(kept[i / 2 % 2], column + i / 4 * 8 + i % 2)) scores[i] = negative_infinity();
  }
}

// The same for row `row` and the one 8 below it.
template <int N>
FA_DEVICE void mask_scores(float (&scores)[N], Band const& band, int row, int column) {
  Range const kept[2] = {tile_range(band, row, row + 1), tile_range(band, row + 8, row + 9)};
  mask_scores(scores, kept, column);
}

// Turns scores into weights 2^(scale_log2 * (score - max)) and updates `state`. The difference is taken before the
// scaling, so that an offset shared by the scores, however large, is not rounded into the weights. `rescale` becomes
// the factor on all earlier sums.
template <bool FIRST, int N>
FA_DEVICE void softmax_step(float (&scores)[N], RowState& state, float (&rescale)[2], float scale_log2) {
  float largest[2] = {FIRST ? scores[0] : state.max[0], FIRST ? scores[2] : state.max[1]};
  FA_UNROLL
  for (int i = 0; i < N; ++i) largest[i / 2 % 2] = maximum(largest[i / 2 % 2], scores[i]);
  float shift[2];
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    largest[r] = maximum(largest[r], shuffle_xor(largest[r], 1));
    largest[r] = maximum(largest[r], shuffle_xor(largest[r], 2));
    shift[r] = largest[r] == negative_infinity() ? 0.f : largest[r];  // no key kept so far
    rescale[r] = FIRST ? 1.f : exp2_approx((state.max[r] - shift[r]) * scale_log2);
    state.max[r] = largest[r];
    state.sum[r] = FIRST ? 0.f : state.sum[r] * rescale[r];
  }
  FA_UNROLL
  for (int i = 0; i < N; ++i) {
    scores[i] = exp2_approx((scores[i] - shift[i / 2 % 2]) * scale_log2);
    state.sum[i / 2 % 2] += scores[i];
  }
}

// A sum in two parts: the nearest float, and its rounding error.
struct alignas(8) Parts {
  float high, low;
};

FA_DEVICE Parts in_parts(float large, float small) {
  float const high = large + small;
  return {high, (large - high) + small};
}

// The results of a finished row: the factor that normalises its output, and its natural log-sum-exp in two parts, since
// one float would round away the logarithm of the sum beside scores of 1e8. `max` lacks the factor `scale`, which is
// positive; `sink` is a further score, -inf if there is none. A row without keys gives 0 and the sink.
struct FinishedRow {
  float factor;
  Parts lse;
};

FA_DEVICE FinishedRow finish_row(float max, float sum, float scale, float sink) {
  if (max == negative_infinity() && sink == negative_infinity()) return {0.f, {sink, 0.f}};
  float const of_keys = max * scale;
  float const rest = max == negative_infinity() ? 0.f : multiply_add(max, scale, -of_keys);  // of the rounded product
  bool const is_sink = sink > of_keys;
  float const shrink = is_sink ? exp2_approx((of_keys - sink + rest) * kLog2E) : 1.f;
  float const total = multiply_add(sum, shrink, is_sink ? 1.f : exp2_approx((sink - of_keys - rest) * kLog2E));
  float const small = multiply_add(log2_approx(total), kLn2, is_sink ? 0.f : rest);
  return {shrink / total, in_parts(is_sink ? sink : of_keys, small)};
}

}  // namespace fa
