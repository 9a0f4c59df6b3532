// The keys that a strip of rows has to look at: those that the band keeps, without those at both ends that a mask or
// segments hide from all its rows.
#pragma once

#include "scores.h"

namespace {

// The keys of a strip, and whether nothing but the band hides a pair among them.
struct Seen {
  Range keys;
  bool is_whole;
};

constexpr int kRun = 64;  // keys of which the least and the largest segment id are known, and bytes of a mask

struct Ids {
  int32 least, most;

  void add(int32 id) {
    least = fa::smaller(least, id);
    most = fa::larger(most, id);
  }
};

// Segment ids of keys, and their extremes in every run.
class Segments {
 public:
  static int64 runs(int s_kv) { return (s_kv + kRun - 1) / kRun; }

  void look(int32 const* ids, Range keys, Ids* memory) {
    ids_ = ids;
    runs_ = memory;
    for (int begin = keys.begin / kRun * kRun; begin < keys.end; begin += kRun)
      runs_[begin / kRun] = extremes(ids, {fa::larger(begin, keys.begin), fa::smaller(begin + kRun, keys.end)});
  }

  static Ids extremes(int32 const* ids, Range range) {
    Ids found = {ids[range.begin], ids[range.begin]};
    for (int n = range.begin; n < range.end; ++n) found.add(ids[n]);
    return found;
  }

  // `keys` without those at both ends that have no id in common with `rows`.
  Seen seen(Range keys, Ids rows) const {
    bool const is_one = rows.least == rows.most;
    while (keys.begin < keys.end && !meets(rows, keys.begin)) keys.begin = keys.begin / kRun * kRun + kRun;
    while (keys.begin < keys.end && !meets(rows, keys.end - 1)) keys.end = (keys.end - 1) / kRun * kRun;
    while (is_one && keys.begin < keys.end && ids_[keys.begin] != rows.least) ++keys.begin;
    while (is_one && keys.begin < keys.end && ids_[keys.end - 1] != rows.least) --keys.end;
    if (is_empty(keys)) return {{0, 0}, true};
    return {keys, is_one && are_all(keys, rows.least)};
  }

 private:
  bool meets(Ids rows, int key) const {
    Ids const run = runs_[key / kRun];
    return rows.least <= run.most && rows.most >= run.least;
  }

  bool are_all(Range keys, int32 id) const {
    for (int begin = keys.begin, end; begin < keys.end; begin = end) {
      end = fa::smaller(begin / kRun * kRun + kRun, keys.end);
      Ids const run = runs_[begin / kRun];
      if (run.least == id && run.most == id) continue;
      for (int n = begin; n < end; ++n)
        if (ids_[n] != id) return false;
    }
    return true;
  }

  int32 const* ids_ = nullptr;
  Ids* runs_ = nullptr;
};

// Bytes of a mask that several rows have for the same keys: whether each row has them all, and any row any of them.
class Shown {
  using Chunk = uint8 __attribute__((vector_size(kRun)));
  using Numbers = uint64 __attribute__((vector_size(kRun)));

 public:
  bool any = false, all = true;

  template <class RowAt>
  Shown(RowAt const& row_at, int rows, int begin, int count) {
    Chunk some{}, least = Chunk{} - 1;
    for (int n = 0; n < rows; ++n) {
      Chunk bytes;
      uint8 const* const row = row_at(n) + begin;
      if (count == kRun) {
        bytes = loaded<Chunk>(row);
      } else {
        uint8 padded[kRun];
        __builtin_memset(padded, row[0], kRun);
        __builtin_memcpy(padded, row, count);
        bytes = loaded<Chunk>(padded);
      }
      some |= bytes;
      least = bytes < least ? bytes : least;
    }
    any = is_any(some);
    all = !is_any((Chunk)(least == 0));
  }

 private:
  static bool is_any(Chunk bytes) {
    Numbers const numbers = (Numbers)bytes;
    uint64 found = 0;
    for (int n = 0; n < int(sizeof(numbers) / sizeof(numbers[0])); ++n) found |= numbers[n];
    return found;
  }
};

// `keys` without runs at both ends that a mask hides from all rows. `row_at` gives a row's mask from key 0 on.
template <class RowAt>
inline Seen seen_in_mask(RowAt const& row_at, int rows, int64 key_stride, Range keys) {
  if (key_stride > 1) return {keys, false};
  Range found{0, 0};
  bool is_whole = true, has_gap = false;
  for (int begin = keys.begin; begin < keys.end; begin += kRun) {
    int const count = fa::smaller(kRun, keys.end - begin);
    Shown const shown(row_at, rows, key_stride ? begin : 0, key_stride ? count : 1);
    if (!shown.any) {
      has_gap = true;
      continue;
    }
    is_whole &= shown.all && (is_empty(found) || !has_gap);
    found = {is_empty(found) ? begin : found.begin, begin + count};
    has_gap = false;
  }
  return {found, is_whole};
}

// What a strip of rows looks at among `keys`, which the band keeps; `head` and `i` give the head and number of each row.
template <class Word, class Head, class Row>
inline Seen seen_by(Scores<Word> const& scores, Segments const& segments, Range keys, int rows, Head const& head,
                    Row const& i) {
  AttentionParams const& p = scores.p;
  Seen found{keys, true};
  if (p.segments_q && !is_empty(keys)) {
    int32 const* const ids = scores.segments_q();
    Ids of_rows{ids[i(0)], ids[i(0)]};
    for (int n = 1; n < rows; ++n) of_rows.add(ids[i(n)]);
    found = segments.seen(keys, of_rows);
  }
  if (!p.mask || is_empty(found.keys)) return found;
  auto const mask = [&](int n) { return scores.mask(head(n), i(n)); };
  Seen const shown = seen_in_mask(mask, rows, p.mask_key, found.keys);
  return {shown.keys, found.is_whole && shown.is_whole};
}

// The terms of a strip.
template <class Word>
inline Terms terms_of(Scores<Word> const& scores, Seen const& seen) {
  return scores.terms == kHidden && seen.is_whole ? kBand : scores.terms;
}

}  // namespace
