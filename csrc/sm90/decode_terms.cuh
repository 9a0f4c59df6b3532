// ALiBi and bias in the decode kernels whose rows threads copy (decode_gathered.cuh). As terms.cuh does it, they finish
// the scores before the softmax: softmax and lse then have a scale of 1.
#pragma once
#include "decode.h"
#include "fragment.cuh"

namespace fa::sm90 {

// Scores of positions that are not finished have this factor in the softmax.
FA_DEVICE float softmax_scale(DecodeParams const& p) { return has_terms(p) ? 1.f : static_cast<float>(p.score_scale); }

template <class T>
FA_DEVICE float bias_of(DecodeParams const& p, Work const& work, int head, int position, int key) {
  PairStrides const& s = p.bias_strides;
  int64 const at = work.sequence * s.batch + head * s.head + position * s.query + key * s.key;
  if (p.bias_is_float) return load_global(static_cast<float const*>(p.bias) + at);
  return low(T{}, uint32{load_global(static_cast<uint16 const*>(p.bias) + at)});
}

// Whether a bias leaves a key of the sequence to some query of the tile; usually the first one asked.
template <class T>
FA_DEVICE bool is_kept_by_bias(DecodeParams const& p, Work const& work, int key) {
  Positions const rows = positions_of(p, work);
  for (int position = rows.begin; position < rows.end; ++position) {
    for (int head = work.first_head; head < work.end_head; ++head) {
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

// Finishes the scores of a thread's upper row (0) or lower row (1), which may not exist. `column` is its first key.
template <class T, int N>
FA_DEVICE void add_terms_to_row(DecodeParams const& p, Work const& work, float (&scores)[N], int lower, int head,
                                int position, int column) {
  bool const exists = position < work.s_q && head < work.end_head;
  float const scale = static_cast<float>(p.score_scale);
  float const slope =
      exists && p.alibi_slopes ? load_global(p.alibi_slopes + work.sequence * p.slopes_batch_stride + head) : 0.f;
  int const place = exists && p.alibi_slopes ? place_of_new(p, work, position) : 0, before = work.s_kv - work.s_q;
  FA_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    float& score = scores[i / 2 * 4 + 2 * lower + i % 2];
    int const key = smaller(column + i / 2 * 8 + i % 2, work.s_kv - 1);  // those past the end are masked afterwards
    score *= scale;
    if (exists && p.bias) {
      float const bias = bias_of<T>(p, work, head, position, key);
      score = bias == negative_infinity() ? bias : score + bias;
    }
    if (p.alibi_slopes) {
      int const distance = (p.depths && key >= before ? place_of_new(p, work, key - before) : key) - place;
      score = multiply_add(-slope, static_cast<float>(larger(distance, -distance)), score);
    }
  }
}

}  // namespace fa::sm90
