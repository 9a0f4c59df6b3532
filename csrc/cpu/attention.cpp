// Attention, compiled once for each kind of operand and each instruction set: FA_OPERAND and FA_MACHINE name them.
//
// Nothing of the standard C++ library that becomes code (attention.h says why).
#define FA_EVERYWHERE static inline
#include "backward_jvp.h"
#include "jvp.h"
#include "weights.h"

namespace {

// Memory for a unit that is served as a small one, 0 if it is not.
template <class Op>
int64 small_bytes(AttentionParams const& p, Unit const& unit) {
  if constexpr (kServesSmall<Op>)
    if (Small<Op>::takes(p, unit)) return Small<Op>(p, unit, nullptr).bytes();
  return 0;
}

template <class Op>
bool run_small(AttentionParams const& p, ForwardItem const& item, void* memory) {
  bool const is_whole = item.rows.begin == 0 && item.rows.end == item.unit.band.s_q;
  if constexpr (kServesSmall<Op>)
    if (is_whole && Small<Op>::takes(p, item.unit)) return Small<Op>(p, item.unit, memory).forward();
  return false;
}

template <class Op>
bool run_small(AttentionParams const& p, BackwardItem const& item, void* memory) {
  bool const are_wanted = p.dq && p.dk && p.dv && !item.dq_shares;
  if constexpr (kServesSmall<Op>)
    if (are_wanted && Small<Op>::takes(p, item.unit)) return Small<Op>(p, item.unit, memory).backward();
  return false;
}

int64 forward_bytes(AttentionParams const& p, ForwardItem const& item) {
  int64 const small = small_bytes<FA_OPERAND>(p, item.unit), all = Forward<FA_OPERAND>(p, item, nullptr).bytes();
  return small > all ? small : all;
}

void forward(AttentionParams const& p, ForwardItem const& item, ForwardItem const* next, void* memory) {
  if (run_small<FA_OPERAND>(p, item, memory)) return;
  Prefetch prefetch;
  if (next && next->rows.begin == 0 && next->unit.band.s_kv <= 2048) {
    Tensors const tensors{p, next->unit};
    int64 const bytes = bytes_of(p.dtype);
    prefetch.add(tensors.k(), next->unit.band.s_kv, p.head_dim_qk * bytes);
    prefetch.add(tensors.v(), next->unit.band.s_kv, p.head_dim_v * bytes);
    prefetch.add(tensors.q(next->unit.kv_head * int(p.heads_q / p.heads_kv)), next->rows.end, p.head_dim_qk * bytes);
  }
  Forward<FA_OPERAND>(p, item, memory).run(prefetch);
}

int64 backward_bytes(AttentionParams const& p, BackwardItem const& item) {
  int64 const small = small_bytes<FA_OPERAND>(p, item.unit), all = Backward<FA_OPERAND>(p, item, nullptr).bytes();
  return small > all ? small : all;
}

int64 share_bytes(AttentionParams const& p, Unit const& unit) {
  BackwardItem const item{unit, {0, 0}, nullptr, nullptr, nullptr};
  return Backward<FA_OPERAND>(p, item, nullptr).share_words() * int64(sizeof(FA_OPERAND::Word));
}

void backward(AttentionParams const& p, BackwardItem const& item, BackwardItem const* next, void* memory) {
  if (run_small<FA_OPERAND>(p, item, memory)) return;
  Prefetch prefetch;
  if (next && next->parts.begin == 0 && next->unit.band.s_kv <= 1024) {
    Tensors const tensors{p, next->unit};
    int const head = next->unit.kv_head * int(p.heads_q / p.heads_kv), rows = next->unit.band.s_q;
    int64 const bytes = bytes_of(p.dtype);
    prefetch.add(tensors.v(), next->unit.band.s_kv, p.head_dim_v * bytes);
    prefetch.add(tensors.k(), next->unit.band.s_kv, p.head_dim_qk * bytes);
    prefetch.add(tensors.q(head), rows, p.head_dim_qk * bytes);
    prefetch.add(tensors.dout(head), rows, p.head_dim_v * bytes);
    prefetch.add(tensors.out(head), rows, p.head_dim_v * bytes);
  }
  Backward<FA_OPERAND>(p, item, memory).run(prefetch);
}

void add_shares(AttentionParams const& p, Unit const& unit, char* shares) {
  BackwardItem const item{unit, {0, 0}, shares, nullptr, nullptr};
  Backward<FA_OPERAND>(p, item, nullptr).add_shares(reinterpret_cast<FA_OPERAND::Word*>(shares));
}

int64 jvp_bytes(AttentionParams const& p, AttentionParams const& moved, ForwardItem const& item) {
  return ForwardJvp<FA_OPERAND>(p, moved, item, nullptr).bytes();
}

void jvp(AttentionParams const& p, AttentionParams const& moved, ForwardItem const& item, void* memory) {
  ForwardJvp<FA_OPERAND>(p, moved, item, memory).run();
}

int64 backward_jvp_bytes(AttentionParams const& p, AttentionParams const& moved, BackwardItem const& item) {
  return BackwardJvp<FA_OPERAND>(p, moved, item, nullptr).bytes();
}

void backward_jvp(AttentionParams const& p, AttentionParams const& moved, BackwardItem const& item, void* memory) {
  BackwardJvp<FA_OPERAND>(p, moved, item, memory).run();
}

int64 statistics_bytes(AttentionParams const& p, StatisticsParams const& of, ForwardItem const& item) {
  return RowStatistics<FA_OPERAND>(p, of, item, nullptr).bytes();
}

void statistics(AttentionParams const& p, StatisticsParams const& of, ForwardItem const& item, void* memory) {
  RowStatistics<FA_OPERAND>(p, of, item, memory).run();
}

void statistics_backward(AttentionParams const& p, StatisticsParams const& of, BackwardItem const& item, void* memory) {
  StatisticsBackward<FA_OPERAND>(p, of, item, memory).run();
}

int64 weights_bytes(AttentionParams const& p, StatisticsParams const& of, ForwardItem const& item) {
  return RowWeights<FA_OPERAND>(p, of, item, nullptr).bytes();
}

void weights(AttentionParams const& p, StatisticsParams const& of, ForwardItem const& item, void* memory) {
  RowWeights<FA_OPERAND>(p, of, item, memory).run();
}

bool are_small_weights(AttentionParams const& p, Unit const& unit) {
  return kServesSmall<FA_OPERAND> && Small<FA_OPERAND>::takes_keys(p, unit);
}

int64 weights_backward_bytes(AttentionParams const& p, StatisticsParams const& of, BackwardItem const& item) {
  int64 all = Backward<FA_OPERAND>(p, item, nullptr).bytes();
  if (!are_small_weights(p, item.unit)) return all;
  ForwardItem const rows{item.unit, {0, item.unit.band.s_q}};
  int64 const small = Small<FA_OPERAND>(p, item.unit, nullptr).bytes(), of_rows = weights_bytes(p, of, rows);
  all = small > all ? small : all;
  return of_rows > all ? of_rows : all;
}

template <class Op>
bool run_small_weights(AttentionParams const& p, StatisticsParams const& of, BackwardItem const& item, void* memory) {
  using Word = typename Op::Word;
  if constexpr (kServesSmall<Op>)
    if (p.dq && p.dk && !item.dq_shares)
      return Small<Op>(p, item.unit, memory).weights_backward([&](int head, int64 i) {
        return dweights_of<Word>(of, item.unit, head, i);
      });
  return false;
}

void weights_backward(AttentionParams const& p, StatisticsParams const& of, BackwardItem const& item, void* memory) {
  if (are_small_weights(p, item.unit)) {
    if (run_small_weights<FA_OPERAND>(p, of, item, memory)) return;
    ForwardItem const rows{item.unit, {0, item.unit.band.s_q}};  // no pass over rows was before this one
    weights(p, of, rows, memory);
  }
  statistics_backward(p, of, item, memory);
}

}  // namespace

#define FA_JOIN(operand, machine) fa_attention_##operand##_##machine
#define FA_NAME(operand, machine) FA_JOIN(operand, machine)

extern "C" __attribute__((visibility("hidden"))) fa::cpu::Attention const* FA_NAME(FA_OPERAND, FA_MACHINE)() {
  static constexpr fa::cpu::Attention kernels{forward_bytes,
                                              forward,
                                              backward_bytes,
                                              share_bytes,
                                              backward,
                                              add_shares,
                                              jvp_bytes,
                                              jvp,
                                              backward_jvp_bytes,
                                              backward_jvp,
                                              statistics_bytes,
                                              statistics,
                                              statistics_backward,
                                              weights_bytes,
                                              weights,
                                              are_small_weights,
                                              weights_backward_bytes,
                                              weights_backward};
  return &kernels;
}
