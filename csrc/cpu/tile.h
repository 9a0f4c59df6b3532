// C = A B and C += A B for a few rows and vectors of columns, held in registers.
//
// A is read word by word and broadcast, B in vectors. Sums begin at zero and C is added in the end. Since A is read one
// word at a time, it may as well be stored transposed.
#pragma once

#include "operand.h"

namespace {

constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kTileVectors = 4;  // 24 sums, 4 vectors of B and a word of A in 32 registers
#else
constexpr int kTileVectors = 2;  // 12, 2 and 1 in 16
#endif

// Columns of a panel: what a tile is wide.
template <class Word>
constexpr int kPanel = kTileVectors * kCount<Word>;

template <class Word>
struct Matrix {
  Word* at;
  int64 stride;  // from row to row
};

// C = A B, or C += A B.
enum Form { kSet, kAdd };

template <class Op, int ROWS, int VECTORS, bool IS_TURNED>
__attribute__((noinline)) void multiply_tile(int64 depth, Matrix<typename Op::Word const> a,
                                             Matrix<typename Op::Word const> b, Matrix<typename Op::Word> c,
                                             Form form) {
  using Word = typename Op::Word;
  Vector<Word> sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = Vector<Word>{};
  Word const* rows[ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) rows[i] = a.at + i * (IS_TURNED ? 1 : a.stride);
#pragma GCC unroll 2
  for (int64 p = 0; p < depth; ++p, b.at += b.stride) {
    Vector<Word> right[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b.at + j * kCount<Word>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      Vector<Word> const left = broadcast(rows[i][IS_TURNED ? p * a.stride : p]);
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = Op::multiply_add(left, right[j], sums[i][j]);
    }
  }
  Word* to = c.at;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i, to += c.stride) {
    if (form == kAdd) {
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += load(to + j * kCount<Word>);
    }
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) store(to + j * kCount<Word>, sums[i][j]);
  }
}

template <class Op>
using Tile = void (*)(int64, Matrix<typename Op::Word const>, Matrix<typename Op::Word const>,
                      Matrix<typename Op::Word>, Form);

template <class Op, bool IS_TURNED>
struct Tiles {
#if defined(__AVX512F__) || defined(__ARM_NEON)
#define FA_ROW(m) \
  {multiply_tile<Op, m, 1, IS_TURNED>, multiply_tile<Op, m, 2, IS_TURNED>, multiply_tile<Op, m, 3, IS_TURNED>, \
   multiply_tile<Op, m, 4, IS_TURNED>}
#else
#define FA_ROW(m) {multiply_tile<Op, m, 1, IS_TURNED>, multiply_tile<Op, m, 2, IS_TURNED>}
#endif
  static constexpr Tile<Op> kTable[][kTileVectors] = {FA_ROW(1), FA_ROW(2), FA_ROW(4), FA_ROW(6)};
#undef FA_ROW
};

// `rows` at most kTileRows, `vectors` of columns at most kTileVectors. IS_TURNED: A is stored transposed. Odd numbers of
// rows are rare: they take two tiles.
template <class Op, bool IS_TURNED = false>
inline void multiply(Form form, int rows, int vectors, int64 depth, Matrix<typename Op::Word const> a,
                     Matrix<typename Op::Word const> b, Matrix<typename Op::Word> c) {
  auto const& tiles = Tiles<Op, IS_TURNED>::kTable;
  if (int const even = rows & ~1) {
    tiles[even / 2][vectors - 1](depth, a, b, c, form);
    a.at += even * (IS_TURNED ? 1 : a.stride);
    c.at += even * c.stride;
  }
  if (rows & 1) tiles[0][vectors - 1](depth, a, b, c, form);
}

// C = A B or C += A B, the contraction cut into chains.
template <class Op>
inline void multiply_in_chains(Form form, int rows, int vectors, int64 depth, Matrix<typename Op::Word const> a,
                               Matrix<typename Op::Word const> b, Matrix<typename Op::Word> c) {
  int64 done = depth < Op::kChain ? depth : Op::kChain;
  multiply<Op>(form, rows, vectors, done, a, b, c);
  for (; done < depth; done += Op::kChain) {
    int64 const more = depth - done < Op::kChain ? depth - done : Op::kChain;
    multiply<Op>(kAdd, rows, vectors, more, {a.at + done, a.stride}, {b.at + done * b.stride, b.stride}, c);
  }
}

}  // namespace
