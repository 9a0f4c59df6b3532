// The trees of new tokens: the transcription of what fastattn/spec.py says of tree masks.
#pragma once

#include "decode.h"

namespace fa::cpu {

// The tree of a sequence, of which `row` is the query row that its rows are counted from.
struct Tree {
  int32 const* words;   // of its first token; null if its tokens follow each other
  int32 const* depths;  // likewise; null where no term counts positions
  int64 step;           // words of a row
  int before, row;

  bool sees(int i, int j) const {
    int const n = j - before;
    return n < 0 || (static_cast<unsigned>(words[(row + i) * step + n / 32]) >> n % 32 & 1);
  }
  // The key at which the diagonal of row i lies, and the place of key j, both in their path.
  int diagonal(int i) const { return before + depths[row + i]; }
  int place(int j) const { return j < before ? j : before + depths[j - before]; }
};

static inline Tree tree_of(Params const& p, Sequence const& s) {
  if (!p.tree) return {};
  int64 const first = p.cu_seqlens_q ? s.first_row - s.first_query : 0;  // of the rows of a packed call
  int64 const words = p.cu_seqlens_q ? first * p.tree_row : s.b * p.tree_batch;
  int64 const depths = p.cu_seqlens_q ? first : s.b * p.depths_batch;
  return {p.tree + words, p.depths ? p.depths + depths : nullptr, p.tree_row, s.have, s.first_query};
}

}  // namespace fa::cpu
