// From products to weights and gradients of scores, a strip of rows at a time.
#pragma once

#include "rows.h"

namespace {

// What a row's lse and delta are for: weight = 2^(((score * to_score - lse) - low) * log2 e).
template <class Word>
struct RowTerms {
  Word lse, low, delta;
};

template <class Word>
inline Vector<Word> log_of_weight(Vector<Word> score, Word to_score, RowTerms<Word> const& row) {
  return fused<Word>(score, broadcast(to_score), broadcast(-row.lse)) - broadcast(row.low);
}

template <class Op>
inline Vector<typename Op::Word> weight_of(Vector<typename Op::Word> score, typename Op::Word to_score,
                                           RowTerms<typename Op::Word> const& row) {
  using Word = typename Op::Word;
  return power_of_2<Op::kDegree>(log_of_weight(score, to_score, row) * Word(kLog2E));
}

// Two rows of weights and score gradients as the products read them: score gradients also row by row, as left operand
// of dq; both stacked, as left operands of dv and dk. `rows` begin at the first column.
template <class Word>
struct PairTarget {
  Matrix<Word> rows;          // two of them; null if dq is not wanted
  Word *weights, *gradients;  // the line of the two rows, or two lines
  int64 line;                 // words from line to line
};

template <class Op>
inline void store_pair(Vector<typename Op::Word> const (&p)[2], Vector<typename Op::Word> const (&g)[2], int c,
                       int first, PairTarget<typename Op::Word> const& to) {
  using Word = typename Op::Word;
  if constexpr (Op::kPerWord == 1) {
    for (int n = 0; n < 2; ++n) {
      store(to.weights + n * to.line + c, p[n]);
      store(to.gradients + n * to.line + c, g[n]);
      store(to.rows.at + n * to.rows.stride + c - first, g[n]);
    }
  } else {
    Vector<Word> const gradients = Op::joined(g[0], g[1]);
    store(to.weights + c, in_pairs(Op::joined(p[0], p[1])));
    store(to.gradients + c, in_pairs(gradients));
    constexpr int kHalf = sizeof(gradients) / 2;
    Word* const upper = to.rows.at + (c - first) / 2;
    __builtin_memcpy(upper, &gradients, kHalf);
    __builtin_memcpy(upper + to.rows.stride, reinterpret_cast<char const*>(&gradients) + kHalf, kHalf);
  }
}

// Rows of a strip: products of queries and keys, of dout and values.
template <class Word>
struct Strip {
  Matrix<Word> scores, dweights;
};

// Query rows of which a few keys of a block meet some, and tiles of keys made of them: what lies outside adds nothing to
// the gradients of these keys. Where a tile needs numbers that nothing was stored to, they become zero.
template <class Op, int KEYS>
class Filled {
  using Word = typename Op::Word;
  static constexpr int kKeys = 2, kCount = KEYS / kKeys;

 public:
  static constexpr int64 kStride = KEYS + 16;  // words from row to row, no power of two
  Word *weights, *gradients;                   // lines of rows

  void reset() {
    for (Range& rows : rows_) rows = {0, 0};
  }

  // A strip stores the columns of `seen`; or a piece of it. Rows come in order.
  void add(Range seen, Range rows) {
    int const end = (seen.end + kKeys - 1) / kKeys;
    for (int n = seen.begin / kKeys, next; n < end; n = next) {
      Range const before = rows_[n];
      for (next = n + 1; next < end && rows_[next].begin == before.begin && rows_[next].end == before.end;) ++next;
      Range const all{is_empty(before) ? rows.begin : before.begin, rows.end};
      if (before.end < rows.begin && !is_empty(before)) clear({before.end, rows.begin}, {n * kKeys, next * kKeys});
      for (int m = n; m < next; ++m) rows_[m] = all;
    }
  }

  // Makes tiles of the keys, of which there are `count`.
  void finish(int count) {
    tiles_ = 0;
    for (int n = 0, end; n * kKeys < count; n = end) {
      Range rows = rows_[n];
      end = n + 1;
      if (is_empty(rows)) continue;
      for (; end < n + kTileRows / kKeys && end * kKeys < count && !is_empty(common(rows, rows_[end])); ++end)
        rows = hull(rows, rows_[end]);
      for (int m = n; m < end; ++m) {
        Range const columns{m * kKeys, (m + 1) * kKeys};
        if (rows_[m].begin > rows.begin) clear({rows.begin, rows_[m].begin}, columns);
        if (rows_[m].end < rows.end) clear({rows_[m].end, rows.end}, columns);
      }
      tile_[tiles_++] = {{n * kKeys, fa::smaller(end * kKeys, count)}, rows};
    }
  }

  // Calls step with the keys of each tile, and its rows.
  template <class Step>
  void each(Step const& step) const {
    for (int n = 0; n < tiles_; ++n) step(tile_[n].keys, tile_[n].rows);
  }

 private:
  void clear(Range rows, Range columns) const {
    for (int r = rows.begin; r < rows.end; r += Op::kPerWord)
      for (Word* const lines : {weights, gradients})
        __builtin_memset(lines + r / Op::kPerWord * kStride + columns.begin, 0,
                         (columns.end - columns.begin) * sizeof(Word));
  }

  struct OfKeys {
    Range keys, rows;
  };
  Range rows_[kCount];
  OfKeys tile_[kCount];
  int tiles_ = 0;
};

// Where gradients of a row's scores go that are those of a bias.
struct BiasTarget {
  char* at;  // of column 0; null where there is none
  int64 dtype;
  bool is_shared;  // all keys share one number
  bool adds;       // to what other rows, heads or sequences have left; else each is written once
};

template <class T, class V>
inline void put_some(V gradients, Range there, int c, bool adds, T* to) {
  for (int n = there.begin; n < there.end; ++n) {
    auto const before = adds ? to_float(to[n]) : 0;
    round_to(decltype(gradients[0] + 0)(gradients[n - c] + before), to + n);
  }
}

template <class Word>
inline void put_bias_gradient(Vector<Word> gradients, int c, Range kept, BiasTarget const& to) {
  auto const put = [&](auto* at) {
    Range const there = common(kept, {c, c + kCount<Word>});
    if (there.end - there.begin < kCount<Word>) put_some(gradients, there, c, to.adds, at);
    else if constexpr (std::is_same_v<decltype(at), Word*>)
      store(at + c, to.adds ? load(at + c) + gradients : gradients);
    else store(at + c, gradients);
  };
  if constexpr (sizeof(Word) == 8) return put(reinterpret_cast<double*>(to.at));
  else if (to.dtype == fa::cpu::kFloat32) put(reinterpret_cast<float*>(to.at));
  else if (to.dtype == fa::cpu::kBfloat16) put(reinterpret_cast<Bfloat16*>(to.at));
  else put(reinterpret_cast<Float16*>(to.at));
}

// What the two rows of a pair take besides products: how products become scores, what dropout drops.
template <class Word>
struct PairTerms {
  typename Scores<Word>::Row row[2];
  RowTerms<Word> end[2];
  Dropped dropped[2];
  BiasTarget dbias[2];
  Word to_score, survivor;  // survivor: the factor of weights that dropout leaves
};

// Two rows of products become weights, after dropout, and gradients of products.
template <class Op, Terms TERMS, bool DROPS>
inline void weigh_pair(Strip<typename Op::Word> const& strip, int r, Range columns,
                       PairTerms<typename Op::Word> const& given, PairTarget<typename Op::Word> const to) {
  using Word = typename Op::Word;
  using V = Vector<Word>;
  PairTerms<Word> const of = given;
  V totals[2]{};
  for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
    V p[2], g[2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      V const raw = load(strip.scores.at + (r + n) * strip.scores.stride + c);
      V dp = load(strip.dweights.at + (r + n) * strip.dweights.stride + c), slope = broadcast(Word(1));
      V const score = Scores<Word>::template score<TERMS>(of.row[n], c, raw, &slope);
      V const weight = weight_of<Op>(score, of.to_score, of.end[n]);
      auto const is_kept = score != broadcast(kNever<Word>);
      p[n] = weight;
      if (DROPS) {
        p[n] = survivors<Word>(weight * of.survivor, of.dropped[n], c - columns.begin);
        dp = survivors<Word>(dp * of.survivor, of.dropped[n], c - columns.begin);
      }
      g[n] = weight * (dp - of.end[n].delta);
      bool const hides = TERMS != kBand || c < of.row[n].kept.begin || c + kCount<Word> > of.row[n].kept.end;
      if (hides) {
        p[n] = is_kept ? p[n] : V{};
        g[n] = is_kept ? g[n] : V{};
      }
      if (TERMS >= kBiased && of.dbias[n].at) {
        if (of.dbias[n].is_shared) totals[n] += g[n];
        else put_bias_gradient<Word>(g[n], c, of.row[n].kept, of.dbias[n]);
      }
      if (TERMS == kAll) g[n] = is_kept ? g[n] * slope : V{};
    }
    store_pair<Op>(p, g, c, columns.begin, to);
  }
  for (int n = 0; n < 2 && TERMS >= kBiased; ++n)
    if (of.dbias[n].at && of.dbias[n].is_shared) *reinterpret_cast<Word*>(of.dbias[n].at) += sum(totals[n]);
}

}  // namespace
