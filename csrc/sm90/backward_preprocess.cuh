// The kernels that run before the large ones of the backward pass, both bound by memory: backward_preprocess computes
// delta and lse of every query row, backward_dsinks the gradient of the sinks.
//
// A block of backward_preprocess has eight warps and works on 128 padded rows of one head (kPaddedRows).
#pragma once
#include "../common/gradient.h"
#include "backward.h"

namespace fa::sm90 {

constexpr int kRowWarps = kRowThreads / 32;

// Whether the large kernels read both parts of lse as one number (weigh in gradient.h).
FA_DEVICE bool has_joined_lse(BackwardParams const& p) { return p.has_softcap && !p.numbers.has_terms; }

template <class T>
FA_DEVICE float dot(Packed8 const& a, Packed8 const& b) {
  float sum = 0.f;
  FA_UNROLL
  for (int i = 0; i < 4; ++i) {
    sum = multiply_add(low(T{}, a.pair[i]), low(T{}, b.pair[i]), sum);
    sum = multiply_add(high(T{}, a.pair[i]), high(T{}, b.pair[i]), sum);
  }
  return sum;
}

// lse_parts and delta of a tile, and zeros in dq_sums. Eight lanes share a row.
template <class T>
FA_DEVICE void backward_preprocess(BackwardParams const& p) {
  Tile const tile = find_tile<kPaddedRows, Of::kQueries>(p, block_index());
  int64 const first_padded = padded_row(p, tile, tile.head) + tile.row;
  int const warp = thread_index() / 32, lane = thread_index() % 32, pieces = static_cast<int>(p.head_dim_v) / 8;
  for (int row = warp * 4 + lane / 8; row < kPaddedRows; row += 4 * kRowWarps) {
    int const i = tile.row + row;
    bool const exists = i < tile.s_q;
    uint16 const *out = static_cast<uint16 const*>(p.out), *dout = static_cast<uint16 const*>(p.dout);
    int64 const map_row = tile.first_q + i;
    out += ((tile.map_batch * p.seqlen_q + map_row) * p.heads_q + tile.head) * p.head_dim_v;
    dout += tile.map_batch * p.dout_strides.batch + map_row * p.dout_strides.row + tile.head * p.dout_strides.head;
    float sum = 0.f;
    for (int piece = lane % 8; exists && piece < pieces; piece += 8) {
      sum += dot<T>(load_global(reinterpret_cast<Packed8 const*>(out + 8 * piece)),
                    load_global(reinterpret_cast<Packed8 const*>(dout + 8 * piece)));
    }
    FA_UNROLL
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane % 8) continue;
    Float2 parts = {positive_infinity(), 0.f};
    if (exists) {
      int64 const of_row = (tile.map_batch * p.heads_q + tile.head) * p.seqlen_q + map_row;
      float const lse = load_global(p.lse + of_row);
      float const low_log2 = load_global(p.lse_low + of_row) * kLog2E;
      if (lse != negative_infinity()) parts = {lse, low_log2};
      if (has_joined_lse(p)) parts = {multiply_add(parts.x, kLog2E, parts.y), 0.f};
      if (p.dlse) sum -= load_global(p.dlse + of_row);
    }
    store_global(reinterpret_cast<Float2*>(p.lse_parts) + first_padded + row, parts);
    store_global(p.delta + first_padded + row, sum);
  }
  if (!p.dq_sums) return;
  int const columns = static_cast<int>(p.sum_columns);
  Float4* const sums = reinterpret_cast<Float4*>(p.dq_sums + first_padded * columns);
  for (int i = thread_index(); i < kPaddedRows * columns / 4; i += kRowThreads) {
    store_global(sums + i, Float4{0.f, 0.f, 0.f, 0.f});
  }
}

// The gradient of a sink's logit: minus the sum of its weight times delta, over the rows of one sequence and head.
FA_DEVICE void backward_dsinks(BackwardParams const& p) {
  int const n = block_index() / static_cast<int>(p.heads_q), head = block_index() - n * static_cast<int>(p.heads_q);
  Tile tile{};
  tile.batch = n;
  tile.map_batch = p.cu_seqlens_q ? 0 : n;
  tile.s_q = static_cast<int>(p.seqlen_q);
  if (p.cu_seqlens_q) {
    tile.first_q = load_global(p.cu_seqlens_q + n);
    tile.s_q = load_global(p.cu_seqlens_q + n + 1) - tile.first_q;
  }
  int64 const first = padded_row(p, tile, head);
  float const sink = load_global(p.sinks + n * p.sinks_batch_stride + head);
  float sum = 0.f;
  for (int row = thread_index(); row < tile.s_q; row += kRowThreads) {
    Float2 const lse = load_global(reinterpret_cast<Float2 const*>(p.lse_parts) + first + row);
    float const weight =
        has_joined_lse(p) ? exp2_approx(multiply_add(sink, kLog2E, -lse.x)) : weight_of(sink, 1.f, lse.x, lse.y);
    sum -= weight * load_global(p.delta + first + row);
  }
  FA_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
  uint32 const of_warp = shared_base() + thread_index() / 32 * 16;
  if (thread_index() % 32 == 0) store_shared_float(of_warp, sum);
  block_sync();
  if (thread_index()) return;
  float total = 0.f;
  for (int warp = 0; warp < kRowWarps; ++warp) total += load_shared_float(shared_base() + warp * 16);
  store_global(p.dsinks + n * p.heads_q + head, total);
}

template <class T>
FA_GLOBAL(kRowThreads)
backward_preprocess_kernel(FA_KERNEL_ARGUMENT BackwardParams p) {
  backward_preprocess<T>(p);
}

template <class T>
FA_GLOBAL(kRowThreads)
backward_dsinks_kernel(FA_KERNEL_ARGUMENT BackwardParams p) {
  backward_dsinks(p);
}

}  // namespace fa::sm90
