// The queries of one head for the backward pass: packed as left operands of every product, with lse and delta.
#pragma once

#include "gradient.h"

namespace {

constexpr int kMostRows = 96, kLeastRows = 32;  // query rows of a block: whole vectors of words along the rows

// As many blocks as it takes, about equally long.
inline int rows_of_block(int s_q) {
  int const blocks = fa::larger(1, (s_q + kMostRows - 1) / kMostRows);
  return int(rounded_up(fa::larger(1, (s_q + blocks - 1) / blocks), kLeastRows));
}

// Memory of one head, for all its blocks or, where they would take too much, for one at a time. Rows are padded to whole
// blocks with zeros.
template <class Op>
struct Queries {
  using Word = typename Op::Word;

  int64 words;                  // of a block, along the contraction over rows
  Matrix<Word> q, dout;         // rows, as operands of scores and of weight gradients
  Word *q_columns, *dout_columns;  // per block [columns][words]: operands of dk and dv
  Word *lse, *low, *delta;
  bool *wild_q, *wild_dout;     // of each block: whether a number is
  int64 begin = 0;              // the first row that is packed: 0 where all are
  bool keeps_all;

  void take(Arena& arena, AttentionParams const& p, int block_rows, int64 padded_rows, bool all) {
    keeps_all = all;
    int64 const rows = all ? padded_rows : block_rows;
    words = block_rows / Op::kPerWord;
    int64 const words_qk = rounded_up(p.head_dim_qk, kGroup<Op>) / Op::kPerWord;
    int64 const words_v = rounded_up(p.head_dim_v, kGroup<Op>) / Op::kPerWord;
    q = {arena.take<Word>(rows * words_qk), words_qk};
    dout = {arena.take<Word>(rows * words_v), words_v};
    q_columns = arena.take<Word>(rows / Op::kPerWord * columns(p.head_dim_qk));
    dout_columns = arena.take<Word>(rows / Op::kPerWord * columns(p.head_dim_v));
    lse = arena.take<Word>(padded_rows);
    low = arena.take<Word>(padded_rows);
    delta = arena.take<Word>(padded_rows);
    wild_q = arena.take<bool>(rows / block_rows);
    wild_dout = arena.take<bool>(rows / block_rows);
  }

  Matrix<Word const> rows_of(Matrix<Word> const& x, int64 row) const {
    return {x.at + (row - begin) * x.stride, x.stride};
  }

  static int64 columns(int64 dim) { return rounded_up(dim, kCount<Word>); }
};

// What packing needs besides.
template <class Word>
struct PackingScratch {
  Word *rows, *stacked;
};

template <class Op>
class QueryPacker {
  template <class>
  friend class BackwardJvp;
  using Word = typename Op::Word;

 public:
  QueryPacker(AttentionParams const& p, Unit const& unit, int block_rows, int64 padded_rows, Arena& arena)
      : p_(p), tensors_{p, unit}, rows_(unit.band.s_q), padded_(padded_rows), block_(block_rows) {
    int64 const dim = p.head_dim_qk > p.head_dim_v ? p.head_dim_qk : p.head_dim_v;
    scratch_.rows = arena.take<Word>(block_rows * rounded_up(dim, kGroup<Op>) / Op::kPerWord);
    scratch_.stacked = arena.take<Word>(kCount<Word> * rounded_up(dim, kCount<Word>));
  }

  void pack(int head, Queries<Op>& to) const {
    for (int64 first = 0; first < padded_; first += block_) pack_block(head, first, to);
  }

  void pack_block(int head, int64 first, Queries<Op>& to) const {
    pack_operands(head, first, to);
    read_terms(head, first, to);
  }

 private:
  // One block of those that are not null.
  void pack_operands(int head, int64 first, Queries<Op>& to) const {
    if (!to.keeps_all) to.begin = first;
    int64 const count = rows_ - first < block_ ? rows_ - first : block_, at = first - to.begin, n = at / block_;
    to.wild_q[n] = p_.q && pack_block(from_row(tensors_.q(head), first), count, rows_ - first, p_.head_dim_qk,
                                      {to.q.at + at * to.q.stride, to.q.stride},
                                      to.q_columns + n * to.words * to.columns(p_.head_dim_qk));
    to.wild_dout[n] = p_.dout && pack_block(from_row(tensors_.dout(head), first), count, rows_ - first, p_.head_dim_v,
                                            {to.dout.at + at * to.dout.stride, to.dout.stride},
                                            to.dout_columns + n * to.words * to.columns(p_.head_dim_v));
  }

  bool pack_block(Source const& from, int64 count, int64 there, int64 dim, Matrix<Word> rows, Word* columns) const {
    bool const is_wild = pack_rows<Op>(from, count, there, block_, dim, rows);
    if (is_wild) {  // a product over rows must not meet what some of its weights of zero hide
      Matrix<Word> const tamed{scratch_.rows, rows.stride};
      __builtin_memcpy(tamed.at, rows.at, block_ * rows.stride * sizeof(Word));
      tame_rows<Op>(tamed, count, dim, 1);
      rows = tamed;
    }
    int64 const words = block_ / Op::kPerWord;
    int64 const width = rounded_up(dim, kCount<Word>);
    for (int64 r = 0; r < words; r += kCount<Word>) {
      Matrix<Word const> block{rows.at + r * Op::kPerWord * rows.stride, rows.stride};
      if (Op::kPerWord == 2) {
        for (int i = 0; i < kCount<Word>; ++i)
          for (int64 c = 0; c < width; c += kCount<Word>)
            store(scratch_.stacked + i * width + c, stacked<Op>(block.at + i * 2 * rows.stride, rows.stride, c));
        block = {scratch_.stacked, width};
      }
      transpose<Word>(block, width, {columns + r, words});
    }
    return is_wild;
  }

  // Of one block, whose rows of dout have just been read.
  void read_terms(int head, int64 first, Queries<Op>& to) const {
    int64 const at = tensors_.lse(head);
    auto const* const lse = static_cast<Word const*>(p_.lse) + at;
    auto const* const low = p_.lse_low ? static_cast<Word const*>(p_.lse_low) + at : nullptr;
    auto const* const dlse = p_.dlse ? static_cast<Word const*>(p_.dlse) + at : nullptr;
    Source const out = tensors_.out(head), dout = tensors_.dout(head);
    for (int64 i = first; i < first + block_; ++i) {
      bool const is_there = i < rows_;
      for (int64 c = 0; p_.dout && i + kRowsAhead < rows_ && c < p_.head_dim_v * bytes_of(p_.dtype); c += 64)
        prefetch_line(out.at + (i + kRowsAhead) * out.stride + c);
      to.lse[i] = is_there && lse[i] != kNever<Word> ? lse[i] : 0;  // a row without keys has no weights at all
      to.low[i] = is_there && low ? low[i] : 0;
      to.delta[i] = is_there && p_.dout
                        ? dot<Word>(out.at + i * out.stride, dout.at + i * dout.stride, p_.dtype, p_.head_dim_v)
                        : 0;
      if (is_there && dlse) to.delta[i] -= dlse[i];
    }
  }

  AttentionParams const& p_;
  Tensors tensors_;
  int64 rows_, padded_, block_;
  PackingScratch<Word> scratch_;
};

}  // namespace
