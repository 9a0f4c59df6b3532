// The backward pass on a fragment of scores: weights from lse, masks, and the gradient of the scores.
//
// With both parts of lse known, exp((score - lse) - lse_low) is the weight itself. The product of score and scale is
// not rounded before the subtraction, because finish_row does not round that of the largest score. Fragments have the
// layout of softmax.h. In backward_dkdv they are transposed: rows are keys, columns are queries.
#pragma once
#include "softmax.h"

namespace fa {

struct ScoreScales {  // of BackwardParams
  float score, cap;
};

FA_DEVICE float weight_of(float x, float scale, float lse, float low_log2) {
  return exp2_approx(multiply_add(multiply_add(x, scale, -lse), kLog2E, -low_log2));
}

// The weight of a score. With softcap no score exceeds the softcap in magnitude (abi.py bounds it), so one float, `lse`
// in base 2, is exact enough; two would spill. `score` becomes the weight times the slope of softcap, the factor
// between the gradient of the capped score and that of the raw one.
template <bool SOFTCAP>
FA_DEVICE float weigh(float& score, ScoreScales const& scales, float lse, float low_log2) {
  if (!SOFTCAP) return score = weight_of(score, scales.score, lse, low_log2);
  float const t = capped(score, scales.cap);
  float const p = exp2_approx(multiply_add(t, scales.score * kLog2E, -lse));
  score = p * multiply_add(-t, t, 1.f);
  return p;
}

// The columns that a row keeps; none for a row past the end.
FA_DEVICE Range kept_columns(Band const& band, int row) {
  return row < band.s_q ? tile_range(band, row, row + 1) : Range{0, 0};
}

// Sets weights of pairs that are not kept to 0; they may be infinite, since lse does not include their scores.
// `row` and `column` are this thread's first; `band` is transposed if the fragment is.
template <int N>
FA_DEVICE void mask_weights(float (&weights)[N], Band const& band, int row, int column) {
  Range const kept[2] = {kept_columns(band, row), kept_columns(band, row + 8)};
  FA_UNROLL
  for (int i = 0; i < N; ++i) {
    if (!contains(kept[i / 2 % 2], column + i / 4 * 8 + i % 2)) weights[i] = 0.f;
  }
}

// mask_weights for weights in pairs of 16-bit numbers.
template <int N>
FA_DEVICE void mask_packed(uint32 (&weights)[N], Band const& band, int row, int column) {
  Range const kept[2] = {kept_columns(band, row), kept_columns(band, row + 8)};
  FA_UNROLL
  for (int i = 0; i < N; ++i) {
    int const first = column + i / 2 * 8;
    if (!contains(kept[i % 2], first)) weights[i] &= 0xffff0000u;
    if (!contains(kept[i % 2], first + 1)) weights[i] &= 0x0000ffffu;
  }
}

}  // namespace fa
