// A consumer warpgroup: the products, the softmax and the output of 64 query rows of every tile.
#pragma once
#include "../common/softmax.h"
#include "fragment.cuh"
#include "terms.cuh"

namespace fa::sm90 {

template <class C>
FA_DEVICE void issue_scores(float (&scores)[C::BLOCK_N / 2], Shared<C> const& shared, int consumer, int stage) {
  // Otherwise the descriptors of all steps of q would stay in registers throughout the loop.
  uint32 const q = k_major(recomputed(shared.q() + consumer * 64 * kRowBytes));
  multiply_by_rows<typename C::Element, C::D_QK, C::BLOCK_M, C::BLOCK_N>(scores, q, k_major(shared.k(stage)));
}

template <class C>
FA_DEVICE void issue_output(float (&out)[C::D_V / 2], uint32 const (&p)[C::BLOCK_N / 4], Shared<C> const& shared,
                            int stage) {
  add_product<typename C::Element>(out, p, n_major(shared.v(stage), C::BLOCK_N));
}

// Rows of V that a sequence does not keep are multiplied by weights of 0, but 0 times NaN is NaN. Dense maps exclude
// such rows, so TMA loads zeros. In a packed batch they belong to another sequence; this function zeroes those in the
// first or last block.
template <class C>
FA_DEVICE void clear_unkept_values(ForwardArgs const& args, Shared<C> const& shared, int block,
                                   Ring<C::STAGES> const& v) {
  if (!args.p.cu_seqlens_q) return;
  Tile const tile = read_tile(shared.tile());
  Range const keys = keys_of<C>(block), kept = tile_range(band_of<C>(args.p, tile), 0, tile.s_q);
  if (contains(kept, keys)) return;
  mbarrier_wait(v.full(), v.parity);
  clear_rows<C::BLOCK_N, C::CHUNKS_V, C::CONSUMERS>(shared.v(v.stage),
                                                    {kept.begin - keys.begin, kept.end - keys.begin});
  fence_proxy_async();
  named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);
}

// Computes the sums of a tile with at least one block of keys, from the arrival of Q on. `mask(scores, block)` puts
// -inf where a row does not keep a key; `clear(block, v)` zeroes the rows of v that no row of the tile keeps, in its
// full stage. Both are called for the blocks that may need it. With terms, `mask` finishes the scores of every block,
// and `drop(weights, block)` zeroes those that dropout drops.
template <class C, class Mask, class Clear, class Drop = NoDropout>
FA_DEVICE void attend(Shared<C> const& shared, TileBlocks const& blocks, float scale_log2, float cap_scale,
                      int consumer, Ring<C::STAGES>& k, Ring<C::STAGES>& v, float (&out)[C::D_V / 2], RowState& state,
                      Mask const& mask, Clear const& clear, Drop const& drop = {}) {
  float scores[C::BLOCK_N / 2], rescale[2];
  uint32 p[C::BLOCK_N / 4];

  auto const finish_scores = [&](int block, bool masked) {
    if (C::SOFTCAP) cap_scores(scores, cap_scale);
    if (masked) mask(scores, block);
  };

  int block = blocks.all.end - 1;
  mbarrier_wait(k.full(), k.parity);
  wgmma_fence();
  issue_scores<C>(scores, shared, consumer, k.stage);
  wgmma_wait<0>(scores);
  release(k);
  finish_scores(block, true);
  softmax_step<true>(scores, state, rescale, scale_log2);
  drop(scores, block);
  pack_fragment<typename C::Element>(p, scores);
  clear(block, v);

  while (--block >= blocks.all.begin) {
    if (C::PINGPONG) named_sync(kPingPongBarrier + consumer, 2 * kWarpgroup);
    mbarrier_wait(k.full(), k.parity);
    wgmma_fence();
    issue_scores<C>(scores, shared, consumer, k.stage);
    mbarrier_wait(v.full(), v.parity);
    wgmma_fence();
    issue_output<C>(out, p, shared, v.stage);
    if (C::PINGPONG) named_arrive(kPingPongBarrier + (consumer + 1) % C::CONSUMERS, 2 * kWarpgroup);
    wgmma_wait<1>(scores);
    release(k);
    finish_scores(block, Drop::HAS_TERMS || (C::BAND && !contains(blocks.unmasked, block)));
    softmax_step<false>(scores, state, rescale, scale_log2);
    drop(scores, block);
    if (C::EXP_OVERLAP) {
      pin_above_wait(shared.base, state.sum[0]);
      pin_above_wait(shared.base, state.sum[1]);
    }
    wgmma_wait<0>(out);
    release(v);
    pack_fragment<typename C::Element>(p, scores);
    FA_UNROLL
    for (int i = 0; i < C::D_V / 2; ++i) out[i] *= rescale[i / 2 % 2];
  }

  if (blocks.all.end - blocks.all.begin > 1) clear(blocks.all.begin, v);
  mbarrier_wait(v.full(), v.parity);
  wgmma_fence();
  issue_output<C>(out, p, shared, v.stage);
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {  // under the last product
    state.sum[r] += shuffle_xor(state.sum[r], 1);
    state.sum[r] += shuffle_xor(state.sum[r], 2);
  }
  wgmma_wait<0>(out);
  release(v);
}

// The terms of a tile, as attend calls them.
template <class C>
struct TileTerms {
  static constexpr bool HAS_TERMS = true;
  ForwardArgs const& args;
  Shared<C> const& shared;

  FA_DEVICE void finish(float (&scores)[C::BLOCK_N / 2], int block) const {
    Tile const tile = read_tile(shared.tile());
    Pairs<false> const at = pairs(tile, block);
    uint32 no_slopes[1];
    scale_scores<typename C::Element, false>(scores, no_slopes, args.p);
    add_terms<typename C::Element>(scores, args.p, tile, tile.head, band_of<C>(args.p, tile), at,
                                   contains(read_blocks(shared.tile()).unmasked, block));
  }

  FA_DEVICE void operator()(float (&weights)[C::BLOCK_N / 2], int block) const {
    if (!args.p.numbers.dropout_threshold) return;
    Tile const tile = read_tile(shared.tile());
    Pairs<false> const at = pairs(tile, block);
    drop(weights, dropout_of(args.p, tile, tile.head), at.first_row, at.first_column);
  }

 private:
  FA_DEVICE static Pairs<false> pairs(Tile const& tile, int block) {
    Place const at = this_place();
    return {tile.row + at.first_row(), block * C::BLOCK_N + at.first_column()};
  }
};

template <class C>
FA_DEVICE void attend_to_tile(ForwardArgs const& args, Shared<C> const& shared, TileBlocks const& blocks, int consumer,
                              Ring<C::STAGES>& k, Ring<C::STAGES>& v, float (&out)[C::D_V / 2], RowState& state) {
  auto const mask = [&](float (&scores)[C::BLOCK_N / 2], int block) {
    Tile const tile = read_tile(shared.tile());
    Place const at = this_place();
    mask_scores(scores, band_of<C>(args.p, tile), tile.row + at.first_row(), block * C::BLOCK_N + at.first_column());
  };
  auto const clear = [&](int block, Ring<C::STAGES> const& of) { clear_unkept_values<C>(args, shared, block, of); };
  if constexpr (C::TERMS) {
    TileTerms<C> const terms{args, shared};
    auto const finish = [&](float (&scores)[C::BLOCK_N / 2], int block) { terms.finish(scores, block); };
    attend<C>(shared, blocks, kLog2E, 0.f, consumer, k, v, out, state, finish, clear, terms);
  } else {
    attend<C>(shared, blocks, scale_log2_of(args.p), static_cast<float>(args.p.cap_scale), consumer, k, v, out, state,
              mask, clear);
  }
}

// Normalises out and writes lse. A tile without keys passes state.max = -inf and out = 0.
template <class C>
FA_DEVICE void finish_rows(ForwardArgs const& args, Tile const& tile, RowState const& state, float (&out)[C::D_V / 2]) {
  ForwardParams const& p = args.p;
  Place const at = this_place();
  float const sink =
      p.sinks ? load_global(p.sinks + tile.batch * p.sinks_batch_stride + tile.head) : negative_infinity();
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    FinishedRow row = finish_row(state.max[r], state.sum[r], C::TERMS ? 1.f : static_cast<float>(p.score_scale), sink);
    if (C::TERMS) row.factor *= static_cast<float>(p.numbers.dropout_scale);
    int const i = tile.row + at.first_row() + 8 * r;
    if (at.lane() % 4 == 0 && i < tile.s_q) {
      int64 const at_row = (tile.map_batch * p.heads_q + tile.head) * p.seqlen_q + tile.first_q + i;
      store_global(p.lse + at_row, row.lse.high);
      store_global(p.lse_low + at_row, row.lse.low);
    }
    FA_UNROLL
    for (int c = 2 * r; c < C::D_V / 2; c += 4) {
      out[c] *= row.factor;
      out[c + 1] *= row.factor;
    }
  }
}

// Writes out and hands the Q buffer back to the producer.
template <class C>
FA_DEVICE void write_rows(ForwardArgs const& args, Shared<C> const& shared, Tile const& tile, int consumer,
                          float const (&out)[C::D_V / 2]) {
  ForwardParams const& p = args.p;
  int const first = tile.row + consumer * 64;
  bool const by_tma = !p.cu_seqlens_q || first + 64 <= tile.s_q;
  uint32 packed[C::D_V / 4];
  pack_fragment<typename C::Element>(packed, out);
  named_sync(kOwnBarrier + consumer, kWarpgroup);  // all four warps have read their Q
  if (by_tma) {
    stage_fragment<C::BLOCK_M>(shared.q() + consumer * 64 * kRowBytes, packed);
    fence_proxy_async();
    named_sync(kOwnBarrier + consumer, kWarpgroup);
  } else {
    int64 const row = tile.map_batch * p.seqlen_q + tile.first_q + first, stride = p.heads_q * p.head_dim_v;
    store_fragment(static_cast<uint16*>(p.out) + row * stride + tile.head * p.head_dim_v, stride, tile.s_q - first,
                   static_cast<int>(p.head_dim_v), packed);
  }
  if (warp_uniform(this_place().warp()) == 0 && elect_one()) {
    if (by_tma) {
      for (int chunk = 0; chunk < C::CHUNKS_V; ++chunk) {
        tma_store(&args.out, shared.q() + chunk * C::BLOCK_M * kRowBytes + consumer * 64 * kRowBytes,
                  chunk * kChunkColumns, tile.first_q + first, tile.head, tile.map_batch);
      }
      tma_store_commit();
      tma_store_wait_read();
    }
    mbarrier_arrive(shared.q_empty());
  }
}

template <class C>
FA_DEVICE void consume(ForwardArgs const& args, Shared<C> const& shared, int consumer) {
  Ring<C::STAGES> k{shared.k_ring()}, v{shared.v_ring()};
  uint32 q_parity = 0;
  if (C::PINGPONG && consumer == 0) named_arrive(kPingPongBarrier, 2 * kWarpgroup);  // consumer 0 issues first
  while (true) {
    mbarrier_wait(shared.q_full(), q_parity);
    q_parity ^= 1;
    if (read_tile(shared.tile()).row == kNoTile) break;
    float out[C::D_V / 2];
    RowState state{{negative_infinity(), negative_infinity()}, {0.f, 0.f}};
    // Cleared here instead of by a first product that does not accumulate: with a flag known only at run time some
    // versions of ptxas serialise every wgmma (C7515).
    FA_UNROLL
    for (int i = 0; i < C::D_V / 2; ++i) out[i] = 0.f;
    TileBlocks const blocks = read_blocks(shared.tile());
    if (blocks.all.begin < blocks.all.end) attend_to_tile<C>(args, shared, blocks, consumer, k, v, out, state);
    Tile const tile = read_tile(shared.tile());
    finish_rows<C>(args, tile, state, out);
    write_rows<C>(args, shared, tile, consumer, out);
  }
  if (warp_uniform(this_place().warp()) == 0 && elect_one()) tma_store_wait();
}

}  // namespace fa::sm90
