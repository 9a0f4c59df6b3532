// Statistics of the weights, as fastattn/spec.py defines them, and their gradients.
//
// Each tile of query rows walks twice over the strips of the forward pass: the first walk finds the largest score, its
// key and lse, the second needs the weights p. With gradients of the statistics, it leaves that of lse:
//   dp = dweights - dentropy (log p + 1)      dlse = -sum p dp
// Then a backward pass without values does the rest: of scores the gradient is p (dp + dlse), and dlargest besides where
// the largest one is. dweights is that of key sums, which all rows share, or of the weights themselves (weights.h).
#pragma once

#include "backward.h"
#include "forward.h"

namespace {

// Statistics are words: their weights are as exact as those of words.
template <class Op>
using Exact = std::conditional_t<Op::kPerWord == 2, Single, Op>;

// Where the numbers of a head's keys lie in an array that holds one for each key and query head.
inline int64 first_key(AttentionParams const& p, Unit const& unit, int head) {
  return p.cu_seqlens_kv ? head * p.rows_kv + unit.first_kv : (unit.b * p.heads_q + head) * p.rows_kv;
}

// Weights of one vector of finished scores and their logarithms, zeros where a pair is not kept; of weights of zero, too.
template <class Word>
struct LoggedWeights {
  Vector<Word> p, log;
};

template <class Op>
inline LoggedWeights<typename Op::Word> logged_weights(Vector<typename Op::Word> score, typename Op::Word to_score,
                                                       RowTerms<typename Op::Word> const& row) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  V const log = log_of_weight(score, to_score, row), all = power_of_2<Exact<Op>::kDegree>(log * Word(kLog2E));
  V const p = score == broadcast(kNever<Word>) ? V{} : all;
  return {p, p == V{} ? V{} : log};
}

// The gradient of weights themselves, as if they did not add up to 1.
template <class Word>
inline Vector<Word> weight_gradient(LoggedWeights<Word> const& of, Word dentropy, Word const* dweights) {
  return load(dweights) - dentropy * (of.log + 1);
}

// The gradients of a row's weights.
template <class Word>
inline Word const* dweights_of(StatisticsParams const& of, Unit const& unit, int head, int64 i) {
  int64 const at = unit.b * of.dweights_batch + head * of.dweights_head + i * of.dweights_row;
  return static_cast<Word const*>(of.dweights) + at + unit.first_kv;
}

template <class Op>
class RowStatistics {
  using Word = typename Op::Word;
  using V = Vector<Word>;

 public:
  RowStatistics(AttentionParams const& p, StatisticsParams const& of, ForwardItem const& item, void* memory)
      : p_(p), of_(of), item_(item), pass_(p, item, memory), columns_(pass_.scores_.group() * pass_.packed_) {
    uint64 const begin = reinterpret_cast<uint64>(memory) + pass_.bytes();
    Arena arena(reinterpret_cast<void*>(begin));
    sums_ = arena.take<Word>(of.key_sum ? columns_ : 0);
    most_ = arena.take<Word>(of.key_sum ? columns_ : 0);
    bytes_ = pass_.bytes() + (arena.end() - int64(begin));
  }

  int64 bytes() const { return bytes_; }

  void run() {
    Prefetch none;
    pass_.prefetch_ = &none;
    pass_.begin();
    for (Word* const all : {sums_, most_})
      if (of_.key_sum) __builtin_memset(all, 0, columns_ * sizeof(Word));
    pass_.for_each_tile([this](int head, int first, int count) { run_tile(head, first, count); });
    if (of_.key_sum) write_keys();
  }

 private:
  using Row = typename Scores<Word>::Row;

  void run_tile(int head, int first, int count) {
    Range const keys = pass_.begin_tile(head, first, count);
    for (int r = 0; r < count; ++r) key_[r] = -1;
    for_each_row(count, keys, [this](auto terms, int r, Row const& row, Range columns, Word* scores, int begin) {
      find_largest<terms>(r, row, columns, scores, begin);
    });
    finish_rows(pass_.state_, pass_.sinks_, pass_.scores_.to_score, count, pass_.finished_);
    for (int r = 0; r < count; ++r) {
      Word const lse = pass_.finished_.lse[r];
      ends_[r] = {lse == kNever<Word> ? 0 : lse, pass_.finished_.low[r], 0};
      totals_[r] = 0;
    }
    for_each_row(count, keys, [this](auto terms, int r, Row const& row, Range columns, Word* scores, int begin) {
      if (of_.dlse) weigh_gradients<terms>(r, row, columns, scores, begin);
      else weigh<terms>(r, row, columns, scores, begin);
    });
    for (int r = 0; r < count; ++r) write(r);
  }

  // Calls step with the products of each row and strip.
  template <class Step>
  void for_each_row(int tile, Range keys, Step const& step) {
    pass_.for_each_strip(tile, keys, [&](int r, int count, int begin) {
      Seen const seen = pass_.seen_by_strip(r, count, begin);
      if (is_empty(seen.keys)) return;
      pass_.prefetch_terms(r, count, seen.keys);
      Range const columns = columns_of<Word>(seen.keys, begin);
      pass_.multiply_keys(count, pass_.queries_ + r * pass_.row_words_, pass_.k_, begin, columns,
                          {pass_.strip_, pass_.kStrip});
      pass_.upcoming_.step(3 * kTileRows);
      with_few_terms(pass_.has_gaps_ ? pass_.scores_.terms : terms_of(pass_.scores_, seen), [&](auto terms) {
        for (int n = 0; n < count; ++n) {
          Row const row = pass_.described(r + n, begin, seen.keys);
          step(terms, r + n, row, columns, pass_.strip_ + n * pass_.kStrip, begin);
        }
      });
    });
  }

  template <Terms TERMS>
  void find_largest(int r, Row const& row, Range columns, Word* scores, int begin) {
    Word const most = TERMS == kBand ? largest_in_band(columns, row.kept, scores)
                                     : Scores<Word>::finish(pass_.scores_.terms, row, columns, scores);
    if (most > pass_.state_.most[r]) {
      int c = columns.begin;
      while (scores[c] != most) ++c;
      key_[r] = begin + c;
    }
    soften<Exact<Op>>(scores + columns.begin, columns.end - columns.begin, most, pass_.scores_.to_exponent,
                      Dropped{nullptr, 0}, pass_.state_, r, pass_.weights_);
  }

  template <Terms TERMS>
  LoggedWeights<Word> weights(int r, Row const& row, Word const* scores, int c) const {
    V const score = Scores<Word>::template score<TERMS>(row, c, load(scores + c));
    return logged_weights<Op>(score, pass_.scores_.to_score, ends_[r]);
  }

  // Entropies, and what the row adds to its keys.
  template <Terms TERMS>
  void weigh(int r, Row const row, Range columns, Word const* scores, int begin) {
    int64 const at = (pass_.row_[r].head - pass_.scores_.first_head()) * pass_.packed_ + begin - pass_.keys_.begin;
    Word *const sums = sums_ + at, *const most = most_ + at;
    V total{};
    for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
      auto const of = weights<TERMS>(r, row, scores, c);
      V const before = load(most + c);
      total -= of.p * of.log;
      store(sums + c, load(sums + c) + of.p);
      store(most + c, of.p <= before || before != before ? before : of.p);  // NaN stays
    }
    totals_[r] += sum(total);
  }

  template <Terms TERMS>
  void weigh_gradients(int r, Row const row, Range columns, Word const* scores, int begin) {
    int const head = pass_.row_[r].head;
    Word const* const dweights = dweights_of<Word>(of_, item_.unit, head, pass_.row_[r].i) + begin;
    Word const dentropy = static_cast<Word const*>(of_.dentropy)[row_at(r)];
    V total{};
    for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
      auto const of = weights<TERMS>(r, row, scores, c);
      total -= of.p == V{} ? V{} : of.p * weight_gradient(of, dentropy, dweights + c);
    }
    totals_[r] += sum(total);
  }

  int64 row_at(int r) const { return pass_.tensors_.lse(pass_.row_[r].head) + pass_.row_[r].i; }

  void write(int r) const {
    int64 const at = row_at(r);
    auto const put = [&](void* to, Word x) { static_cast<Word*>(to)[at] = x; };
    of_.largest_key[at] = key_[r];
    if (of_.dlse) {
      put(p_.lse, pass_.finished_.lse[r]);
      put(p_.lse_low, pass_.finished_.low[r]);
      return put(of_.dlse, Word(totals_[r]));
    }
    Word const most = pass_.state_.most[r], total = pass_.state_.total[r];
    put(of_.entropy, Word(totals_[r]));
    put(of_.largest_logit, total == total ? most * pass_.scores_.to_score : total);
  }

  // This part's share.
  void write_keys() const {
    Range const keys = pass_.keys_;
    for (int g = 0; g < pass_.scores_.group() && !is_empty(keys); ++g) {
      int64 const at = item_.rows.begin / of_.rows_per_part * of_.share +
                       first_key(p_, item_.unit, pass_.scores_.first_head() + g) + keys.begin;
      int64 const bytes = (keys.end - keys.begin) * int64(sizeof(Word));
      __builtin_memcpy(static_cast<Word*>(of_.key_sum) + at, sums_ + g * pass_.packed_, bytes);
      __builtin_memcpy(static_cast<Word*>(of_.key_max) + at, most_ + g * pass_.packed_, bytes);
    }
  }

  AttentionParams const& p_;
  StatisticsParams const& of_;
  ForwardItem const& item_;
  Forward<Op> pass_;
  int64 columns_, bytes_;
  Word *sums_, *most_;  // of the keys that are packed, for each head
  int64 key_[kForwardRows];
  RowTerms<Word> ends_[kForwardRows];
  double totals_[kForwardRows];  // entropies, or gradients of lse
};

// What the two rows of a pair take besides what a backward pass does.
template <class Word>
struct PairOfStatistics {
  Word dentropy[2], dlargest[2];
  int64 largest[2];  // the column of the largest score
  Word const* dweights[2];  // of column 0
};

// Two rows of products become gradients of products.
template <class Op, Terms TERMS>
inline void weigh_pair_of_statistics(Matrix<typename Op::Word> products, Range columns,
                                     PairTerms<typename Op::Word> const& given,
                                     PairOfStatistics<typename Op::Word> const& gradients,
                                     PairTarget<typename Op::Word> const to) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  PairTerms<Word> const of = given;  // copies: what is stored below might be any of their numbers
  PairOfStatistics<Word> const more = gradients;
  V totals[2]{};
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
    V const none[2]{};
    V g[2];
    for (int n = 0; n < 2; ++n) {
      V slope = broadcast(Word(1));
      V const score =
          Scores<Word>::template score<TERMS>(of.row[n], c, load(products.at + n * products.stride + c), &slope);
      auto const found = logged_weights<Op>(score, of.to_score, of.end[n]);
      V const dp = weight_gradient(found, more.dentropy[n], more.dweights[n] + c);
      auto const is_largest =
          lane_numbers<Word>() + typename Lanes<Word>::Integer(c) == typename Lanes<Word>::Integer(more.largest[n]);
      g[n] = found.p * (dp - of.end[n].delta) + (is_largest ? broadcast(more.dlargest[n]) : V{});
      g[n] = score == broadcast(kNever<Word>) ? V{} : g[n];
      if (TERMS >= kBiased && of.dbias[n].at) {
        if (of.dbias[n].is_shared) totals[n] += g[n];
        else put_bias_gradient<Word>(g[n], c, of.row[n].kept, of.dbias[n]);
      }
      if (TERMS == kAll) g[n] = score == broadcast(kNever<Word>) ? V{} : g[n] * slope;
    }
    store_pair<Op>(none, g, c, columns.begin, to);
  }
  for (int n = 0; n < 2 && TERMS >= kBiased; ++n)
    if (of.dbias[n].at && of.dbias[n].is_shared) *reinterpret_cast<Word*>(of.dbias[n].at) += sum(totals[n]);
}

// dq, dk, dbias and dsinks out of the gradients of statistics. p.dlse, lse and the largest keys are those that
// RowStatistics has left.
template <class Op>
class StatisticsBackward {
  using Word = typename Op::Word;

 public:
  StatisticsBackward(AttentionParams const& p, StatisticsParams const& of, BackwardItem const& item, void* memory)
      : p_(p), of_(of), item_(item), pass_(p, item, memory) {}

  void run() {
    Prefetch none;
    pass_.run_with(none, [this](auto const&... strip) { run_strip(strip...); });
  }

 private:
  void run_strip(int head, Queries<Op> const& queries, int r, int count, Range keys, Seen const& seen) {
    Range const columns = columns_of<Word>(seen.keys, keys.begin);
    int const row = pass_.first_ + r;
    pass_.prefetch_terms(head, row, count, seen.keys);
    pass_.fill(keys, seen.keys, r, count);
    Matrix<Word> const scores = pass_.strip_.scores;
    pass_.multiply_keys(count, queries.rows_of(queries.q, row), pass_.dim_qk_, pass_.k_, keys, columns, scores);
    with_few_terms(terms_of(pass_.scores_, seen), [&](auto terms) {
      for (int n = 0; n < count; n += 2) {
        PairTerms<Word> pair;
        for (int x = 0; x < 2; ++x) pass_.read_terms(head, queries, row + n + x, keys, seen.keys, columns, x, pair);
        weigh_pair_of_statistics<Op, terms>({scores.at + n * scores.stride, scores.stride}, columns, pair,
                                            gradients_of(head, row + n, keys), pass_.target(r, n));
      }
    });
    pass_.add_to_queries(head, row, count, keys, columns, seen.keys);
  }

  PairOfStatistics<Word> gradients_of(int head, int i, Range keys) const {
    PairOfStatistics<Word> found{};
    for (int n = 0; n < 2; ++n) {
      bool const is_there = i + n < item_.unit.band.s_q;
      int const row = is_there ? i + n : 0;
      int64 const at = pass_.tensors_.lse(head) + row;
      found.dweights[n] = dweights_of<Word>(of_, item_.unit, head, row) + keys.begin;
      found.largest[n] = -1;
      if (!is_there || !of_.largest_key) continue;
      found.largest[n] = of_.largest_key[at] - keys.begin;
      found.dlargest[n] = static_cast<Word const*>(of_.dlargest_logit)[at];
      found.dentropy[n] = static_cast<Word const*>(of_.dentropy)[at];
    }
    return found;
  }

  AttentionParams const& p_;
  StatisticsParams const& of_;
  BackwardItem const& item_;
  Backward<Op> pass_;
};

}  // namespace
