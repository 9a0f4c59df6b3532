// Terms that are looked up pair by pair: bias, ALiBi, boolean masks, segments and dropout, on the fragment of scores
// that one thread holds. Kernels with terms ask at run time which there are, so that one serves every combination.
//
// They finish scores before the softmax: the product with the scale is rounded here, and softmax and lse then have a
// scale of 1. Forward and backward kernels compute the same numbers in the same order, so that weights add up to 1.
#pragma once
#include "../common/gradient.h"
#include "../common/philox.h"
#include "fragment.cuh"

namespace fa::sm90 {

constexpr int kSegmentRows = 64;  // rows of each entry of ranges_q and ranges_kv

struct NoDropout {  // of attend in consumer.cuh, where there are no terms
  static constexpr bool HAS_TERMS = false;
  template <int N>
  FA_DEVICE void operator()(float (&)[N], int) const {}
};

// This thread's part of a fragment: rows are queries, or with TRANSPOSED keys.
template <bool TRANSPOSED>
struct Pairs {
  int first_row, first_column;
  FA_DEVICE int row(int e) const { return first_row + e / 2 % 2 * 8; }
  FA_DEVICE int column(int e) const { return first_column + e / 4 * 8 + e % 2; }
  FA_DEVICE int query(int e) const { return TRANSPOSED ? column(e) : row(e); }
  FA_DEVICE int key(int e) const { return TRANSPOSED ? row(e) : column(e); }
};

// ---- blocks ----------------------------------------------------------------------------------------------------------

// blocks_of, without blocks of other segments. `ranges` are those of the tile's rows; null without segments.
template <int ROWS, int COLUMNS>
FA_DEVICE TileBlocks blocks_of(Band const& band, int row, int32 const* ranges) {
  int const end_row = smaller(row + ROWS, band.s_q);
  Range kept = tile_range(band, row, end_row), full = full_range(band, row, end_row);
  Range some = {kUnbounded, 0};
  for (int entry = row / kSegmentRows; ranges && entry * kSegmentRows < end_row; ++entry) {
    Int4 const found = load_global(reinterpret_cast<Int4 const*>(ranges) + entry);
    some = {smaller(some.begin, found.x), larger(some.end, found.w)};
    full = {larger(full.begin, found.y), smaller(full.end, found.z)};
  }
  if (ranges) kept = {larger(kept.begin, some.begin), smaller(kept.end, some.end)};
  if (kept.begin >= kept.end) return {{0, 0}, {0, 0}};
  return blocks_in<COLUMNS>(kept, full);
}

// The part of ranges_q or ranges_kv of a batch entry with `rows` rows.
template <class Params>
FA_DEVICE int32 const* ranges_of(Params const& p, int32 const* ranges, int rows, int batch) {
  bool const is_shared = p.numbers.ids_q_batch_stride == 0 && p.numbers.ids_kv_batch_stride == 0;
  if (!ranges || is_shared) return ranges;
  return ranges + int64{batch} * ((rows + kSegmentRows - 1) / kSegmentRows) * 4;
}

// ---- scores ----------------------------------------------------------------------------------------------------------

// Calls visit(e, x) with the number of every pair of the fragment. Past the end it is that of the last row, so that
// nothing outside is read.
template <bool TRANSPOSED, int N, class X, class Visit>
FA_DEVICE void visit_pairs(X const* of_head, PairStrides const& s, Tile const& tile, Pairs<TRANSPOSED> const& at,
                           Visit const& visit) {
  int const last_row = (TRANSPOSED ? tile.s_kv : tile.s_q) - 1, last_column = (TRANSPOSED ? tile.s_q : tile.s_kv) - 1;
  int const row_stride = static_cast<int>(TRANSPOSED ? s.key : s.query);
  int const column_stride = static_cast<int>(TRANSPOSED ? s.query : s.key);
  X const* const rows[2] = {of_head + int64{smaller(at.row(0), last_row)} * row_stride,
                            of_head + int64{smaller(at.row(2), last_row)} * row_stride};
  FA_UNROLL
  for (int e = 0; e < N; ++e) {
    visit(e, load_global(rows[e / 2 % 2] + int64{smaller(at.column(e), last_column)} * column_stride));
  }
}

FA_DEVICE int64 head_offset(PairStrides const& s, Tile const& tile, int head) {
  return tile.batch * s.batch + head * s.head;
}

// Scores times their scale, or capped; where `slopes` are wanted they become the factor between the gradients of the
// two, less the scale, in pairs of 16-bit numbers.
template <class T, bool SLOPES, int N, int M, class Params>
FA_DEVICE void scale_scores(float (&x)[N], uint32 (&slopes)[M], Params const& p) {
  float const scale = static_cast<float>(p.score_scale), cap = static_cast<float>(p.cap_scale);
  if (p.has_softcap) {
    FA_UNROLL
    for (int e = 0; e < N; e += 2) {
      float const a = capped(x[e], cap), b = capped(x[e + 1], cap);
      x[e] = a * scale, x[e + 1] = b * scale;
      if (SLOPES) slopes[e / 2] = pack(T{}, multiply_add(-a, a, 1.f), multiply_add(-b, b, 1.f));
    }
    return;
  }
  FA_UNROLL
  for (int e = 0; e < N; ++e) x[e] *= scale;
  FA_UNROLL
  for (int i = 0; SLOPES && i < M; ++i) slopes[i] = pack(T{}, 1.f, 1.f);
}

template <class T, bool TRANSPOSED, int N, class Params>
FA_DEVICE void add_bias(float (&x)[N], Params const& p, Tile const& tile, int head, Pairs<TRANSPOSED> const& at) {
  PairStrides const& s = p.numbers.bias_strides;
  int64 const first = head_offset(s, tile, head);
  auto const add = [&](int e, float bias) { x[e] = bias == negative_infinity() ? bias : x[e] + bias; };
  if (p.numbers.bias_is_float) {
    visit_pairs<TRANSPOSED, N>(static_cast<float const*>(p.terms.bias) + first, s, tile, at, add);
  } else {
    visit_pairs<TRANSPOSED, N>(static_cast<uint16 const*>(p.terms.bias) + first, s, tile, at,
                               [&](int e, uint16 word) { add(e, low(T{}, uint32{word})); });
  }
}

template <bool TRANSPOSED, int N, class Params>
FA_DEVICE void add_alibi(float (&x)[N], Params const& p, Tile const& tile, int head, int diagonal,
                         Pairs<TRANSPOSED> const& at) {
  float const slope = load_global(p.terms.alibi_slopes + tile.batch * p.numbers.slopes_batch_stride + head);
  FA_UNROLL
  for (int e = 0; e < N; ++e) {
    int const distance = at.key(e) - at.query(e) - diagonal;
    x[e] = multiply_add(-slope, static_cast<float>(larger(distance, -distance)), x[e]);
  }
}

// -inf where the band, or the end of a sequence, leaves a pair out.
template <bool TRANSPOSED, int N>
FA_DEVICE void mask_band(float (&x)[N], Band const& band, Pairs<TRANSPOSED> const& at) {
  Band const of_rows = TRANSPOSED ? transposed(band) : band;
  Range const kept[2] = {kept_columns(of_rows, at.row(0)), kept_columns(of_rows, at.row(2))};
  mask_scores(x, kept, at.first_column);
}

template <bool TRANSPOSED, int N, class Params>
FA_DEVICE void mask_segments(float (&x)[N], Params const& p, Tile const& tile, Pairs<TRANSPOSED> const& at) {
  int64 const* const of_q = p.terms.segment_ids_q + tile.batch * p.numbers.ids_q_batch_stride;
  int64 const* const of_kv = p.terms.segment_ids_kv + tile.batch * p.numbers.ids_kv_batch_stride;
  FA_UNROLL
  for (int e = 0; e < N; ++e) {
    int64 const a = load_global(of_q + smaller(at.query(e), tile.s_q - 1));
    int64 const b = load_global(of_kv + smaller(at.key(e), tile.s_kv - 1));
    if (a != b) x[e] = negative_infinity();
  }
}

template <bool TRANSPOSED, int N, class Params>
FA_DEVICE void mask_pairs(float (&x)[N], Params const& p, Tile const& tile, int head, Pairs<TRANSPOSED> const& at) {
  PairStrides const& s = p.numbers.mask_strides;
  visit_pairs<TRANSPOSED, N>(p.terms.mask + head_offset(s, tile, head), s, tile, at, [&](int e, uint8 is_kept) {
    if (!is_kept) x[e] = negative_infinity();
  });
}

// Scaled scores become finished: terms added, -inf where a pair is not kept. `is_full`: the tile's ranges say that
// band and segments keep all of the block.
template <class T, bool TRANSPOSED, int N, class Params>
FA_DEVICE void add_terms(float (&x)[N], Params const& p, Tile const& tile, int head, Band const& band,
                         Pairs<TRANSPOSED> const& at, bool is_full) {
  if (p.terms.bias) add_bias<T>(x, p, tile, head, at);
  if (p.terms.alibi_slopes) add_alibi(x, p, tile, head, band.diagonal, at);
  if (p.terms.mask) mask_pairs(x, p, tile, head, at);
  if (is_full) return;
  mask_band(x, band, at);
  if (p.terms.segment_ids_q) mask_segments(x, p, tile, at);
}

// ---- dropout ---------------------------------------------------------------------------------------------------------

struct Dropout {
  uint32 threshold, head, offset, key0, key1;
};

template <class Params>
FA_DEVICE Dropout dropout_of(Params const& p, Tile const& tile, int head) {
  int64 const seed = load_global(p.terms.rng_state), offset = load_global(p.terms.rng_state + 1);
  return {static_cast<uint32>(p.numbers.dropout_threshold),
          static_cast<uint32>(tile.batch * static_cast<int>(p.heads_q) + head), static_cast<uint32>(offset),
          static_cast<uint32>(seed), static_cast<uint32>(seed >> 32)};
}

// The four words of a query row and the keys that share a call with key `key`.
FA_DEVICE PhiloxWords words_of(Dropout const& d, int query, int key) {
  return philox({{static_cast<uint32>(query), static_cast<uint32>(key / 32 * 4 + key % 8 / 2), d.head, d.offset}},
                d.key0, d.key1);
}

// Zeros where a weight is dropped. `row`, `column`: this thread's first; the block begins at a multiple of 32 keys.
template <int N>
FA_DEVICE void drop(float (&x)[N], Dropout const& d, int row, int column) {
  FA_UNROLL
  for (int part = 0; part < N / 16; ++part) {
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      PhiloxWords const words = words_of(d, row + 8 * r, column + 32 * part);
      FA_UNROLL
      for (int i = 0; i < 8; ++i) {
        if ((words.word[i / 2] >> (i % 2 * 16) & 0xffff) < d.threshold)
          x[16 * part + 4 * (i / 2) + 2 * r + i % 2] = 0.f;
      }
    }
  }
}

// A bit for each of 32 transposed scores, 1 where the weight is left. Rows are keys: a thread's two are in one call.
FA_DEVICE uint32 bits_left(Dropout const& d, int row, int column) {
  uint32 left = 0;
  FA_UNROLL
  for (int c = 0; c < 16; ++c) {
    PhiloxWords const words = words_of(d, column + c / 2 * 8 + c % 2, row);
    bool const is_upper = row % 32 / 8 >= 2;
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32 const word = is_upper ? words.word[2 + r] : words.word[r];
      bool const is_left = (word >> (row % 2 * 16) & 0xffff) >= d.threshold;
      left |= static_cast<uint32>(is_left) << (c / 2 * 4 + 2 * r + c % 2);
    }
  }
  return left;
}

}  // namespace fa::sm90
