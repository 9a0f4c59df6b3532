// backward_dq: dq of 128 query rows, accumulated over blocks of keys by one thread block.
//
// Together with backward_dkdv it computes all gradients in a fixed order. Q and dout stay in shared memory; K and V are
// loaded block by block:
//
//     S = Q K^T     P = 2^(S - lse)     dP = dout V^T     dS = P (dP - delta)     dq += dS K
#pragma once
#include "../common/gradient.h"
#include "backward.h"
#include "backward_traits.h"
#include "fragment.cuh"
#include "terms.cuh"

namespace fa::sm90 {

template <class C>
struct DqShared {  // addresses
  uint32 base;
  FA_DEVICE uint32 q() const { return base + C::Q; }
  FA_DEVICE uint32 dout() const { return base + C::DOUT; }
  FA_DEVICE uint32 k(int stage) const { return base + C::K + stage * C::K_BYTES; }
  FA_DEVICE uint32 v(int stage) const { return base + C::V + stage * C::V_BYTES; }
  FA_DEVICE uint32 tile() const { return base + C::TILE; }
  FA_DEVICE uint32 q_full() const { return base + C::BARRIERS; }
  FA_DEVICE uint32 dout_full() const { return base + C::BARRIERS + 8; }
  FA_DEVICE uint32 k_ring() const { return base + C::BARRIERS + 16; }
  FA_DEVICE uint32 v_ring() const { return base + C::BARRIERS + 16 + 16 * C::K_STAGES; }
};

// Run by one thread before the others begin: chooses the tile and writes it to shared memory for all.
template <class C>
FA_DEVICE void begin_dq(BackwardArgs const& args, DqShared<C> const& shared) {
  Tile tile = find_tile<C::BLOCK_M, Of::kQueries>(args.p, block_index());
  TileBlocks blocks{};
  if (tile.row >= tile.s_q) {
    tile.row = kNoTile;
  } else if constexpr (C::TERMS) {
    int32 const* const ranges = ranges_of(args.p, args.p.terms.ranges_q, tile.s_q, tile.batch);
    blocks = blocks_of<C::BLOCK_M, C::BLOCK_N>(band_of(args.p, tile), tile.row, ranges);
  } else {
    blocks = blocks_of<C::BLOCK_M, C::BLOCK_N>(band_of(args.p, tile), tile.row);
  }
  write_tile(shared.tile(), tile, blocks);
  mbarrier_init(shared.q_full(), 1);
  mbarrier_init(shared.dout_full(), 1);
  for (int stage = 0; stage < C::K_STAGES; ++stage) {
    mbarrier_init(shared.k_ring() + 8 * stage, 1);
    mbarrier_init(shared.k_ring() + 8 * (C::K_STAGES + stage), 4 * C::CONSUMERS);  // one lane of each warp
  }
  for (int stage = 0; stage < C::V_STAGES; ++stage) {
    mbarrier_init(shared.v_ring() + 8 * stage, 1);
    mbarrier_init(shared.v_ring() + 8 * (C::V_STAGES + stage), 4 * C::CONSUMERS);
  }
  mbarrier_fence_init();
}

template <class C>
FA_DEVICE void produce(BackwardArgs const& args, DqShared<C> const& shared) {
  Tile const tile = read_tile(shared.tile());
  Range const blocks = read_blocks(shared.tile()).all;
  if (blocks.begin == blocks.end) return;
  int const head_kv = tile.head / static_cast<int>(args.p.heads_q / args.p.heads_kv), row = tile.first_q + tile.row;
  load_tile<C::BLOCK_M, C::CHUNKS_QK>(shared.q(), args.q, shared.q_full(), row, tile.head, tile.map_batch, kEvictFirst);
  load_tile<C::BLOCK_M, C::CHUNKS_V>(shared.dout(), args.dout, shared.dout_full(), row, tile.head, tile.map_batch,
                                     kEvictFirst);
  Ring<C::K_STAGES> k{shared.k_ring()};
  Ring<C::V_STAGES> v{shared.v_ring()};
  for (int block = blocks.end - 1; block >= blocks.begin; --block) {
    int const first = tile.first_kv + block * C::BLOCK_N;
    mbarrier_wait(k.empty(), k.parity ^ 1);
    load_tile<C::BLOCK_N, C::CHUNKS_QK>(shared.k(k.stage), args.k, k.full(), first, head_kv, tile.map_batch,
                                        kEvictLast);
    k.advance();
    mbarrier_wait(v.empty(), v.parity ^ 1);
    load_tile<C::BLOCK_N, C::CHUNKS_V>(shared.v(v.stage), args.v, v.full(), first, head_kv, tile.map_batch, kEvictLast);
    v.advance();
  }
}

// Rows of K and V that the tile's sequence does not keep.
template <class C>
FA_DEVICE void clear_unkept_keys(BackwardArgs const& args, DqShared<C> const& shared, int block,
                                 Ring<C::K_STAGES> const& k, Ring<C::V_STAGES> const& v) {
  if (!args.p.cu_seqlens_q) return;
  Range const kept = keys_to_keep(args.p, read_tile(shared.tile()), block * C::BLOCK_N, C::BLOCK_N);
  if (contains(kept, {0, C::BLOCK_N})) return;
  mbarrier_wait(v.full(), v.parity);
  clear_rows<C::BLOCK_N, C::CHUNKS_QK, C::CONSUMERS>(shared.k(k.stage), kept);
  clear_rows<C::BLOCK_N, C::CHUNKS_V, C::CONSUMERS>(shared.v(v.stage), kept);
  fence_proxy_async();
  named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);
}

// Weights of a block, times the slope of softcap.
template <class C>
FA_DEVICE void weigh_block(BackwardArgs const& args, DqShared<C> const& shared, int block, Float2 const (&lse)[2],
                           float (&scores)[C::BLOCK_N / 2]) {
  ScoreScales const scales = scales_of(args.p);
  FA_UNROLL
  for (int i = 0; i < C::BLOCK_N / 2; ++i) weigh<C::SOFTCAP>(scores[i], scales, lse[i / 2 % 2].x, lse[i / 2 % 2].y);
  if (contains(read_blocks(shared.tile()).unmasked, block)) return;
  Tile const tile = read_tile(shared.tile());
  Place const at = this_place();
  mask_weights(scores, band_of(args.p, tile), tile.row + at.first_row(), block * C::BLOCK_N + at.first_column());
}

// The same with terms; the slopes of softcap are apart, in pairs of 16-bit numbers.
template <class C>
FA_DEVICE void weigh_block_with_terms(BackwardArgs const& args, DqShared<C> const& shared, int block,
                                      Float2 const (&lse)[2], float (&scores)[C::BLOCK_N / 2],
                                      uint32 (&slopes)[C::BLOCK_N / 4]) {
  using T = typename C::Element;
  Tile const tile = read_tile(shared.tile());
  Place const at = this_place();
  Pairs<false> const pairs = {tile.row + at.first_row(), block * C::BLOCK_N + at.first_column()};
  scale_scores<T, true>(scores, slopes, args.p);
  add_terms<T>(scores, args.p, tile, tile.head, band_of(args.p, tile), pairs,
               contains(read_blocks(shared.tile()).unmasked, block));
  FA_UNROLL
  for (int i = 0; i < C::BLOCK_N / 2; ++i) {
    scores[i] = weight_of(scores[i], 1.f, lse[i / 2 % 2].x, lse[i / 2 % 2].y);
  }
}

// Gradients of finished scores are those of the bias.
template <class C>
FA_DEVICE void write_dbias(BackwardArgs const& args, DqShared<C> const& shared, int block,
                           float const (&ds)[C::BLOCK_N / 2]) {
  Tile const tile = read_tile(shared.tile());
  Place const at = this_place();
  int const row = tile.row + at.first_row(), column = block * C::BLOCK_N + at.first_column();
  int64 const head_rows = (tile.batch * args.p.heads_q + tile.head) * tile.s_q;
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= tile.s_q) continue;
    float* const to = args.p.dbias + (head_rows + row + 8 * r) * tile.s_kv;
    FA_UNROLL
    for (int i = 2 * r; i < C::BLOCK_N / 2; i += i % 2 ? 3 : 1) {
      int const j = column + i / 4 * 8 + i % 2;
      if (j < tile.s_kv) store_global(to + j, ds[i]);
    }
  }
}

// Gradients of the weights before dropout, from those after it.
template <class C>
FA_DEVICE void undo_dropout(BackwardArgs const& args, DqShared<C> const& shared, int block,
                            float (&dp)[C::BLOCK_N / 2]) {
  if (!args.p.numbers.dropout_threshold) return;
  Tile const tile = read_tile(shared.tile());
  Place const at = this_place();
  float const scale = static_cast<float>(args.p.numbers.dropout_scale);
  FA_UNROLL
  for (int i = 0; i < C::BLOCK_N / 2; ++i) dp[i] *= scale;
  drop(dp, dropout_of(args.p, tile, tile.head), tile.row + at.first_row(), block * C::BLOCK_N + at.first_column());
}

template <class C>
FA_DEVICE void sum_over_keys(BackwardArgs const& args, DqShared<C> const& shared, int consumer,
                             float (&dq)[C::D_QK / 2]) {
  using T = typename C::Element;
  constexpr int N = C::BLOCK_N;
  Range const blocks = read_blocks(shared.tile()).all;
  uint32 const rows = consumer * 64 * kRowBytes;
  Ring<C::K_STAGES> k{shared.k_ring()};
  Ring<C::V_STAGES> v{shared.v_ring()};
  Float2 lse[2];  // and its low part
  float delta[2];
  Tile const tile = read_tile(shared.tile());
  int64 const row = padded_row(args.p, tile, tile.head) + tile.row + this_place().first_row();
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    lse[r] = load_global(reinterpret_cast<Float2 const*>(args.p.lse_parts) + row + 8 * r);
    delta[r] = load_global(args.p.delta + row + 8 * r);
  }
  mbarrier_wait(shared.q_full(), 0);
  mbarrier_wait(shared.dout_full(), 0);
  for (int block = blocks.end - 1; block >= blocks.begin; --block) {
    float scores[N / 2], dp[N / 2];
    uint32 ds[N / 4];
    [[maybe_unused]] uint32 slopes[N / 4];
    mbarrier_wait(k.full(), k.parity);
    clear_unkept_keys<C>(args, shared, block, k, v);
    wgmma_fence();
    multiply_by_rows<T, C::D_QK, C::BLOCK_M, N>(scores, k_major(shared.q() + rows), k_major(shared.k(k.stage)));
    mbarrier_wait(v.full(), v.parity);
    wgmma_fence();
    multiply_by_rows<T, C::D_V, C::BLOCK_M, N>(dp, k_major(shared.dout() + rows), k_major(shared.v(v.stage)));
    wgmma_wait<1>(scores);
    if constexpr (C::TERMS) weigh_block_with_terms<C>(args, shared, block, lse, scores, slopes);
    else weigh_block<C>(args, shared, block, lse, scores);
    if (C::EXP_OVERLAP) {
      float all = scores[0];
      FA_UNROLL
      for (int i = 1; i < N / 2; ++i) all = joined(all, scores[i]);
      pin_above_wait(shared.base, all);
    }
    wgmma_wait<0>(dp);
    release(v);
    if constexpr (C::TERMS) undo_dropout<C>(args, shared, block, dp);
    FA_UNROLL
    for (int i = 0; i < N / 2; ++i) dp[i] = scores[i] * (dp[i] - delta[i / 2 % 2]);
    if constexpr (C::TERMS) {
      if (args.p.dbias) write_dbias<C>(args, shared, block, dp);
      FA_UNROLL
      for (int i = 0; i < N / 2; ++i) dp[i] *= i % 2 ? high(T{}, slopes[i / 2]) : low(T{}, slopes[i / 2]);
    }
    pack_fragment<T>(ds, dp);
    wgmma_fence();
    add_product<T>(dq, ds, n_major(shared.k(k.stage), N));
    wgmma_wait<0>(dq);
    release(k);
  }
}

// Stores dq, through the consumer's own rows of Q.
template <class C>
FA_DEVICE void write_dq(BackwardArgs const& args, DqShared<C> const& shared, int consumer, float (&dq)[C::D_QK / 2]) {
  BackwardParams const& p = args.p;
  Tile const tile = read_tile(shared.tile());
  int const first = tile.row + consumer * 64, columns = static_cast<int>(p.head_dim_qk);
  float const scale = static_cast<float>(p.scale);
  uint32 packed[C::D_QK / 4];
  FA_UNROLL
  for (int i = 0; i < C::D_QK / 2; ++i) dq[i] *= scale;
  pack_fragment<typename C::Element>(packed, dq);
  if (p.cu_seqlens_q && first + 64 > tile.s_q) {
    int64 const stride = p.heads_q * columns;
    store_fragment(static_cast<uint16*>(p.dq) + (tile.first_q + first) * stride + tile.head * columns, stride,
                   tile.s_q - first, columns, packed);
    return;
  }
  uint32 const from = shared.q() + consumer * 64 * kRowBytes;
  named_sync(kOwnBarrier + consumer, kWarpgroup);  // all four warps have read their Q
  stage_fragment<C::BLOCK_M>(from, packed);
  fence_proxy_async();
  named_sync(kOwnBarrier + consumer, kWarpgroup);
  if (warp_uniform(this_place().warp()) == 0 && elect_one()) {
    for (int chunk = 0; chunk < C::CHUNKS_QK; ++chunk) {
      tma_store(&args.dq, from + chunk * C::BLOCK_M * kRowBytes, chunk * kChunkColumns, tile.first_q + first, tile.head,
                tile.map_batch);
    }
    tma_store_commit();
    tma_store_wait();
  }
}

template <class C>
FA_DEVICE void consume(BackwardArgs const& args, DqShared<C> const& shared, int consumer) {
  float dq[C::D_QK / 2];
  FA_UNROLL
  for (int i = 0; i < C::D_QK / 2; ++i) dq[i] = 0.f;
  Range const blocks = read_blocks(shared.tile()).all;
  if (blocks.begin < blocks.end) sum_over_keys<C>(args, shared, consumer, dq);
  write_dq<C>(args, shared, consumer, dq);
}

template <class C>
FA_DEVICE void backward_dq(BackwardArgs const& args) {
  DqShared<C> const shared{shared_base()};
  int const warpgroup = warp_uniform(thread_index() / kWarpgroup);
  if (thread_index() == 0) begin_dq<C>(args, shared);
  block_sync();
  if (read_tile(shared.tile()).row == kNoTile) return;
  if (warpgroup == 0) {
    give_registers<C::PRODUCER_REGISTERS>();
    if (warp_uniform(thread_index() / 32) == 0 && elect_one()) produce<C>(args, shared);
  } else {
    take_registers<C::CONSUMER_REGISTERS>();
    consume<C>(args, shared, warpgroup - 1);
  }
}

template <class C>
FA_GLOBAL(C::THREADS)
backward_dq_kernel(FA_KERNEL_ARGUMENT BackwardArgs args) {
  backward_dq<C>(args);
}

}  // namespace fa::sm90
