// The weights themselves, of each head or averaged over the heads, and what their gradient takes of each row.
//
// A strip of query rows holds the scores of all its keys until their sum is known: products and exponentials are computed
// once. Averages are added up head by head, for a few rows that stay in a cache. With gradients of the weights, dp, it
// leaves lse and the gradient of lse, -sum p dp, for the backward pass of statistics.h.
#pragma once

#include "small.h"
#include "statistics.h"

namespace {

// Exponentials of weights that are stored in 16 bits.
struct RoughSingle : Single {
  static constexpr int kDegree = 4;
};

template <class Op>
using Rough = std::conditional_t<Op::kPerWord == 2, RoughSingle, Op>;

template <class Op>
class RowWeights {
  using Word = typename Op::Word;
  static constexpr int kRows = 16;  // of a strip, in whole vectors
  static_assert(kRows >= kTileRows && kRows % kCount<Word> == 0);

 public:
  RowWeights(AttentionParams const& p, StatisticsParams const& of, ForwardItem const& item, void* memory)
      : p_(p),
        of_(of),
        item_(item),
        is_rough_(!of.dlse && bytes_of(of.weights_dtype) == 2),
        line_(rounded_up(item.unit.band.s_kv, kPanel<Word>) + kAlignWords) {
    Arena arena(memory);
    scores_ = arena.take<Word>(kTileRows * line_);
    sums_ = arena.take<Word>(of.averages ? (item.rows.end - item.rows.begin) * line_ : 0);
    bytes_ = arena.end() - int64(reinterpret_cast<uint64>(memory));
    memory_ = static_cast<char*>(memory) + bytes_;
  }

  int64 bytes() const {
    int64 const all = Forward<Op>(p_, item_, nullptr).bytes();
    int64 const small = is_small() ? Small<Op>(p_, item_.unit, nullptr).bytes() : 0;
    return bytes_ + (small > all ? small : all);
  }

  void run() {
    int const rows = item_.rows.end - item_.rows.begin;
    if (of_.averages) clear(sums_, rows * line_);
    Unit unit = item_.unit;
    for (int after = unit.kv_head + (of_.averages ? int(p_.heads_kv) : 1); unit.kv_head < after; ++unit.kv_head) {
      if (run_small(unit)) continue;
      ForwardItem const of_head{unit, item_.rows};
      Forward<Op> pass(p_, of_head, memory_);
      run_head(pass);
    }
    for (int n = 0; of_.averages && n < rows; ++n) put(sums_ + n * line_, 1, 0, item_.rows.begin + n);
  }

 private:
  bool is_small() const {
    bool const is_whole = item_.rows.begin == 0 && item_.rows.end == item_.unit.band.s_q;
    return kServesSmall<Op> && is_whole && !of_.dlse && Small<Op>::takes_keys(p_, item_.unit);
  }

  bool run_small(Unit const& unit) {
    if constexpr (kServesSmall<Op>)
      if (is_small()) {
        Small<Op>(p_, unit, memory_).weigh_all([this](int head, int i, Word const* weights, Word factor) {
          if (!of_.averages) put(weights, factor, head, i);
          else add(weights, factor / Word(p_.heads_q), {0, int(line_) - kAlignWords}, sums_ + i * line_);
        });
        return true;
      }
    return false;
  }

  void run_head(Forward<Op>& pass) {
    Prefetch none;
    pass.prefetch_ = &none;
    pass.begin();
    pass.for_each_tile([&](int head, int first, int count) {
      Range const keys = pass.begin_tile(head, first, count);
      for (int r = 0; r < count; r += pass.rows_from(r)) {
        Range const seen = multiply_strip(pass, r, pass.rows_from(r), keys);
        pass.upcoming_.step(3 * kTileRows);
        weigh_strip(pass, r, pass.rows_from(r), seen);
      }
    });
  }

  // Scores of a strip, and the largest of each of its rows; the keys, in whole vectors, of which there are scores.
  Range multiply_strip(Forward<Op>& pass, int r, int count, Range keys) {
    int const width = pass.has_gaps_ ? kPanel<Word> : kMostKeys;
    Range all{0, 0};
    for (int n = 0; n < kRows; ++n) {
      state_.most[n] = kNever<Word>;
      state_.total[n] = 0;
      sinks_[n] = n < count ? pass.sinks_[r + n] : kNever<Word>;
    }
    for (int begin = keys.begin / kPanel<Word> * kPanel<Word>; begin < keys.end; begin += width) {
      Range const there{begin, begin + width};
      for (int n = r; n < r + count && pass.has_gaps_; ++n)
        pass.row_[n].kept = common(those_in(pass.row_[n].ranges, there).hull(), there);
      Seen const seen = pass.seen_by_strip(r, count, begin);
      if (is_empty(seen.keys)) continue;
      pass.prefetch_terms(r, count, seen.keys);
      Range const columns = columns_of<Word>(seen.keys, begin);
      pass.multiply_keys(count, pass.queries_ + r * pass.row_words_, pass.k_, begin, columns, {scores_ + begin, line_});
      finish_scores(pass, r, count, begin, columns, seen);
      if (!is_empty(all)) hide(count, {all.end, begin + columns.begin});
      all = {is_empty(all) ? begin + columns.begin : all.begin, begin + columns.end};
    }
    return all;
  }

  void finish_scores(Forward<Op>& pass, int r, int count, int begin, Range columns, Seen const& seen) {
    Terms const terms = pass.has_gaps_ ? pass.scores_.terms : terms_of(pass.scores_, seen);
    for (int n = 0; n < count; ++n) {
      Word* const scores = scores_ + n * line_ + begin;
      Word most;
      if (terms == kBand && !pass.has_gaps_) {
        Range const kept = common(pass.row_[r + n].kept, seen.keys);
        most = largest_in_band(columns, is_empty(kept) ? kept : Range{kept.begin - begin, kept.end - begin}, scores);
      } else {
        most = Scores<Word>::finish(terms, pass.described(r + n, begin, seen.keys), columns, scores);
      }
      if (most > state_.most[n]) state_.most[n] = most;
    }
  }

  // Keys between blocks, which no row of the strip looks at.
  void hide(int count, Range keys) {
    for (int n = 0; n < count; ++n)
      for (int c = keys.begin; c < keys.end; c += kCount<Word>) store(scores_ + n * line_ + c, broadcast(kNever<Word>));
  }

  // Scores become weights, which are written, averaged or multiplied by their gradients.
  void weigh_strip(Forward<Op>& pass, int r, int count, Range keys) {
    for (int n = 0; n < count; ++n) {
      Word* const scores = scores_ + n * line_ + keys.begin;
      Word const most = state_.most[n], shift = most == kNever<Word> ? 0 : most, factor = pass.scores_.to_exponent;
      int const columns = keys.end - keys.begin;
      state_.total[n] = is_rough_ ? weigh<Rough<Op>, false>(scores, columns, shift, factor, {nullptr, 0}, scores)
                                  : weigh<Exact<Op>, false>(scores, columns, shift, factor, {nullptr, 0}, scores);
      finished_.factor[n] = state_.total[n] == 0 ? 0 : 1 / state_.total[n];
    }
    if (of_.dlse || p_.sinks) finish_rows(state_, sinks_, pass.scores_.to_score, count, finished_);
    for (int n = 0; n < count; ++n) {
      int const head = pass.row_[r + n].head, i = pass.row_[r + n].i;
      Word* const weights = scores_ + n * line_;
      Word const factor = finished_.factor[n];
      if (of_.dlse) {
        put_gradient(weights, n, keys, head, i, pass.tensors_.lse(head) + i);
        continue;
      }
      bool const is_whole = !of_.averages || factor != factor;  // NaN, which the whole row becomes
      if (is_whole) {
        clear(weights, keys.begin);
        clear(weights + keys.end, line_ - keys.end);
      }
      if (!of_.averages) put(weights, factor, head, i);
      else
        add(weights, factor / Word(p_.heads_q), is_whole ? Range{0, int(line_)} : keys,
            sums_ + (i - item_.rows.begin) * line_);
    }
  }

  static void add(Word const* weights, Word factor, Range keys, Word* sums) {
    for (int c = keys.begin; c < keys.end; c += kCount<Word>)
      store(sums + c, load(sums + c) + load(weights + c) * factor);
  }

  // One row of results, contiguous (B, H_q, S_q, S_kv), or averaged (B, S_q, S_kv).
  void put(Word const* weights, Word factor, int head, int i) const {
    int64 const sequence = item_.unit.b * (of_.averages ? 1 : p_.heads_q) + head, s_kv = item_.unit.band.s_kv;
    char* const to = static_cast<char*>(of_.weights) + (sequence * p_.rows_q + i) * s_kv * bytes_of(of_.weights_dtype);
    write_row(weights, s_kv, factor, of_.weights_dtype, to);
  }

  void put_gradient(Word const* weights, int n, Range keys, int head, int i, int64 at) const {
    Word const* const dp = dweights_of<Word>(of_, item_.unit, head, i);
    Vector<Word> total{};
    for (int c = keys.begin; c < keys.end; c += kCount<Word>) {
      Vector<Word> const p = load(weights + c);
      total += p == Vector<Word>{} ? p : p * load(dp + c);
    }
    static_cast<Word*>(of_.dlse)[at] = -sum(total) * finished_.factor[n];
    static_cast<Word*>(p_.lse)[at] = finished_.lse[n];
    static_cast<Word*>(p_.lse_low)[at] = finished_.low[n];
  }

  AttentionParams const& p_;
  StatisticsParams const& of_;
  ForwardItem const& item_;
  bool is_rough_;
  int64 line_, bytes_;  // line_: words from row to row
  Word *scores_, *sums_;
  void* memory_;  // of the pass over a head
  RowState<Word, kRows> state_;
  FinishedRows<Word, kRows> finished_;
  alignas(64) Word sinks_[kRows];
};

}  // namespace
