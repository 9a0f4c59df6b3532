// The queries of one head for the backward pass: packed as left operands of every product, with lse and delta.
#pragma once

#include "gradient.h"

namespace {

constexpr int kMostRows = 96, kLeastRows = 32;  // query rows of a block: whole vectors of words along the rows
constexpr int kMostIntervalRows = 64;           // of a call with intervals, which often change at multiples of it

// As many blocks as it takes, about equally long.
inline int rows_of_block(int s_q, bool has_intervals) {
  int const most = has_intervals ? kMostIntervalRows : kMostRows;
  int const blocks = fa::larger(1, (s_q + most - 1) / most);
  return int(rounded_up(fa::larger(1, (s_q + blocks - 1) / blocks), kLeastRows));
}

// Memory of one head, for all its blocks or, where they would take too much, for one at a time. Rows are padded to whole
// blocks with zeros.
template <class Op>
struct Queries {
  using Word = typename Op::Word;

  int64 words;                  // of a block, along the contraction over rows
  Matrix<Word> q, dout;         // rows, as operands of scores and of weight gradients
  Word *q_stacked, *dout_stacked;  // rows of a block stacked, operands of dk and dv, where words are pairs
  Word *lse, *low, *delta;
  bool *extreme_q, *extreme_dout;     // of each block: whether a number is
  int64 begin = 0;              // the first row that memory is for: 0 where it is for all
  int64 packed_to = 0;          // rows before this one are packed, as far as anything reads them
  bool keeps_all;

  void take(Arena& arena, AttentionParams const& p, int block_rows, int64 padded_rows, bool all) {
    keeps_all = all;
    int64 const rows = all ? padded_rows : block_rows;
    words = block_rows / Op::kPerWord;
    int64 const words_qk = rounded_up(p.head_dim_qk, kGroup<Op>) / Op::kPerWord;
    int64 const words_v = rounded_up(p.head_dim_v, kGroup<Op>) / Op::kPerWord;
    q = {arena.take<Word>(rows * words_qk), words_qk};
    dout = {arena.take<Word>(rows * words_v), words_v};
    int64 const lines = Op::kPerWord == 1 ? 0 : rows / Op::kPerWord;
    q_stacked = arena.take<Word>(lines * columns(p.head_dim_qk));
    dout_stacked = arena.take<Word>(lines * columns(p.head_dim_v));
    lse = arena.take<Word>(padded_rows);
    low = arena.take<Word>(padded_rows);
    delta = arena.take<Word>(padded_rows);
    extreme_q = arena.take<bool>(rows / block_rows);
    extreme_dout = arena.take<bool>(rows / block_rows);
  }

  Matrix<Word const> rows_of(Matrix<Word> const& x, int64 row) const {
    return {x.at + (row - begin) * x.stride, x.stride};
  }

  static int64 columns(int64 dim) { return rounded_up(dim, kCount<Word>); }
};

// The rows of a block as the right operand of products over them: as they are, or stacked in panels.
template <class Op>
struct Lines {
  using Word = typename Op::Word;

  Word const* at;
  int64 stride;  // from row to row, or the lines of a panel

  Matrix<Word const> panel(Panels const& panels, int n, int64 line) const {
    int64 const width = panels.width(n) * kCount<Word>, column = panels.begin(n) * kCount<Word>;
    if (Op::kPerWord == 1) return {at + line * stride + column, stride};
    return {at + column * stride + line * width, width};
  }
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
    finite_ = arena.take<Word>(block_rows * rounded_up(dim, kGroup<Op>) / Op::kPerWord);
  }

  void pack(int head, Queries<Op>& to) const {
    for (int64 first = 0; first < padded_; first += block_) pack_block(head, first, to);
  }

  // Packs a block unless it is. Blocks come in order, and none comes again where memory is for one at a time.
  void need_block(int head, int64 first, Queries<Op>& to) const {
    if (!to.keeps_all || first >= to.packed_to) pack_block(head, first, to);
  }

  // Queries and dout of the block that begins at row `first`, with zeros in place of what is not finite: in a product over
  // rows a weight of zero times NaN would be NaN. Valid until the next call.
  Lines<Op> q_lines(Queries<Op> const& of, int64 first) const {
    int64 const n = (first - of.begin) / block_;
    return lines(of.q, of.q_stacked + n * of.words * of.columns(p_.head_dim_qk), n, of.extreme_q[n], p_.head_dim_qk);
  }
  Lines<Op> dout_lines(Queries<Op> const& of, int64 first) const {
    int64 const n = (first - of.begin) / block_;
    return lines(of.dout, of.dout_stacked + n * of.words * of.columns(p_.head_dim_v), n, of.extreme_dout[n],
                 p_.head_dim_v);
  }

  void pack_block(int head, int64 first, Queries<Op>& to) const {
    pack_operands(head, first, to);
    read_terms(head, first, to);
    to.packed_to = first + block_;
  }

 private:
  // One block of those that are not null.
  void pack_operands(int head, int64 first, Queries<Op>& to) const {
    if (!to.keeps_all) to.begin = first;
    int64 const count = rows_ - first < block_ ? rows_ - first : block_, at = first - to.begin, n = at / block_;
    to.extreme_q[n] = p_.q && pack_block(from_row(tensors_.q(head), first), count, rows_ - first, p_.head_dim_qk,
                                         {to.q.at + at * to.q.stride, to.q.stride},
                                         to.q_stacked + n * to.words * to.columns(p_.head_dim_qk));
    to.extreme_dout[n] = p_.dout && pack_block(from_row(tensors_.dout(head), first), count, rows_ - first,
                                               p_.head_dim_v, {to.dout.at + at * to.dout.stride, to.dout.stride},
                                               to.dout_stacked + n * to.words * to.columns(p_.head_dim_v));
  }

  bool pack_block(Source const& from, int64 count, int64 there, int64 dim, Matrix<Word> rows, Word* to) const {
    bool const is_extreme = pack_rows<Op>(from, count, there, block_, dim, rows);
    if (Op::kPerWord == 1) return is_extreme;
    if (is_extreme) rows = finite_rows(rows, dim);
    pack_stacked<Op>(rows, block_, Panels(rounded_up(dim, kCount<Word>) / kCount<Word>), block_ / Op::kPerWord, 0, to);
    return is_extreme;
  }

  // A copy of a block's rows with zeros in place of what is not finite.
  Matrix<Word> finite_rows(Matrix<Word> const& rows, int64 dim) const {
    Matrix<Word> const finite{finite_, rows.stride};
    __builtin_memcpy(finite.at, rows.at, block_ * rows.stride * sizeof(Word));
    drop_nonfinite<Op>(finite, block_, dim, 1);
    return finite;
  }

  Lines<Op> lines(Matrix<Word> const& all, Word const* stacked, int64 n, bool is_extreme, int64 dim) const {
    if (Op::kPerWord == 2) return {stacked, block_ / Op::kPerWord};
    Matrix<Word> const rows{all.at + n * block_ * all.stride, all.stride};
    return {is_extreme ? finite_rows(rows, dim).at : rows.at, rows.stride};
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
      to.lse[i] = is_there && lse[i] != kNever<Word> ? lse[i] : 0;  // a row without keys has no weights at all
      to.low[i] = is_there && low ? low[i] : 0;
      to.delta[i] = is_there && dlse ? -dlse[i] : 0;
    }
    int64 const count = rows_ - first < block_ ? rows_ - first : block_;
    if (p_.dout)
      add_dots(from_row(out, first), from_row(dout, first), count, rows_ - first, p_.head_dim_v, to.delta + first);
  }

  AttentionParams const& p_;
  Tensors tensors_;
  int64 rows_, padded_, block_;
  Word* finite_;  // of one block
};

}  // namespace
