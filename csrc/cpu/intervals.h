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
  return a.count == b.count && (a.at == b.at || !__builtin_memcmp(a.at, b.at, a.count * sizeof(Range)));
}

inline void drop_before(int key, Ranges& ranges) {
  for (; ranges.count && ranges.at[0].end <= key; --ranges.count) ++ranges.at;
}

// Those that have keys in common with `keys`.
inline Ranges those_in(Ranges ranges, Range keys) {
  drop_before(keys.begin, ranges);
  int count = 0;
  while (count < ranges.count && ranges.at[count].begin < keys.end) ++count;
  return {ranges.at, count};
}

// Where a piece ends that takes in what rows keep from `end` on, up to `limit` at most, and skips no vector of keys.
inline int grown(int end, Ranges const* rows, int count, int limit, int vector) {
  for (int before = -1; before != end;) {
    before = end;
    for (int n = 0; n < count; ++n)
      for (int m = 0; m < rows[n].count; ++m) {
        Range const range = rows[n].at[m];
        if (range.begin >= fa::smaller(limit, (end + vector - 1) / vector * vector + vector)) break;
        end = fa::smaller(limit, fa::larger(end, range.end));
      }
  }
  return end;
}

// Whether two rows have so little in common that one strip for both would compute more than it shares.
inline bool are_apart(Ranges a, Ranges b) {
  if (are_equal(a, b)) return false;
  int keys_of_a = 0, keys_of_b = 0, shared = 0;
  for (int n = 0; n < a.count; ++n) keys_of_a += a.at[n].end - a.at[n].begin;
  for (int n = 0; n < b.count; ++n) keys_of_b += b.at[n].end - b.at[n].begin;
  while (a.count && b.count) {
    Range const both = common(a.at[0], b.at[0]);
    shared += both.end - both.begin;
    Ranges& first = a.at[0].end < b.at[0].end ? a : b;
    ++first.at, --first.count;
  }
  return 2 * shared < fa::larger(keys_of_a, keys_of_b);
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

  // Whether row i has what the row before it has.
  bool is_as_before(int head, int i) const {
    int32 const* const row = at + head * head_stride + i * row_stride;
    return !__builtin_memcmp(row, row - row_stride, 2 * count * sizeof(int32));
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
    count_ = rows.end - rows.begin;
    Range all{0, 0}, before{0, 0};
    for (int i = rows.begin; i < rows.end; ++i, memory += intervals.count) {
      Range const limit = common(fa::tile_range(band, i, i + 1), keys);
      int const n = i - first_;
      bool const is_same =
          n && limit.begin == before.begin && limit.end == before.end && intervals.is_as_before(head, i);
      rows_[n] = is_same ? rows_[n - 1] : intervals.read(head, i, limit, memory);
      is_apart_[n] = n && !is_same && are_apart(rows_[n - 1], rows_[n]);
      all = hull(all, rows_[n].hull());
      before = limit;
    }
    return all;
  }

  // Of row i: the ranges that some keys have a part in.
  Ranges in(int i, Range keys) const { return those_in(rows_[i - first_], keys); }

  // Where a strip ends that begins at row i, at `end` at the latest: before and after pairs of rows at which ranges
  // change.
  int strip_end(int i, int end) const {
    for (int next = i + 2; next < end; next += 2)
      for (int n = next - 1 - first_; n <= next + 1 - first_; ++n)
        if (n < count_ && is_apart_[n]) return next;
    return end;
  }

  // Calls step with the pieces of some keys that rows keep, between which no vector of keys is kept by any, and whether no
  // row has a gap in them. What lies before them is not asked for again.
  template <class Step>
  void each_piece(Range of_rows, Range keys, int vector, Step const& step) {
    Ranges* const rows = rows_ + (of_rows.begin - first_);
    int const count = of_rows.end - of_rows.begin;
    for (Range piece{keys.begin, keys.begin};;) {
      piece.begin = keys.end;
      for (int n = 0; n < count; ++n) {
        drop_before(piece.end, rows[n]);
        if (rows[n].count) piece.begin = fa::smaller(piece.begin, fa::larger(piece.end, rows[n].at[0].begin));
      }
      if (piece.begin == keys.end) return;
      piece.end = grown(piece.begin, rows, count, keys.end, vector);
      bool is_whole = true;
      for (int n = 0; n < count; ++n) is_whole &= rows[n].count < 2 || rows[n].at[1].begin >= piece.end;
      step(piece, is_whole);
    }
  }

 private:
  Ranges rows_[ROWS];
  bool is_apart_[ROWS];  // of the row before
  int first_ = 0, count_ = 0;
};

}  // namespace
