// The parts of a unit's keys, and the query rows that each adds to.
#pragma once

#include "queries.h"

namespace {

struct Parts {
  fa::Band const& band;
  int block_rows, keys_of_each;

  Parts(fa::Band const& band, int block_rows)
      : band(band), block_rows(block_rows), keys_of_each(keys_per_part(band.s_kv)) {}

  int count() const { return part_count(band.s_kv); }

  Range keys(int part) const { return {part * keys_of_each, fa::smaller((part + 1) * keys_of_each, band.s_kv)}; }

  // Whole blocks of query rows of which some keep a key of the part.
  Range rows(int part) const {
    Range const of_part = keys(part), found = fa::tile_range(fa::transposed(band), of_part.begin, of_part.end);
    if (is_empty(found)) return {0, 0};
    return {found.begin / block_rows * block_rows, int(rounded_up(found.end, block_rows))};
  }

  // The rows before this one are those of which no part after the given one keeps a key.
  FA_CALLED int finished(int part) const {
    int row = part < 0 ? 0 : band.s_q;
    for (int n = part + 1; part >= 0 && n < count(); ++n)
      if (!is_empty(rows(n))) row = fa::smaller(row, rows(n).begin);
    return row;
  }

  // All rows of which the part or one before it keeps a key are before this one, and those that are finished.
  int begun(int part) const {
    int row = finished(part);
    for (int n = 0; n <= part; ++n) row = fa::larger(row, rows(n).end);
    return fa::smaller(row, band.s_q);
  }
};

}  // namespace
