// From products of queries and keys to scores, as fastattn/spec.py has it: scale, softcap, bias, ALiBi, and what is not
// kept becomes -inf.
#pragma once

#include "attention.h"
#include "pack.h"
#include "random.h"

namespace {

using namespace fa::cpu;
using fa::Range;

constexpr int kMostKeys = 512;  // of a block, forward and backward
constexpr int kSegmentKeys = 64;  // of which the least and the largest segment id are known
constexpr int kAlignWords = 16;

template <class Word>
constexpr Word kNever = -__builtin_inf();

inline Range common(Range a, Range b) {
  Range const both = {fa::larger(a.begin, b.begin), fa::smaller(a.end, b.end)};
  return both.begin < both.end ? both : Range{0, 0};
}

inline bool is_empty(Range range) { return range.begin >= range.end; }

// Bytes and ids as integers of the width of a word.
template <class Word>
inline Integers<Word> bytes_at(uint8 const* p) {
  return __builtin_convertvector(loaded<typename Lanes<Word>::Narrow8>(p), Integers<Word>);
}

template <class Word>
inline Integers<Word> ids_at(int32 const* p) {
  return __builtin_convertvector(loaded<typename Lanes<Word>::Narrow32>(p), Integers<Word>);
}

template <class Word>
inline Integers<Word> bits_at(uint16 const* p) {
  return __builtin_convertvector(loaded<typename Lanes<Word>::Narrow16>(p), Integers<Word>);
}

// Lanes of a vector whose column is in the range.
template <class Word>
inline Integers<Word> inside(Range range, int column) {
  using Integer = typename Lanes<Word>::Integer;
  Integers<Word> const columns = lane_numbers<Word>() + Integer(column);
  return (columns >= Integer(range.begin)) & (columns < Integer(range.end));
}

// The scores of one unit.
template <class Word>
class Scores {
 public:
  Scores(AttentionParams const& p, Unit const& unit) : p(p), unit(unit), group_(int(p.heads_q / p.heads_kv)) {
    is_plain = p.scale > 0 && !p.softcap && !p.bias && !p.slopes && !p.mask && !p.segments_q;
    to_score = is_plain ? Word(p.scale) : 1;
    to_exponent = Word(is_plain ? p.scale * kLog2E : kLog2E);
  }

  AttentionParams const& p;
  Unit const& unit;
  bool is_plain;  // raw products, of which some are not kept because of the band
  Word to_score;  // a finished number times this is a score
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

  // Raw products of row i and keys first .. become scores. `columns` are whole vectors, counted from `first`; `kept` is
  // what the band keeps of them, and nothing else of any tensor is read. `slopes` takes the derivative of softcap.
  void finish(int head, int i, int first, Range columns, Range kept, Word* scores, Word* slopes) {
    read_terms(head, i, first, kept);
    using V = Vector<Word>;
    V const never = broadcast(kNever<Word>), scale = broadcast(Word(p.scale));
    V const cap = broadcast(Word(p.softcap)), inverse_cap = broadcast(Word(p.softcap ? 1 / p.softcap : 0));
    Word const slope = p.slopes ? this->slopes()[unit.b * p.slopes_stride + head] : 0;
    Word const diagonal = Word(unit.band.diagonal + i - first);
    typename Lanes<Word>::Integer const id = p.segments_q ? segments_q()[i] : 0;
    V const lanes = __builtin_convertvector(lane_numbers<Word>(), V);
    for (int c = columns.begin; c < columns.end; c += kCount<Word>) {
      if (c + kCount<Word> <= kept.begin || c >= kept.end) {
        store(scores + c, never);
        if (slopes) store(slopes + c, V{});
        continue;
      }
      V x = load(scores + c) * scale, capped{};
      if (p.softcap) {
        capped = hyperbolic_tangent(x * inverse_cap);
        x = cap * capped;
      }
      if (p.bias) {
        V const bias = load(bias_ + c);
        x = bias == never ? never : x + bias;
      }
      if (p.slopes) {
        V const distance = (lanes + Word(c)) - diagonal;
        x -= slope * (distance < 0 ? -distance : distance);
      }
      if (p.mask) x = bytes_at<Word>(mask_ + c) != 0 ? x : never;
      if (p.segments_q) x = ids_at<Word>(ids_ + c) == id ? x : never;
      if (c < kept.begin || c + kCount<Word> > kept.end) x = inside<Word>(kept, c) ? x : never;
      store(scores + c, x);
      if (slopes) store(slopes + c, x == never ? V{} : 1 - capped * capped);
    }
  }

  // Whether a pair is kept, for the rare cases that go pair by pair. A bias of -inf is a mask.
  bool keeps(int head, int i, int j) const {
    if (!fa::keep(unit.band, i, j)) return false;
    if (p.mask && !p.mask[unit.b * p.mask_batch + head * p.mask_head + i * p.mask_row + j * p.mask_key]) return false;
    if (p.segments_q && segments_q()[i] != segments_kv()[j]) return false;
    return !p.bias || number_at(bias_row(head, i), p.bias_dtype, j * p.bias_key) != -__builtin_inf();
  }

 private:
  char const* bias_row(int head, int i) const {
    return static_cast<char const*>(p.bias) +
           (unit.b * p.bias_batch + head * p.bias_head + i * p.bias_row) * bytes_of(p.bias_dtype);
  }

  // The terms of one row, copied: what lies beyond its last key must not be read.
  void read_terms(int head, int i, int first, Range kept) {
    int const count = kept.end - kept.begin, begin = first + kept.begin;
    if (count <= 0) return;
    if (p.bias) read_bias(bias_row(head, i) + begin * p.bias_key * bytes_of(p.bias_dtype), count, bias_ + kept.begin);
    if (p.segments_q) __builtin_memcpy(ids_ + kept.begin, segments_kv() + begin, count * sizeof(int32));
    if (!p.mask) return;
    uint8 const* const row = p.mask + unit.b * p.mask_batch + head * p.mask_head + i * p.mask_row + begin * p.mask_key;
    if (p.mask_key == 1) __builtin_memcpy(mask_ + kept.begin, row, count);
    else
      for (int j = 0; j < count; ++j) mask_[kept.begin + j] = row[j * p.mask_key];
  }

  void read_bias(char const* row, int count, Word* to) {
    with_dtype(p.bias_dtype, [&](auto const* type) {
      auto const* const from = reinterpret_cast<decltype(type)>(row);
      int j = 0;
      if constexpr (std::is_same_v<Vector<Word>, decltype(load(from))>)
        if (p.bias_key == 1)
          for (; j + kCount<Word> <= count; j += kCount<Word>) store(to + j, load(from + j));
      for (; j < count; ++j) to[j] = Word(to_float(from[j * p.bias_key]));
    });
  }

  int group_;
  Word bias_[kMostKeys + kAlignWords];
  int32 ids_[kMostKeys + kAlignWords];
  uint8 mask_[kMostKeys + kAlignWords];
};

// The segment ids in every run of kSegmentKeys keys: whole runs are skipped.
class Segments {
 public:
  struct Ids {
    int32 least, most;
  };

  static int64 runs(int s_kv) { return (s_kv + kSegmentKeys - 1) / kSegmentKeys; }

  void look(int32 const* ids, Range keys, Ids* memory) {
    runs_ = memory;
    for (int begin = keys.begin / kSegmentKeys * kSegmentKeys; begin < keys.end; begin += kSegmentKeys)
      runs_[begin / kSegmentKeys] =
          extremes(ids, {fa::larger(begin, keys.begin), fa::smaller(begin + kSegmentKeys, keys.end)});
  }

  static Ids extremes(int32 const* ids, Range range) {
    Ids found = {ids[range.begin], ids[range.begin]};
    for (int n = range.begin; n < range.end; ++n) {
      found.least = fa::smaller(found.least, ids[n]);
      found.most = fa::larger(found.most, ids[n]);
    }
    return found;
  }

  // `keys` without the runs at both ends that have no id in common with `rows`.
  Range narrowed(Range keys, Ids rows) const {
    while (keys.begin < keys.end && !meets(rows, keys.begin))
      keys.begin = keys.begin / kSegmentKeys * kSegmentKeys + kSegmentKeys;
    while (keys.begin < keys.end && !meets(rows, keys.end - 1)) keys.end = (keys.end - 1) / kSegmentKeys * kSegmentKeys;
    return keys.begin < keys.end ? keys : Range{0, 0};
  }

 private:
  bool meets(Ids rows, int key) const {
    Ids const run = runs_[key / kSegmentKeys];
    return rows.least <= run.most && rows.most >= run.least;
  }

  Ids* runs_ = nullptr;
};

}  // namespace
