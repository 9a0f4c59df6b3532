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

// The forms of a product. kAddTurned: A is stored transposed.
enum Form { kSet, kAdd, kAddTurned };

template <class Op, int ROWS, int VECTORS, Form FORM>
__attribute__((noinline)) void multiply_tile(int64 depth, Matrix<typename Op::Word const> a,
                                             Matrix<typename Op::Word const> b, Matrix<typename Op::Word> c) {
  using Word = typename Op::Word;
  Vector<Word> sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = Vector<Word>{};
  Word const* rows[ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) rows[i] = a.at + i * (FORM == kAddTurned ? 1 : a.stride);
#pragma GCC unroll 2
  for (int64 p = 0; p < depth; ++p, b.at += b.stride) {
    Vector<Word> right[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b.at + j * kCount<Word>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      Vector<Word> const left = broadcast(rows[i][FORM == kAddTurned ? p * a.stride : p]);
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = Op::multiply_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) {
      Word* const at = c.at + i * c.stride + j * kCount<Word>;
      store(at, FORM == kSet ? sums[i][j] : load(at) + sums[i][j]);
    }
}

template <class Op>
using Tile = void (*)(int64, Matrix<typename Op::Word const>, Matrix<typename Op::Word const>,
                      Matrix<typename Op::Word>);

template <class Op, Form FORM>
struct Tiles {
#if defined(__AVX512F__) || defined(__ARM_NEON)
#define FA_ROW(m) \
  {multiply_tile<Op, m, 1, FORM>, multiply_tile<Op, m, 2, FORM>, multiply_tile<Op, m, 3, FORM>, \
   multiply_tile<Op, m, 4, FORM>}
#else
#define FA_ROW(m) {multiply_tile<Op, m, 1, FORM>, multiply_tile<Op, m, 2, FORM>}
#endif
  static constexpr Tile<Op> kTable[kTileRows][kTileVectors] = {FA_ROW(1), FA_ROW(2), FA_ROW(3),
                                                               FA_ROW(4), FA_ROW(5), FA_ROW(6)};
#undef FA_ROW
};

// `rows` at most kTileRows, `vectors` of columns at most kTileVectors.
template <class Op, Form FORM>
inline void multiply(int rows, int vectors, int64 depth, Matrix<typename Op::Word const> a,
                     Matrix<typename Op::Word const> b, Matrix<typename Op::Word> c) {
  Tiles<Op, FORM>::kTable[rows - 1][vectors - 1](depth, a, b, c);
}

// C = A B or C += A B, the contraction cut into chains.
template <class Op, Form FORM = kSet>
inline void multiply_in_chains(int rows, int vectors, int64 depth, Matrix<typename Op::Word const> a,
                               Matrix<typename Op::Word const> b, Matrix<typename Op::Word> c) {
  int64 done = depth < Op::kChain ? depth : Op::kChain;
  multiply<Op, FORM>(rows, vectors, done, a, b, c);
  for (; done < depth; done += Op::kChain) {
    int64 const more = depth - done < Op::kChain ? depth - done : Op::kChain;
    multiply<Op, kAdd>(rows, vectors, more, {a.at + done, a.stride}, {b.at + done * b.stride, b.stride}, c);
  }
}

}  // namespace
