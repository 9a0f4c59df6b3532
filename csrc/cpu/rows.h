// Where the rows of a unit lie, and what both passes do where a number is wild.
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

inline char* written(Source const& rows, int64 n) { return const_cast<char*>(rows.at) + n * rows.stride; }

// The sum of products of two rows in memory.
template <class Word>
inline Word dot(char const* a, char const* b, int64 dtype, int64 dim) {
  Word total = 0;
  with_dtype(dtype, [&](auto const* type) {
    auto const* const x = reinterpret_cast<decltype(type)>(a);
    auto const* const y = reinterpret_cast<decltype(type)>(b);
    constexpr int kStep = int(sizeof(load(x)) / sizeof(load(x)[0]));
    decltype(load(x)) sums{};
    int64 c = 0;
    for (; c + kStep <= dim; c += kStep) sums += load(x + c) * load(y + c);
    total = Word(sum(sums));
    for (; c < dim; ++c) total += Word(to_float(x[c])) * Word(to_float(y[c]));
  });
  return total;
}

// Packed rows of 16 bits or words, element by element.
template <class Op>
inline typename Op::Word element(typename Op::Word const* row, int64 n) {
  if constexpr (Op::kPerWord == 2) return to_float(reinterpret_cast<Bfloat16 const*>(row)[n]);
  else return row[n];
}

// What a product has lost because a row of its right operand was tamed: weight times each number that is not finite.
template <class Word>
inline void add_wild(Word weight, Source const& rows, int64 n, int64 dim, Word* sums, int64 step) {
  char const* const row = rows.at + n * rows.stride;
  for (int64 c = 0; c < dim; ++c) {
    double const x = number_at(row, rows.dtype, c);
    if (!is_finite(x)) sums[c * step] += weight * Word(x);
  }
}

// Rows first .. of results out of sums that are transposed, [columns][rows]. `turned` takes a vector of rows.
template <class Word>
inline void write_turned(Matrix<Word> sums, int64 dim, Word factor, Source const& to, int first, int count,
                         Word* turned) {
  int64 const columns = rounded_up(dim, kCount<Word>);
  for (int j = 0; j < count; j += kCount<Word>) {
    prefetch_results(from_row(to, first + j), fa::smaller(kCount<Word>, count - j), dim);
    for (int64 e = 0; e < columns; e += kCount<Word>)
      transpose<Word>({sums.at + e * sums.stride + j, sums.stride}, kCount<Word>, {turned + e, columns});
    for (int i = 0; i < kCount<Word> && j + i < count; ++i)
      write_row(turned + i * columns, dim, factor, to.dtype, written(to, first + j + i));
  }
}

}  // namespace
