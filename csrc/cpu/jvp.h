// The Jacobian-vector product of the forward pass: how out and lse move when the inputs move along tangents.
//
// lse is known, so the weights p are, and one pass over the strips of the forward pass is enough. With z the factors of
// dropout and t as in tangents.h:
//   lse' = sum p t + p_sink sink'
//   out' = sum p z (t v + v') - lse' out
#pragma once

#include "forward.h"
#include "tangents.h"

namespace {

template <class Op>
class ForwardJvp {
  using Word = typename Op::Word;
  using V = Vector<Word>;

 public:
  ForwardJvp(AttentionParams const& p, AttentionParams const& moved, ForwardItem const& item, void* memory)
      : p_(p),
        moved_(moved),
        operands_(operands_of(p, moved)),
        given_(p, item, memory),
        along_(operands_, item, behind(memory, given_.bytes())),
        tangents_(moved, item.unit),
        results_{moved, item.unit} {}

  int64 bytes() const { return given_.bytes() + along_.bytes(); }

  void run() {
    given_.begin();
    along_.begin();
    given_.for_each_tile([this](int head, int first, int count) { run_tile(head, first, count); });
  }

 private:
  void run_tile(int head, int first, int count) {
    Range const keys = given_.begin_tile(head, first, count);
    along_.begin_tile(head, first, count);
    for (int r = 0; r < count; ++r) read_terms(r);
    given_.for_each_strip(count, keys, [this](int r, int rows, int begin) { run_strip(r, rows, begin); });
    for (int r = 0; r < count; ++r) write(r);
  }

  void read_terms(int r) {
    int64 const at = lse_at(r);
    Word const lse = static_cast<Word const*>(p_.lse)[at];
    ends_[r] = {lse == kNever<Word> ? 0 : lse, static_cast<Word const*>(p_.lse_low)[at], 0};
    totals_[r] = 0;
    if (moved_.sinks) totals_[r] = Word(sink_weight(given_.sinks_[r], lse, ends_[r].low) * double(along_.sinks_[r]));
  }

  int64 lse_at(int r) const { return given_.tensors_.lse(given_.row_[r].head) + given_.row_[r].i; }

  void run_strip(int r, int count, int begin) {
    Seen const seen = given_.seen_by_strip(r, count, begin);
    Range const keys = seen.keys;
    if (is_empty(keys)) return;
    given_.prefetch_terms(r, count, keys);
    Range const columns = columns_of<Word>(keys, begin);
    multiply_keys(r, count, begin, columns);
    if (kIsSpecialised && terms_of(given_.scores_, seen) == kBand && !p_.dropout_threshold && !moved_.bias &&
        !given_.has_gaps_)
      weigh_rows<kBand>(r, count, begin, columns, keys);
    else weigh_rows<kAll>(r, count, begin, columns, keys);
    given_.upcoming_.step(3 * kTileRows);
    along_.upcoming_.step(3 * kTileRows);
    bool const is_first = given_.start(r, count);
    given_.add_values(r, count, begin, columns, keys, is_first);
    if (moved_.v) along_.add_values(r, count, begin, columns, keys, is_first);
  }

  // Products of queries and keys, and their tangents.
  void multiply_keys(int r, int count, int begin, Range columns) {
    Word const *const q = given_.queries_ + r * given_.row_words_, *const q_moved =
                                                                       along_.queries_ + r * along_.row_words_;
    Matrix<Word> const to{along_.strip_, given_.kStrip};
    given_.multiply_keys(count, q, given_.k_, begin, columns, {given_.strip_, given_.kStrip});
    if (moved_.q) given_.multiply_keys(count, q_moved, given_.k_, begin, columns, to);
    if (moved_.q && moved_.k) given_.multiply_keys(count, q, along_.k_, begin, columns, to, kAdd);
    else if (moved_.k) given_.multiply_keys(count, q, along_.k_, begin, columns, to);
    else if (!moved_.q) clear(to.at, count * to.stride);
  }

  // Products become weights: p z t of the values, p z of their tangents.
  template <Terms TERMS>
  void weigh_rows(int r, int count, int begin, Range columns, Range keys) {
    for (int n = 0; n < count; ++n) {
      auto const& row = given_.row_[r + n];
      auto const described = given_.described(r + n, begin, keys);
      weigh_row<TERMS>(r + n, n * given_.kStrip, columns, described,
                       moving_row(tangents_, row.head, row.i, begin, described.kept),
                       given_.dropped(row, begin + columns.begin, begin + columns.end));
    }
  }

  template <Terms TERMS>
  void weigh_row(int r, int64 strip, Range columns, typename Scores<Word>::Row const row, Moving<Word> const moving,
                 Dropped const dropped) {
    V total{};
    RowTerms<Word> const end = ends_[r];  // copies: what is stored below might be any of its numbers
    Word const to_score = given_.scores_.to_score, scale = moving.scale;
    Word const *const products = given_.strip_ + strip, *const moved = along_.strip_ + strip;
    auto const weigh = [&](int c, V& weight, V& times_tangent) __attribute__((always_inline)) {
      V slope = broadcast(Word(1));
      V const product = load(products + c), score = Scores<Word>::template score<TERMS>(row, c, product, &slope);
      V const p = weight_of<Op>(score, to_score, end);
      V t = TERMS == kBand ? load(moved + c) * scale : moving.tangent(c, load(moved + c), product, slope);
      if (TERMS != kBand || c < row.kept.begin || c + kCount<Word> > row.kept.end)
        t = score == broadcast(kNever<Word>) ? V{} : t;
      total += p * t;
      weight = dropped.bits ? survivors<Word>(p, dropped, c - columns.begin) : p;
      times_tangent = weight * t;
    };
    constexpr int kStep = kCount<Word> * Op::kPerWord;
    Word *of_values = given_.weights_ + strip, *of_tangents = along_.weights_ + strip;
    for (int c = columns.begin; c < columns.end; c += kStep, of_values += kCount<Word>, of_tangents += kCount<Word>) {
      V weight, times_tangent;
      weigh(c, weight, times_tangent);
      if constexpr (Op::kPerWord == 2) {
        V next{}, next_times_tangent{};
        if (c + kCount<Word> < columns.end) weigh(c + kCount<Word>, next, next_times_tangent);
        weight = Op::joined(weight, next);
        times_tangent = Op::joined(times_tangent, next_times_tangent);
      }
      store(of_values, times_tangent);
      store(of_tangents, weight);
    }
    totals_[r] += sum(total);
  }

  void write(int r) {
    auto const& row = given_.row_[r];
    Word *const of_values = given_.sums_ + r * given_.columns_, *const of_tangents = along_.sums_ + r * given_.columns_;
    Word* const out = along_.rows_;
    bool const is_started = given_.started_[r];
    V const a = broadcast(Word(is_started ? p_.dropout_scale / given_.v_factor_ : 0));
    V const b = broadcast(Word(is_started && moved_.v ? p_.dropout_scale / along_.v_factor_ : 0));
    read_row(from_row(given_.tensors_.out(row.head), row.i).at, p_.head_dim_v, p_.dtype, out);
    for (int64 c = 0; c < given_.columns_; c += kCount<Word>) {
      V moved = -(load(out + c) * totals_[r]);
      if (is_started) moved += load(of_values + c) * a;
      if (is_started && moved_.v) moved += load(of_tangents + c) * b;
      store(of_values + c, moved);
    }
    write_row(of_values, p_.head_dim_v, Word(1), p_.dtype, written(results_.out(row.head), row.i));
    static_cast<Word*>(moved_.lse)[lse_at(r)] = totals_[r];
  }

  AttentionParams const &p_, &moved_;
  AttentionParams const operands_;
  Forward<Op> given_, along_;  // the pass over the inputs, and with tangents in their place
  Scores<Word> tangents_;
  Tensors results_;
  RowTerms<Word> ends_[kForwardRows];
  Word totals_[kForwardRows];
};

}  // namespace
