// From products of queries and keys to scores, as fastattn/spec.py has it: scale, softcap, bias, ALiBi, and what is not
// kept becomes -inf.
#pragma once

#include "attention.h"
#include "intervals.h"
#include "pack.h"
#include "random.h"

namespace {

using namespace fa::cpu;

constexpr int kMostKeys = 512;  // of a block
constexpr int kAlignWords = 16;

template <class Word>
constexpr Word kNever = -__builtin_inf();

// Bytes and ids as integers of the width of a word.
template <class Word>
inline Integers<Word> bytes_at(uint8 const* p) {
  if constexpr (sizeof(Word) == 8) return bytes_in_longs(p);
  else return bytes_in_ints(p);
}

template <class Word>
inline Integers<Word> ids_at(int32 const* p) {
  return __builtin_convertvector(loaded<typename Lanes<Word>::Narrow32>(p), Integers<Word>);
}

template <class Word>
inline Integers<Word> bits_at(uint16 const* p) {
  return __builtin_convertvector(loaded<typename Lanes<Word>::Narrow16>(p), Integers<Word>);
}

// Whole vectors that hold `keys`, counted in columns from the key `first` on.
template <class Word>
inline Range columns_of(Range keys, int first) {
  return {(keys.begin - first) / kCount<Word> * kCount<Word>, int(rounded_up(keys.end - first, kCount<Word>))};
}

// Lanes of a vector whose column is in the range.
template <class Word>
inline Integers<Word> inside(Range range, int column) {
  using Integer = typename Lanes<Word>::Integer;
  Integers<Word> const columns = lane_numbers<Word>() + Integer(column);
  return (columns >= Integer(range.begin)) & (columns < Integer(range.end));
}

// What stands between the products of a strip and its scores: nothing but the band; what hides pairs; a bias, too; all.
enum Terms { kBand, kHidden, kBiased, kAll };

// Whether loops over pairs are compiled for each kind of terms. Else the code for all terms serves every kind, with the same
// bits: processors without AVX2 are rare, and their kernels are built with all others.
#if defined(__AVX2__) || !defined(__x86_64__)
constexpr bool kIsSpecialised = true;
#else
constexpr bool kIsSpecialised = false;
#endif

// The scores of one unit.
template <class Word>
class Scores {
  using V = Vector<Word>;

 public:
  // A row, and where its terms lie, counted in columns of a block of keys.
  struct Row {
    Range kept;  // columns that the band keeps: of nothing else a term is read
    char const* bias;
    int64 bias_dtype;
    uint8 const* mask;
    int32 const* ids;
    int32 id;
    Word scale, cap, inverse_cap, slope, diagonal;
  };

  FA_CALLED Scores(AttentionParams const& p, Unit const& unit)
      : p(p), unit(unit), intervals(p, unit), group_(int(p.heads_q / p.heads_kv)) {
    bool const hides = p.mask || p.segments_q || p.intervals;
    terms = p.scale <= 0 || p.softcap || p.slopes ? kAll : p.bias ? kBiased : hides ? kHidden : kBand;
    bool const is_raw = terms <= kHidden;
    scale_ = is_raw ? 1 : Word(p.scale);
    to_score = is_raw ? Word(p.scale) : 1;
    to_exponent = Word(is_raw ? p.scale * kLog2E : kLog2E);
  }

  AttentionParams const& p;
  Unit const& unit;
  Intervals intervals;
  Terms terms;
  Word to_score;  // a finished number times this is a score: without bias and the like, products are finished
  Word to_exponent;  // and times this one an exponent of 2

  int group() const { return group_; }
  int first_head() const { return unit.kv_head * group_; }
  Range kept(int i) const { return fa::tile_range(unit.band, i, i + 1); }

  Word const* slopes() const { return static_cast<Word const*>(p.slopes); }
  Word sink(int head) const {
    return p.sinks ? static_cast<Word const*>(p.sinks)[unit.b * p.sinks_stride + head] : kNever<Word>;
  }
  int32 const* segments_q() const { return p.segments_q + unit.b * p.segments_q_stride; }
  int32 const* segments_kv() const { return p.segments_kv + unit.b * p.segments_kv_stride; }
  uint8 const* mask(int head, int i) const {
    return p.mask + unit.b * p.mask_batch + head * p.mask_head + i * p.mask_row;
  }

  // Row i and the block of keys that begins at `first`. `n` tells two rows apart that are read at once.
  Row row(int head, int i, int first, Range kept, int n = 0) {
    Row row{kept, nullptr, p.bias_dtype, nullptr, nullptr, 0, scale_, Word(p.softcap), 0, 0, 0};
    if (p.softcap) row.inverse_cap = Word(1 / p.softcap);
    if (p.slopes) row.slope = slopes()[unit.b * p.slopes_stride + head];
    row.diagonal = Word(unit.band.diagonal + i - first);
    if (p.segments_q) {
      row.id = segments_q()[i];
      row.ids = segments_kv() + first;
    }
    if (p.mask) row.mask = p.mask_key == 1 ? mask(head, i) + first : copied_mask(head, i, first, kept, mask_[n]);
    if (p.bias) {
      bool const is_readable = p.bias_key == 1 && sizeof(Word) == (p.bias_dtype == fa::cpu::kFloat64 ? 8 : 4);
      if (is_readable) {
        row.bias = bias_row(head, i) + first * bytes_of(p.bias_dtype);
      } else {
        row.bias = copied_bias(head, i, first, kept, bias_[n]);
        row.bias_dtype = sizeof(Word) == 8 ? fa::cpu::kFloat64 : fa::cpu::kFloat32;
      }
    }
    return row;
  }

  // Hides what lies between the ranges of a row that row() has described, in place of what it read of a mask.
  FA_CALLED void hide_gaps(Row& row, Ranges ranges, int first, int n = 0) {
    uint8* const to = mask_[n];
    Range const kept = row.kept;
    if (!row.mask) __builtin_memset(to + kept.begin, 1, kept.end - kept.begin);
    else if (row.mask != to) __builtin_memcpy(to + kept.begin, row.mask + kept.begin, kept.end - kept.begin);
    for (int m = 1; m < ranges.count; ++m) {
      Range const gap = common({ranges.at[m - 1].end - first, ranges.at[m].begin - first}, kept);
      if (!is_empty(gap)) __builtin_memset(to + gap.begin, 0, gap.end - gap.begin);
    }
    row.mask = to;
  }

  // Brings what a mask and a bias have for row i and `keys`: their rows lie far apart.
  void prefetch_mask(int head, int i, Range keys) const {
    if (p.mask && p.mask_row && p.mask_key == 1) prefetch(mask(head, i) + keys.begin, keys.end - keys.begin);
  }
  void prefetch_bias(int head, int i, Range keys) const {
    int64 const bytes = bytes_of(p.bias_dtype);
    if (p.bias && p.bias_row && p.bias_key == 1)
      prefetch(bias_row(head, i) + keys.begin * bytes, (keys.end - keys.begin) * bytes);
  }

  // Those of row i, but the mask of the row `ahead` of it.
  void prefetch_terms(int head, int i, int ahead, Range keys) const {
    prefetch_bias(head, i, keys);
    if (i + ahead < unit.band.s_q) prefetch_mask(head, i + ahead, keys);
  }

  // Products of the columns from c on become scores. `slope` takes the derivative of softcap.
  template <Terms TERMS>
  static V score(Row const& row, int c, V x, V* slope = nullptr) {
    bool const is_edge = c < row.kept.begin || c + kCount<Word> > row.kept.end;
    if (__builtin_expect(!is_edge, 1)) return inner<TERMS>(row, c, x, slope);
    if (TERMS == kBand) return inside<Word>(row.kept, c) ? x : broadcast(kNever<Word>);
    return edge<TERMS>(row, c, x, slope);
  }

  // The bias of the columns from c on; zeros where it may not be read.
  static V bias(Row const& row, int c) {
    if (c >= row.kept.begin && c + kCount<Word> <= row.kept.end) return bias_at(row.bias, row.bias_dtype, c);
    Word some[kCount<Word>] = {};
    if (is_empty(common(row.kept, {c, c + kCount<Word>}))) return V{};
    copy_kept(row, c, row.bias, bytes_of(row.bias_dtype), some);
    return bias_at(reinterpret_cast<char const*>(some), row.bias_dtype, 0);
  }

  // Products of a strip's row become scores in place; the largest. `columns` are whole vectors.
  template <Terms TERMS>
  static Word finish(Row const row, Range columns, Word* scores) {
    V most = broadcast(kNever<Word>);
    for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
      V const x = score<TERMS>(row, c, load(scores + c));
      store(scores + c, x);
      most = larger(x, most);  // NaN is not larger; the exponential passes it on
    }
    return largest(most);
  }

  // The same for terms that are known when it runs.
  static __attribute__((noinline)) Word finish(Terms terms, Row const& row, Range columns, Word* scores) {
    switch (kIsSpecialised ? terms : kAll) {
      case kBand:
      case kHidden: return finish<kHidden>(row, columns, scores);
      case kBiased: return finish<kBiased>(row, columns, scores);
      default: return finish<kAll>(row, columns, scores);
    }
  }

  // Whether a pair is kept, for the rare cases that go pair by pair. A bias of -inf is a mask.
  bool keeps(int head, int i, int j) const {
    if (!fa::keep(unit.band, i, j)) return false;
    if (p.mask && !mask(head, i)[j * p.mask_key]) return false;
    if (p.segments_q && segments_q()[i] != segments_kv()[j]) return false;
    if (p.intervals && !intervals.hold(head, i, j)) return false;
    return !p.bias || number_at(bias_row(head, i), p.bias_dtype, j * p.bias_key) != -__builtin_inf();
  }

 private:
  static void prefetch(void const* from, int64 bytes) {
    for (int64 n = 0; n < bytes; n += 64) prefetch_line(static_cast<char const*>(from) + n);
  }

  static V bias_at(char const* bias, int64 dtype, int c) {
    if constexpr (sizeof(Word) == 8) {
      return load(reinterpret_cast<double const*>(bias) + c);
    } else {
      if (dtype == fa::cpu::kFloat32) return load(reinterpret_cast<float const*>(bias) + c);
      if (dtype == fa::cpu::kBfloat16) return load(reinterpret_cast<Bfloat16 const*>(bias) + c);
      return load(reinterpret_cast<Float16 const*>(bias) + c);
    }
  }

  template <Terms TERMS>
  static V inner(Row const& row, int c, V x, V* slope) {
    V const never = broadcast(kNever<Word>);
    if (TERMS >= kBiased) x = x * row.scale;
    if (TERMS == kAll && row.cap != 0) {
      V const capped = hyperbolic_tangent(x * row.inverse_cap);
      x = row.cap * capped;
      if (slope) *slope = 1 - capped * capped;
    }
    if (TERMS >= kBiased && row.bias) {
      V const bias = bias_at(row.bias, row.bias_dtype, c);
      x = bias == never ? never : x + bias;
    }
    if (TERMS == kAll && row.slope != 0) {
      V const lanes = __builtin_convertvector(lane_numbers<Word>(), V), distance = (lanes + Word(c)) - row.diagonal;
      x -= row.slope * (distance < 0 ? -distance : distance);
    }
    if (TERMS >= kHidden && row.mask) x = bytes_at<Word>(row.mask + c) != 0 ? x : never;
    if (TERMS >= kHidden && row.ids) x = ids_at<Word>(row.ids + c) == row.id ? x : never;
    return x;
  }

  // Of what lies in the columns from c on, so much as is kept.
  static void copy_kept(Row const& row, int c, void const* from, int64 bytes, void* to) {
    Range const there = common(row.kept, {c, c + kCount<Word>});
    __builtin_memcpy(static_cast<char*>(to) + (there.begin - c) * bytes,
                     static_cast<char const*>(from) + there.begin * bytes, (there.end - there.begin) * bytes);
  }

  // Columns of which some are not kept: the terms of those that are, copied, because the others may not be read.
  template <Terms TERMS>
  static __attribute__((noinline)) V edge(Row row, int c, V x, V* slope) {
    Range const there = common(row.kept, {c, c + kCount<Word>});
    if (is_empty(there)) return broadcast(kNever<Word>);
    uint8 mask[kCount<Word>] = {};
    int32 ids[kCount<Word>] = {};
    Word bias[kCount<Word>] = {};
    if (TERMS >= kHidden && row.mask) copy_kept(row, c, row.mask, 1, mask);
    if (TERMS >= kHidden && row.ids) copy_kept(row, c, row.ids, sizeof(int32), ids);
    if (TERMS >= kBiased && row.bias) copy_kept(row, c, row.bias, bytes_of(row.bias_dtype), bias);
    row.mask = row.mask ? mask : nullptr;
    row.ids = row.ids ? ids : nullptr;
    row.bias = row.bias ? reinterpret_cast<char const*>(bias) : nullptr;
    row.diagonal -= Word(c);
    return inside<Word>(there, c) ? inner<TERMS>(row, 0, x, slope) : broadcast(kNever<Word>);
  }

  char const* bias_row(int head, int i) const {
    return static_cast<char const*>(p.bias) +
           (unit.b * p.bias_batch + head * p.bias_head + i * p.bias_row) * bytes_of(p.bias_dtype);
  }

  uint8 const* copied_mask(int head, int i, int first, Range kept, uint8* to) const {
    uint8 const* const row = mask(head, i);
    for (int c = kept.begin; c < kept.end; ++c) to[c] = row[(first + c) * p.mask_key];
    return to;
  }

  char const* copied_bias(int head, int i, int first, Range kept, Word* to) const {
    with_dtype(p.bias_dtype, [&](auto const* type) {
      auto const* const row = reinterpret_cast<decltype(type)>(bias_row(head, i));
      for (int c = kept.begin; c < kept.end; ++c) to[c] = Word(to_float(row[(first + c) * p.bias_key]));
    });
    return reinterpret_cast<char const*>(to);
  }

  int group_;
  Word scale_;
  Word bias_[2][kMostKeys + kAlignWords];
  uint8 mask_[2][kMostKeys + kAlignWords];
};

// Calls step with a constant: the terms of a strip.
template <class Step>
inline auto with_terms(Terms terms, Step const& step) {
  switch (kIsSpecialised ? terms : kAll) {
    case kBand: return step(std::integral_constant<Terms, kBand>{});
    case kHidden: return step(std::integral_constant<Terms, kHidden>{});
    case kBiased: return step(std::integral_constant<Terms, kBiased>{});
    default: return step(std::integral_constant<Terms, kAll>{});
  }
}

// The same where code for hidden pairs and for bias alone would gain little: kAll serves them, too.
template <class Step>
inline auto with_few_terms(Terms terms, Step const& step) {
  if (kIsSpecialised && terms == kBand) return step(std::integral_constant<Terms, kBand>{});
  return step(std::integral_constant<Terms, kAll>{});
}

}  // namespace
