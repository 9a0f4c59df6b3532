// Where the rows of a unit lie, and how both passes treat numbers that are not finite.
#pragma once

#include "softmax.h"

namespace {

struct Tensors {
  AttentionParams const& p;
  Unit const& unit;

  Source q(int head) const { return rows(p.q, p.q_strides, head, unit.first_q); }
  Source dout(int head) const { return rows(p.dout, p.dout_strides, head, unit.first_q); }
  Source k() const { return rows(p.k, p.k_strides, unit.kv_head, unit.first_kv); }
  Source v() const { return rows(p.v, p.v_strides, unit.kv_head, unit.first_kv); }

  // Results are contiguous.
  Source out(int head) const { return of_queries(p.out, head, p.head_dim_v); }
  Source dq(int head) const { return of_queries(p.dq, head, p.head_dim_qk); }
  Source dk() const { return of_keys(p.dk, p.head_dim_qk); }
  Source dv() const { return of_keys(p.dv, p.head_dim_v); }

  // Of one number for each query row: where those of a head begin.
  int64 lse(int head) const {
    return p.cu_seqlens_q ? head * p.rows_q + unit.first_q : (unit.b * p.heads_q + head) * p.rows_q;
  }

 private:
  Source rows(void const* x, Strides const& strides, int head, int64 first) const {
    int64 const bytes = bytes_of(p.dtype);
    int64 const at = (p.cu_seqlens_q ? 0 : unit.b * strides.batch) + first * strides.row + head * strides.head;
    return {static_cast<char const*>(x) + at * bytes, strides.row * bytes, p.dtype};
  }

  Source contiguous(void const* x, int64 row, int64 heads, int64 head, int64 dim) const {
    int64 const bytes = bytes_of(p.dtype);
    return {static_cast<char const*>(x) + (row * heads + head) * dim * bytes, heads * dim * bytes, p.dtype};
  }

  Source of_queries(void const* x, int head, int64 dim) const {
    return contiguous(x, p.cu_seqlens_q ? unit.first_q : unit.b * p.rows_q, p.heads_q, head, dim);
  }

  Source of_keys(void const* x, int64 dim) const {
    return contiguous(x, p.cu_seqlens_kv ? unit.first_kv : unit.b * p.rows_kv, p.heads_kv, unit.kv_head, dim);
  }
};

inline Source from_row(Source rows, int64 n) {
  rows.at += n * rows.stride;
  return rows;
}

template <class Word>
inline void clear(Word* words, int64 count) {
  __builtin_memset(words, 0, count * sizeof(Word));
}

// Whether rows of results are whole vectors of words, so that sums can be held in them.
template <class Word>
inline bool can_hold_sums(int64 dtype, int64 dim) {
  return bytes_of(dtype) == int64(sizeof(Word)) && dim % kCount<Word> == 0;
}

inline char* written(Source const& rows, int64 n) { return const_cast<char*>(rows.at) + n * rows.stride; }

template <class Word, class T>
inline void add_dots_of(T const*, Source const& a, Source const& b, int64 count, int64 there, int64 dim, Word* to) {
  for (int64 i = 0; i < count; i += kCount<Word>) {
    Vector<Word> sums[kCount<Word>]{};
    for (int64 n = 0; n < kCount<Word> && i + n < count; ++n) {
      if (i + n + kRowsAhead < there) prefetch_results(from_row(a, i + n + kRowsAhead), 1, dim);
      T const* const x = reinterpret_cast<T const*>(from_row(a, i + n).at);
      T const* const y = reinterpret_cast<T const*>(from_row(b, i + n).at);
      int64 c = 0;
      for (; c + kCount<Word> <= dim; c += kCount<Word>) sums[n] += load(x + c) * load(y + c);
      if (c < dim) sums[n] += load_some(x + c, int(dim - c)) * load_some(y + c, int(dim - c));
    }
    store(to + i, load(to + i) + sums_of(sums));
  }
}

template <class Word>
inline Matrix<Word> words_of(Source const& results) {
  return {reinterpret_cast<Word*>(written(results, 0)), results.stride / int64(sizeof(Word))};
}

// Adds the dot products of rows of two tensors; `to` takes whole vectors of them. `there` rows of `a` can be read.
template <class Word>
inline void add_dots(Source const& a, Source const& b, int64 count, int64 there, int64 dim, Word* to) {
  with_stored<Word>(a.dtype, [&](auto const* type) { add_dots_of(type, a, b, count, there, dim, to); });
}

// Packed rows of 16 bits or words, element by element.
template <class Op>
inline typename Op::Word element(typename Op::Word const* row, int64 n) {
  if constexpr (Op::kPerWord == 2) return to_float(reinterpret_cast<Bfloat16 const*>(row)[n]);
  else return row[n];
}

// What a product has lost because numbers of its right operand were dropped: weight times each number that is not finite.
template <class Word>
inline void add_nonfinite(Word weight, Source const& rows, int64 n, int64 dim, Word* sums) {
  char const* const row = rows.at + n * rows.stride;
  for (int64 c = 0; c < dim; ++c) {
    double const x = number_at(row, rows.dtype, c);
    if (!is_finite(x)) sums[c] += weight * Word(x);
  }
}

// Adds rows, of which the first is at `from`, to those with the same columns.
template <class Word>
inline void add_rows(Matrix<Word> to, Word const* from, int64 columns, Range rows) {
  for (int i = rows.begin; i < rows.end; ++i, from += columns)
    for (int64 c = 0; c < columns; c += kCount<Word>) {
      Word* const at = to.at + i * to.stride + c;
      store(at, load(at) + load(from + c));
    }
}

// Rows of results out of their sums, of which the first is that of row rows.begin.
template <class Word>
FA_CALLED void write_rows(Matrix<Word const> sums, int64 dim, Word factor, Source const& to, Range rows) {
  for (int i = rows.begin; i < rows.end; ++i, sums.at += sums.stride) {
    if (i + kRowsAhead < rows.end) prefetch_results(from_row(to, i + kRowsAhead), 1, dim);
    write_row(sums.at, dim, factor, to.dtype, written(to, i));
  }
}

}  // namespace
