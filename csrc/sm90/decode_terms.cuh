// ALiBi and bias in the decode kernels whose rows threads copy (decode_gathered.cuh). As terms.cuh does it, they finish
// the scores before the softmax: softmax and lse then have a scale of 1.
#pragma once
#include "decode.h"
#include "fragment.cuh"

namespace fa::sm90 {

// Scores of positions that are not finished have this factor in the softmax.
FA_DEVICE float softmax_scale(DecodeParams const& p) { return has_terms(p) ? 1.f : static_cast<float>(p.score_scale); }

FA_DEVICE int64 bias_row(DecodeParams const& p, Work const& work, int head, int position) {
  return work.sequence * p.bias_strides.batch + head * p.bias_strides.head + position * p.bias_strides.query;
}

template <class T>
FA_DEVICE float as_float(T, float x) {
  return x;
}

template <class T>
FA_DEVICE float as_float(T, uint16 x) {
  return low(T{}, uint32{x});
}

template <class T>
FA_DEVICE float bias_of(DecodeParams const& p, Work const& work, int head, int position, int key) {
  int64 const at = bias_row(p, work, head, position) + key * p.bias_strides.key;
  if (p.bias_is_float) return load_global(static_cast<float const*>(p.bias) + at);
  return as_float(T{}, load_global(static_cast<uint16 const*>(p.bias) + at));
}

// Whether a bias leaves a key of the sequence to some query of the tile whose band keeps it; usually the first one asked.
template <class T>
FA_DEVICE bool is_kept_by_bias(DecodeParams const& p, Work const& work, int key) {
  Positions const rows = positions_of(p, work);
  for (int position = rows.begin; position < rows.end; ++position) {
    bool const is_kept = p.tree || contains(tile_range(band_of(p, work), position, position + 1), key);
    for (int head = work.first_head; is_kept && head < work.end_head; ++head) {
      if (bias_of<T>(p, work, head, position, key) != negative_infinity()) return true;
    }
  }
  return false;
}

// The position of a new key, or of the query `index`, from which ALiBi counts: in a tree its depth decides.
FA_DEVICE int place_of_new(DecodeParams const& p, Work const& work, int index) {
  int const before = work.s_kv - work.s_q;
  return before + (p.depths ? load_global(p.depths + work.first_q + index) : index);
}

// Scores of a thread's upper row (0) or lower row (1), scaled or capped, plus the bias of row `first` of the biases.
// Keys past the end are masked afterwards, so any bias of the row will do for them.
template <class T, class X, int N>
FA_DEVICE void add_bias_to_row(float (&scores)[N], X const* first, int64 key_stride, int lower, int column, int last) {
  FA_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    float& score = scores[i / 2 * 4 + 2 * lower + i % 2];
    float const bias = as_float(T{}, load_global(first + smaller(column + i / 2 * 8 + i % 2, last) * key_stride));
    score = bias == negative_infinity() ? bias : score + bias;
  }
}

// Finishes those scores, of a row that may not exist. `column` is its first key.
template <class T, int N>
FA_DEVICE void add_terms_to_row(DecodeParams const& p, Work const& work, float (&scores)[N], int lower, int head,
                                int position, int column) {
  float const scale = static_cast<float>(p.score_scale);
  FA_UNROLL
  for (int i = 0; i < N / 2; ++i) scores[i / 2 * 4 + 2 * lower + i % 2] *= scale;
  if (position >= work.s_q || head >= work.end_head) return;
  if (p.bias) {
    int64 const at = bias_row(p, work, head, position), step = p.bias_strides.key;
    int const last = work.s_kv - 1;
    if (p.bias_is_float) {
      add_bias_to_row<T>(scores, static_cast<float const*>(p.bias) + at, step, lower, column, last);
    } else {
      add_bias_to_row<T>(scores, static_cast<uint16 const*>(p.bias) + at, step, lower, column, last);
    }
  }
  if (!p.alibi_slopes) return;
  float const slope = load_global(p.alibi_slopes + work.sequence * p.slopes_batch_stride + head);
  int const before = work.s_kv - work.s_q, place = place_of_new(p, work, position);
  FA_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    float& score = scores[i / 2 * 4 + 2 * lower + i % 2];
    int const key = column + i / 2 * 8 + i % 2;
    bool const is_in_tree = p.depths && key >= before && key < work.s_kv;
    int const distance = (is_in_tree ? place_of_new(p, work, key - before) : key) - place;
    score = multiply_add(-slope, static_cast<float>(larger(distance, -distance)), score);
  }
}

}  // namespace fa::sm90
