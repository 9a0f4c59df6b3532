// Online softmax of strips of a few query rows, and the results of a finished row.
#pragma once

#include "seen.h"

namespace {

// The largest score so far of each row of a tile, and the sum of its weights.
template <class Word, int ROWS>
struct RowState {
  alignas(64) Word most[ROWS], total[ROWS];
};

// What of a row's weights survives: random bits, one for each column, from the first column on.
struct Dropped {
  uint16 const* bits;
  int threshold;
};

template <class Word>
inline Vector<Word> survivors(Vector<Word> x, Dropped const& dropped, int c) {
  return bits_at<Word>(dropped.bits + c) >= typename Lanes<Word>::Integer(dropped.threshold) ? x : Vector<Word>{};
}

// The largest of a row's scores in each lane; where only a range hides some, they are marked first.
template <class Word>
inline Vector<Word> lanes_in_range(Range columns, Range kept, Word* scores) {
  using V = Vector<Word>;
  constexpr int kStep = kCount<Word>;
  V a = broadcast(kNever<Word>), b = a;
  auto const mark = [&](int c) {
    V const x = inside<Word>(kept, c) ? load(scores + c) : broadcast(kNever<Word>);
    store(scores + c, x);
    a = larger(x, a);  // NaN is not larger; the exponential passes it on
  };
  int c = columns.begin, end = columns.end;
  for (; c < end && c < kept.begin; c += kStep) mark(c);
  for (; end > c && end > kept.end; end -= kStep) mark(end - kStep);
  for (; c + 2 * kStep <= end; c += 2 * kStep) {
    a = larger(load(scores + c), a);
    b = larger(load(scores + c + kStep), b);
  }
  if (c < end) a = larger(load(scores + c), a);
  return larger(a, b);
}

template <class Word>
inline Word largest_in_band(Range columns, Range kept, Word* scores) {
  return largest(lanes_in_range(columns, kept, scores));
}

// Weights 2^(factor * (score - shift)) of whole vectors of scores, as left operand of the product with values; their sum.
// flatten: GCC 12 leaves the exponential of narrow vectors a function, and a call spills every register.
template <class Op, bool DROPS>
__attribute__((flatten)) inline typename Op::Word weigh(typename Op::Word const* scores, int count,
                                                        typename Op::Word shift, typename Op::Word factor,
                                                        Dropped const& dropped, typename Op::Word* weights) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  constexpr int kStep = kCount<Word>;
  V const shifts = broadcast(shift), factors = broadcast(factor);
  V left{}, right{};
  auto const weight = [&](int c, V& total) {
    V const w = power_of_2<Op::kDegree>((load(scores + c) - shifts) * factors);
    total += w;
    return DROPS ? survivors<Word>(w, dropped, c) : w;
  };
  int c = 0;
  for (; c + 2 * kStep <= count; c += 2 * kStep) {
    V const x = weight(c, left), y = weight(c + kStep, right);
    if constexpr (Op::kPerWord == 2) {
      store(weights + c / 2, Op::joined(x, y));
    } else {
      store(weights + c, x);
      store(weights + c + kStep, y);
    }
  }
  if (c < count) {
    V const x = weight(c, left);
    if constexpr (Op::kPerWord == 2) store(weights + c / 2, Op::joined(x, V{}));
    else store(weights + c, x);
  }
  return sum(left + right);
}

// Updates a row's state by its scores, whose largest is `found`. The factor by which earlier sums are rescaled.
template <class Op, int ROWS>
inline typename Op::Word soften(typename Op::Word const* scores, int count, typename Op::Word found,
                                typename Op::Word factor, Dropped const& dropped,
                                RowState<typename Op::Word, ROWS>& state, int row, typename Op::Word* weights) {
  using Word = typename Op::Word;
  Word const before = state.most[row];
  Word shrink = 1;
  if (found > before) {
    shrink = before == kNever<Word> ? 0 : power_of_2<Op::kDegree>(broadcast((before - found) * factor))[0];
    state.most[row] = found;
    state.total[row] *= shrink;
  }
  Word const most = state.most[row],
             shift = most == kNever<Word> ? 0 : most;  // no score yet, or none that has an order
  state.total[row] += dropped.bits ? weigh<Op, true>(scores, count, shift, factor, dropped, weights)
                                   : weigh<Op, false>(scores, count, shift, factor, dropped, weights);
  return shrink;
}

// Finished rows: the factor that normalises their sums, and lse in two parts. The sink is a weight without a value.
template <class Word, int ROWS>
struct FinishedRows {
  alignas(64) Word factor[ROWS], lse[ROWS], low[ROWS];
};

template <class Word>
inline Vector<Word> fused(Vector<Word> a, Vector<Word> b, Vector<Word> c) {
  return a * b + c;
}

template <class Word, int ROWS>
inline void finish_rows(RowState<Word, ROWS> const& state, Word const* sinks, Word to_score, int count,
                        FinishedRows<Word, ROWS>& rows) {
  using V = Vector<Word>;
  V const never = broadcast(kNever<Word>), scale = broadcast(to_score), zero{};
  for (int r = 0; r < count; r += kCount<Word>) {
    V const total = load(state.total + r), raw = load(state.most + r);
    auto const is_empty = total == zero;
    V const most = is_empty ? zero : raw == never ? zero : raw;  // a row of NaN has no largest score
    V const score = most * scale, rounding = fused<Word>(most, scale, -score), sink = load(sinks + r);
    V const keys = is_empty ? never : score, top = larger(sink, keys);
    V const safe_top = top == never ? zero : top;
    V const shrink = power_of_2<13>((keys - safe_top) * Word(kLog2E));
    V const all = total * shrink + power_of_2<13>((sink - safe_top) * Word(kLog2E));
    V const log = natural_log(all) + (is_empty ? zero : rounding);
    V const lse = top == never ? never : safe_top + log;
    store(rows.factor + r, all == zero ? zero : shrink / all);
    store(rows.lse + r, lse);
    V const low = (safe_top - lse) + log;
    store(rows.low + r, lse - lse == zero ? low : zero);
  }
}

}  // namespace
