// Attention to a cache on a CPU: the functions of each instruction set, and the memory they share.
//
// The kernel is compiled for several sets of instructions into one library, so all functions here are static: of inline
// ones the linker would keep one copy for all, perhaps of instructions which the machine at hand does not have.
//
// The keys of a sequence are cut into parts, which threads take one after the other. A part holds for each query row
// the largest score, the sum of the weights, and the weighted sum of the values; who finishes a sequence joins them.
#pragma once

#include "../common/mask.h"
#include "params.h"

namespace fa::cpu {

constexpr int kKeys = 64;  // keys of a block: their scores are in memory at a time
constexpr int kAlign = 32;  // rows of floats in scratch memory are multiples of this, two of the widest vectors

static inline int64 padded(int64 n) { return (n + kAlign - 1) / kAlign * kAlign; }

// Lengths and page numbers are read once, checked, and used as they were read: another thread may change them.
struct Sequence {
  int b;
  int have;  // positions before the call
  int32 const* pages;  // of its positions from first_page * page_size on; null: it owns page b
  int64 first_page;
  int64 first_row;  // of its queries, in a tensor (B * S_q | T_q, H_q, D)
  int first_query;  // where it stands for some rows of a longer sequence: the first of them
  int first_key;  // keys before it are not read; a block that begins earlier has this one in their place
  Band band;  // with s_q and s_kv
  int rows;  // H_q * s_q query rows, those of a key/value head following each other: h * s_q + i
};

// Results of one part: of each row the sums, padded(head_dim_v) floats, the largest score, the sum of the weights.
struct Part {
  float *sums, *most, *total;
};

static inline int64 page_of(Sequence const& s, int64 position, int64 page_size) {
  return s.pages ? s.pages[position / page_size - s.first_page] : s.b;
}

static inline int64 part_floats(int64 rows, int64 dim) { return rows * (padded(dim) + 2); }

static inline Part part_at(float* memory, int64 rows, int64 dim) {
  float* const most = memory + rows * padded(dim);
  return {memory, most, most + rows};
}

// The queries of a sequence times `scale`, and the scores of a block of keys.
struct Scratch {
  float *queries, *scores;
};

static inline int64 scratch_floats(int64 rows, int64 dim) { return rows * (padded(dim) + kKeys); }

static inline Scratch scratch_at(float* memory, int64 rows, int64 dim) { return {memory, memory + rows * padded(dim)}; }

struct Decode {  // what the library asks of a set of instructions
  void (*attend)(Params const&, Sequence const&, Range keys, Scratch, Part);
  void (*join)(Params const&, Sequence const&, float* parts, int count);
};

}  // namespace fa::cpu
