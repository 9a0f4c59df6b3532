// From products to weights and gradients of scores, a strip of rows at a time.
#pragma once

#include "rows.h"

namespace {

// What a row's lse and delta are for: weight = 2^(((score * to_score - lse) - low) * log2 e).
template <class Word>
struct RowTerms {
  Word lse, low, delta;
};

template <class Op>
inline Vector<typename Op::Word> weight_of(Vector<typename Op::Word> score, typename Op::Word to_score,
                                           RowTerms<typename Op::Word> const& row) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  V const x = fused<Word>(score, broadcast(to_score), broadcast(-row.lse)) - broadcast(row.low);
  return power_of_2<Op::kDegree>(x * Word(kLog2E));
}

// Two rows of weights and score gradients as the products read them: score gradients also row by row, as left operand
// of dq; both stacked in panels, as right operands of dv and dk. `row` and panels begin at the first column.
template <class Word>
struct PairTarget {
  Matrix<Word> rows;            // two of them; null if dq is not wanted
  Word *weights, *gradients;    // the line of the two rows in the first panel
  int64 panel;                  // words from panel to panel
};

template <class Op>
inline void store_pair(Vector<typename Op::Word> const (&p)[2], Vector<typename Op::Word> const (&g)[2], int c,
                       int first, PairTarget<typename Op::Word> const& to) {
  using Word = typename Op::Word;
  int64 const at = c / kPanel<Word> * to.panel + c % kPanel<Word>;
  if constexpr (Op::kPerWord == 1) {
    for (int n = 0; n < 2; ++n) {
      store(to.weights + at + n * kPanel<Word>, p[n]);
      store(to.gradients + at + n * kPanel<Word>, g[n]);
      store(to.rows.at + n * to.rows.stride + c - first, g[n]);
    }
  } else {
    Vector<Word> const gradients = Op::joined(g[0], g[1]);
    store(to.weights + at, in_pairs(Op::joined(p[0], p[1])));
    store(to.gradients + at, in_pairs(gradients));
    constexpr int kHalf = sizeof(gradients) / 2;
    Word* const upper = to.rows.at + (c - first) / 2;
    __builtin_memcpy(upper, &gradients, kHalf);
    __builtin_memcpy(upper + to.rows.stride, reinterpret_cast<char const*>(&gradients) + kHalf, kHalf);
  }
}

// Rows of a strip: products of queries and keys, of dout and values; and the derivative of softcap.
template <class Word>
struct Strip {
  Matrix<Word> scores, dweights;
  Word* slopes;  // of one row; null without softcap
};

// Two rows of raw products where nothing but a band hides pairs.
template <class Op>
inline void plain_pair(Strip<typename Op::Word> const& strip, int r, Range columns, Range const (&kept)[2],
                       typename Op::Word to_score, RowTerms<typename Op::Word> const (&row)[2],
                       PairTarget<typename Op::Word> const& to) {
  using Word = typename Op::Word;
  Range const both = common(kept[0], kept[1]);
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
    Vector<Word> p[2], g[2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      p[n] = weight_of<Op>(load(strip.scores.at + (r + n) * strip.scores.stride + c), to_score, row[n]);
      g[n] = p[n] * (load(strip.dweights.at + (r + n) * strip.dweights.stride + c) - row[n].delta);
      if (__builtin_expect(c < both.begin || c + kCount<Word> > both.end, 0)) {
        auto const is_kept = inside<Word>(kept[n], c);
        p[n] = is_kept ? p[n] : Vector<Word>{};
        g[n] = is_kept ? g[n] : Vector<Word>{};
      }
    }
    store_pair<Op>(p, g, c, columns.begin, to);
  }
}

// One row in place, whatever the features: products become weights, after dropout, and gradients of finished scores.
template <class Op>
inline void general_row(typename Op::Word* scores, typename Op::Word* dweights, Range columns, Range kept,
                        Scores<typename Op::Word> const& of, RowTerms<typename Op::Word> const& row,
                        Dropped const& dropped) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  V const never = broadcast(kNever<Word>), zero{};
  Word const survivor = Word(of.p.dropout_scale);
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
    V const score = load(scores + c);
    auto const is_kept = of.is_plain ? inside<Word>(kept, c) : (Integers<Word>)(score != never);
    V p = weight_of<Op>(score, of.to_score, row), dp = load(dweights + c), after = p;
    if (dropped.bits) {
      after = survivors<Word>(p * survivor, dropped, c - columns.begin);
      dp = survivors<Word>(dp * survivor, dropped, c - columns.begin);
    }
    store(scores + c, is_kept ? after : zero);
    store(dweights + c, is_kept ? p * (dp - row.delta) : zero);
  }
}

// Finished rows of a strip, two at a time.
template <class Op>
inline void store_rows(Strip<typename Op::Word> const& strip, int r, Range columns,
                       PairTarget<typename Op::Word> const& to) {
  using Word = typename Op::Word;
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
    Vector<Word> p[2], g[2];
    for (int n = 0; n < 2; ++n) {
      p[n] = load(strip.scores.at + (r + n) * strip.scores.stride + c);
      g[n] = load(strip.dweights.at + (r + n) * strip.dweights.stride + c);
    }
    store_pair<Op>(p, g, c, columns.begin, to);
  }
}

// Adds a row of score gradients to dbias; `step` is 1, or 0 where all keys share one number.
template <class Word>
inline void add_bias_gradient(Word const* gradients, int count, int64 step, Word* to) {
  Vector<Word> total{};
  int j = 0;
  for (; j + kCount<Word> <= count; j += kCount<Word>) {
    if (step) store(to + j, load(to + j) + load(gradients + j));
    else total += load(gradients + j);
  }
  if (!step) *to += sum(total);
  for (; j < count; ++j) to[j * step] += gradients[j];
}

template <class Word>
inline void multiply_row(Word* row, Range columns, Word const* factors) {
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) store(row + c, load(row + c) * load(factors + c));
}

}  // namespace
