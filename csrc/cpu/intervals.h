// The ranges of keys that query rows have as data: the transcription of in_intervals of fastattn/spec.py.
#pragma once

#include "attention.h"

namespace {

using namespace fa::cpu;
using fa::Range;

inline bool is_empty(Range range) { return range.begin >= range.end; }

inline Range common(Range a, Range b) {
  Range const both = {fa::larger(a.begin, b.begin), fa::smaller(a.end, b.end)};
  return both.begin < both.end ? both : Range{0, 0};
}

// The smallest range that holds both.
inline Range hull(Range a, Range b) {
  if (is_empty(a) || is_empty(b)) return is_empty(a) ? b : a;
  return {fa::smaller(a.begin, b.begin), fa::larger(a.end, b.end)};
}

// What a row keeps: ranges in order that do not touch.
struct Ranges {
  Range const* at;
  int count;

  Range hull() const { return count ? Range{at[0].begin, at[count - 1].end} : Range{0, 0}; }
};

inline bool are_equal(Ranges a, Ranges b) {
  return a.count == b.count && !__builtin_memcmp(a.at, b.at, a.count * sizeof(Range));
}

// Those that have keys in common with `keys`.
inline Ranges those_in(Ranges ranges, Range keys) {
  int begin = 0, end = ranges.count;
  while (begin < end && ranges.at[begin].end <= keys.begin) ++begin;
  while (begin < end && ranges.at[end - 1].begin >= keys.end) --end;
  return {ranges.at + begin, end - begin};
}

// The ranges of one unit's rows as a call gives them, in any order.
struct Intervals {
  int32 const* at;  // of the first head and row; null where a call has none
  int64 head_stride, row_stride;
  int count;        // of a row

  Intervals(AttentionParams const& p, Unit const& unit)
      : at(p.intervals), head_stride(p.intervals_head), row_stride(p.intervals_row), count(int(p.intervals_count)) {
    if (at) at += unit.b * p.intervals_batch + unit.first_q * row_stride;
  }

  bool are_given() const { return at != nullptr; }
  bool differ_by_head() const { return head_stride != 0; }

  // Row i within `limit`, in order and merged, written to `to`, which has room for all of the row's.
  Ranges read(int head, int i, Range limit, Range* to) const {
    int found = 0;
    each(head, i, limit, [&](Range range) {
      int n = found++;
      for (; n > 0 && to[n - 1].begin > range.begin; --n) to[n] = to[n - 1];
      to[n] = range;
    });
    int last = 0;
    for (int n = 1; n < found; ++n) {
      if (to[n].begin <= to[last].end) to[last].end = fa::larger(to[last].end, to[n].end);
      else to[++last] = to[n];
    }
    return {to, found ? last + 1 : 0};
  }

  Range hull(int head, int i, Range limit) const {
    Range all{0, 0};
    each(head, i, limit, [&](Range range) { all = ::hull(all, range); });
    return all;
  }

  bool hold(int head, int i, int j) const {
    bool is_held = false;
    each(head, i, {j, j + 1}, [&](Range) { is_held = true; });
    return is_held;
  }

 private:
  template <class Take>
  void each(int head, int i, Range limit, Take const& take) const {
    int32 const* const row = at + head * head_stride + i * row_stride;
    for (int n = 0; n < count; ++n) {
      Range const range = common({row[2 * n], row[2 * n + 1]}, limit);
      if (!is_empty(range)) take(range);
    }
  }
};

// What the query rows of a block keep of some keys.
template <int ROWS>
class BlockRanges {
 public:
  // Reads rows first .. end - 1 within the band and `keys`, with `memory` for all of them. The hull of it all.
  Range read(Intervals const& intervals, fa::Band const& band, int head, Range rows, Range keys, Range* memory) {
    first_ = rows.begin;
    Range all{0, 0};
    for (int i = rows.begin; i < rows.end; ++i, memory += intervals.count) {
      Ranges& row = rows_[i - first_] = intervals.read(head, i, common(fa::tile_range(band, i, i + 1), keys), memory);
      all = hull(all, row.hull());
    }
    return all;
  }

  // Of row i: the ranges that some keys have a part in.
  Ranges in(int i, Range keys) const { return those_in(rows_[i - first_], keys); }

  // Of rows i .. end - 1: the hull of the keys that they keep among some, and whether no row has a gap in them.
  Range hull_of(int i, int end, Range keys, bool& is_whole) const {
    Range all{0, 0};
    for (; i < end; ++i) {
      Ranges const ranges = in(i, keys);
      is_whole &= ranges.count <= 1;
      all = hull(all, common(ranges.hull(), keys));
    }
    return all;
  }

 private:
  Ranges rows_[ROWS];
  int first_ = 0;
};

}  // namespace
