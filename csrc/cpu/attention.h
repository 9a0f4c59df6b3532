// Attention on a CPU: the functions of each instruction set, and how work is cut into items.
//
// The kernels are compiled for several sets of instructions into one library, so all functions here are static: of
// inline ones the linker would keep one copy for all, perhaps of instructions which the machine at hand does not have.
#pragma once

#include "../common/mask.h"
#include "params.h"

namespace fa::cpu {

// One key/value head of one sequence, and the query heads that read it.
struct Unit {
  int b, kv_head;
  int64 first_q, first_kv;  // rows before the sequence in a packed tensor, else 0
  Band band;                // with s_q and s_kv
};

struct ForwardItem {
  Unit unit;
  Range rows;  // of the queries, of each head
};

// The keys of a unit are cut into parts, by its length alone. Each part adds up its share of dq from zero; shares are
// added in the order of the parts. So the bits do not depend on which thread works on which part.
constexpr int kMostParts = 16, kPartKeys = 512;

static inline int keys_per_part(int s_kv) {
  int const even = (s_kv + kMostParts - 1) / kMostParts;
  return larger(kPartKeys, (even + kPartKeys - 1) / kPartKeys * kPartKeys);
}

static inline int part_count(int s_kv) { return larger(1, (s_kv + keys_per_part(s_kv) - 1) / keys_per_part(s_kv)); }

// Blocks of keys within an item that are worked on one after the other.
constexpr int kBackwardKeys = 256;

struct BackwardItem {
  Unit unit;
  Range parts;
  char* dq_shares;  // where each part leaves its share of dq, if the unit's parts are several items; else null
  // Units add to one dbias where it broadcasts. Each waits with a block of keys for the one before it.
  int* progress;    // blocks of keys done by this item; null where nobody has to wait
  int* before;      // those of the unit before; null for the first
};

struct Attention {
  int64 (*forward_bytes)(AttentionParams const&, ForwardItem const&);
  void (*forward)(AttentionParams const&, ForwardItem const&, ForwardItem const* next, void* memory);
  int64 (*backward_bytes)(AttentionParams const&, BackwardItem const&);
  int64 (*share_bytes)(AttentionParams const&, Unit const&);  // of one part's dq
  void (*backward)(AttentionParams const&, BackwardItem const&, BackwardItem const* next, void* memory);
  void (*add_shares)(AttentionParams const&, Unit const&, char* shares);  // dq out of them
  // Jacobian-vector products of both passes, along the tangents that `moved` holds (tangents.h).
  int64 (*jvp_bytes)(AttentionParams const&, AttentionParams const& moved, ForwardItem const&);
  void (*jvp)(AttentionParams const&, AttentionParams const& moved, ForwardItem const&, void* memory);
  int64 (*backward_jvp_bytes)(AttentionParams const&, AttentionParams const& moved, BackwardItem const&);
  void (*backward_jvp)(AttentionParams const&, AttentionParams const& moved, BackwardItem const&, void* memory);
  // Statistics of the weights, and the gradients of the inputs out of theirs.
  int64 (*statistics_bytes)(AttentionParams const&, StatisticsParams const&, ForwardItem const&);
  void (*statistics)(AttentionParams const&, StatisticsParams const&, ForwardItem const&, void* memory);
  void (*statistics_backward)(AttentionParams const&, StatisticsParams const&, BackwardItem const&, void* memory);
  // The weights; averaged over the heads, an item is of the first of a sequence and works on all.
  int64 (*weights_bytes)(AttentionParams const&, StatisticsParams const&, ForwardItem const&);
  void (*weights)(AttentionParams const&, StatisticsParams const&, ForwardItem const&, void* memory);
  // Their gradients. Before it a pass over the rows leaves lse and its gradient, unless the weights are small ones.
  bool (*are_small_weights)(AttentionParams const&, Unit const&);
  int64 (*weights_backward_bytes)(AttentionParams const&, StatisticsParams const&, BackwardItem const&);
  void (*weights_backward)(AttentionParams const&, StatisticsParams const&, BackwardItem const&, void* memory);
};

}  // namespace fa::cpu
