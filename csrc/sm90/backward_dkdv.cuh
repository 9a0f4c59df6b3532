// backward_dkdv: dk and dv of a block of keys, and with FUSED the contribution of these keys to dq.
//
// K and V stay in shared memory; TMA loads Q, dout, lse and delta of one block of queries after the other, for all
// query heads that share the key/value head. Scores are transposed, so that a consumer's weights and score gradients
// are already in registers as the left operands of its sums:
//
//     S^T = K Q^T     P^T = 2^(S^T - lse)     dv += P^T dout
//     dP^T = V dout^T     dS^T = P^T (dP^T - delta)     dk += dS^T Q
//
// dq = dS K sums over the keys of both consumers: dS^T goes through shared memory, each consumer takes a part of dq and
// adds it to dq_sums, in the order of its registers. csrc/README.md draws the roles.
#pragma once
#include "../common/gradient.h"
#include "backward.h"
#include "backward_traits.h"
#include "fragment.cuh"
#include "terms.cuh"

namespace fa::sm90 {

// Named barriers besides those of fragment.cuh, two for each consumer: its buffer for a part of dq is free, and is
// full.
constexpr int kPartFreeBarrier = 8, kPartStagedBarrier = 10;

template <class C>
struct DkdvShared {  // addresses
  uint32 base;
  FA_DEVICE uint32 k() const { return base + C::K; }
  FA_DEVICE uint32 v() const { return base + C::V; }
  FA_DEVICE uint32 q(int stage) const { return base + C::Q + stage * C::Q_BYTES; }
  FA_DEVICE uint32 dout(int stage) const { return base + C::DOUT + stage * C::DOUT_BYTES; }
  FA_DEVICE uint32 ds(int buffer) const { return base + C::DS + buffer * C::DS_BYTES; }
  FA_DEVICE uint32 part(int consumer) const { return base + C::PARTS + consumer * C::PART_BYTES; }
  FA_DEVICE uint32 lse(int stage) const { return base + C::LSE + stage * C::LSE_BYTES; }
  FA_DEVICE uint32 delta(int stage) const { return base + C::DELTA + stage * C::DELTA_BYTES; }
  FA_DEVICE uint32 tile() const { return base + C::TILE; }
  FA_DEVICE uint32 k_full() const { return base + C::BARRIERS; }
  FA_DEVICE uint32 v_full() const { return base + C::BARRIERS + 8; }
  FA_DEVICE uint32 q_ring() const { return base + C::BARRIERS + 16; }  // Q full, empty (of dout as well)
  FA_DEVICE uint32 dout_full(int stage) const { return base + C::BARRIERS + 16 + 8 * (2 * C::STAGES + stage); }
};

// Run by one thread before the others begin: chooses the tile and writes it to shared memory for all.
template <class C>
FA_DEVICE void begin_dkdv(BackwardArgs const& args, DkdvShared<C> const& shared) {
  Tile tile = find_tile<C::BLOCK_N, Of::kKeys>(args.p, block_index());
  TileBlocks blocks{};
  if (tile.row < tile.s_kv) {
    Band const of_keys = transposed(band_of(args.p, tile));
    if constexpr (C::TERMS) {
      int32 const* const ranges = ranges_of(args.p, args.p.terms.ranges_kv, tile.s_kv, tile.batch);
      blocks = blocks_of<C::BLOCK_N, C::BLOCK_M>(of_keys, tile.row, ranges);
    } else {
      blocks = blocks_of<C::BLOCK_N, C::BLOCK_M>(of_keys, tile.row);
    }
    if (tile.row + C::BLOCK_N > tile.s_kv) blocks.unmasked = {0, 0};  // rows past the end are masked everywhere
  } else {
    tile.row = kNoTile;
  }
  write_tile(shared.tile(), tile, blocks);
  mbarrier_init(shared.k_full(), 1);
  mbarrier_init(shared.v_full(), 1);
  for (int stage = 0; stage < C::STAGES; ++stage) {
    mbarrier_init(shared.q_ring() + 8 * stage, 2);  // the rows, and lse
    mbarrier_init(shared.q_ring() + 8 * (C::STAGES + stage), 4 * C::CONSUMERS);  // one lane of each warp
    mbarrier_init(shared.dout_full(stage), 2);  // the rows, and delta
  }
  mbarrier_fence_init();
}

template <class C>
FA_DEVICE void produce(BackwardArgs const& args, DkdvShared<C> const& shared) {
  Tile const tile = read_tile(shared.tile());
  Range const blocks = read_blocks(shared.tile()).all;
  if (blocks.begin == blocks.end) return;
  Heads const heads = query_heads(args.p, tile);
  int const row = tile.first_kv + tile.row;
  load_tile<C::BLOCK_N, C::CHUNKS_QK>(shared.k(), args.k, shared.k_full(), row, heads.kv, tile.map_batch, kEvictFirst);
  load_tile<C::BLOCK_N, C::CHUNKS_V>(shared.v(), args.v, shared.v_full(), row, heads.kv, tile.map_batch, kEvictFirst);
  Ring<C::STAGES> q{shared.q_ring()};
  for (int head = heads.first; head < heads.end; ++head) {
    int64 const statistics = padded_row(args.p, tile, head);
    for (int block = blocks.begin; block < blocks.end; ++block) {
      int const first = block * C::BLOCK_M;
      mbarrier_wait(q.empty(), q.parity ^ 1);
      load_tile<C::BLOCK_M, C::CHUNKS_QK>(shared.q(q.stage), args.q, q.full(), tile.first_q + first, head,
                                          tile.map_batch, kEvictLast);
      mbarrier_expect(q.full(), C::LSE_BYTES);
      bulk_load(shared.lse(q.stage), args.p.lse_parts + 2 * (statistics + first), C::LSE_BYTES, q.full());
      uint32 const dout_full = shared.dout_full(q.stage);
      load_tile<C::BLOCK_M, C::CHUNKS_V>(shared.dout(q.stage), args.dout, dout_full, tile.first_q + first, head,
                                         tile.map_batch, kEvictLast);
      mbarrier_expect(dout_full, C::DELTA_BYTES);
      bulk_load(shared.delta(q.stage), args.p.delta + statistics + first, C::DELTA_BYTES, dout_full);
      q.advance();
    }
  }
}

// Rows of K and V that the tile's sequence does not keep.
template <class C>
FA_DEVICE void clear_unkept_keys(BackwardArgs const& args, DkdvShared<C> const& shared) {
  Tile const tile = read_tile(shared.tile());
  Range const kept = keys_to_keep(args.p, tile, tile.row, C::BLOCK_N);
  if (contains(kept, {0, C::BLOCK_N})) return;
  clear_rows<C::BLOCK_N, C::CHUNKS_QK, C::CONSUMERS>(shared.k(), kept);
  clear_rows<C::BLOCK_N, C::CHUNKS_V, C::CONSUMERS>(shared.v(), kept);
  fence_proxy_async();
  named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);
}

// Rows of Q and dout past the end of a packed sequence.
template <class C>
FA_DEVICE void clear_rows_past_end(BackwardArgs const& args, DkdvShared<C> const& shared, int block,
                                   Ring<C::STAGES> const& q) {
  if (!args.p.cu_seqlens_q) return;
  int const rows = read_tile(shared.tile()).s_q - block * C::BLOCK_M;
  if (rows >= C::BLOCK_M) return;
  mbarrier_wait(shared.dout_full(q.stage), q.parity);
  clear_rows<C::BLOCK_M, C::CHUNKS_QK, C::CONSUMERS>(shared.q(q.stage), {0, rows});
  clear_rows<C::BLOCK_M, C::CHUNKS_V, C::CONSUMERS>(shared.dout(q.stage), {0, rows});
  fence_proxy_async();
  named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);
}

// Address of the statistics of this thread's first column, `bytes` for each; those of columns 8 j and 8 j + 1 past it
// lie 8 j * bytes on.
FA_DEVICE uint32 of_columns(uint32 statistics, int bytes) { return statistics + this_place().first_column() * bytes; }

// p becomes the weights, and scores (or `sloped`, with SLOPED_IN_16_BITS) the weights times the slope of softcap, as
// weigh computes them; both are zero where the band does not keep.
template <class C>
FA_DEVICE void weigh_block(BackwardArgs const& args, DkdvShared<C> const& shared, int keys, int block, int stage,
                           float (&scores)[C::BLOCK_M / 2], uint32 (&p)[C::BLOCK_M / 4],
                           uint32 (&sloped)[C::BLOCK_M / 4]) {
  using T = typename C::Element;
  ScoreScales const scales = scales_of(args.p);
  uint32 const statistics = of_columns(shared.lse(stage), 8);
  FA_UNROLL
  for (int j = 0; j < C::BLOCK_M / 8; ++j) {
    Float4 lse{};  // of two columns, each with its low part, which is not used with softcap
    if (C::SOFTCAP) lse.x = load_shared_float(statistics + 64 * j), lse.z = load_shared_float(statistics + 64 * j + 8);
    else lse = load_shared_floats(statistics + 64 * j);
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      float* const x = scores + 4 * j + 2 * r;
      float const first = weigh<C::SOFTCAP>(x[0], scales, lse.x, lse.y);
      float const second = weigh<C::SOFTCAP>(x[1], scales, lse.z, lse.w);
      p[2 * j + r] = pack(T{}, first, second);
      if (C::SLOPED_IN_16_BITS) sloped[2 * j + r] = C::SOFTCAP ? pack(T{}, x[0], x[1]) : p[2 * j + r];
    }
  }
  if (contains(read_blocks(shared.tile()).unmasked, block)) return;
  Tile const tile = read_tile(shared.tile());
  Band const band = transposed(band_of(args.p, tile));
  Place const at = this_place();
  int const row = tile.row + keys + at.first_row() % 64, column = block * C::BLOCK_M + at.first_column();
  mask_packed(p, band, row, column);
  if (C::SLOPED_IN_16_BITS) mask_packed(sloped, band, row, column);
  else mask_weights(scores, band, row, column);
}

// The same with terms. Returns a bit for each weight, 1 where dropout leaves it; p is 0 where it does not.
template <class C>
FA_DEVICE uint32 weigh_block_with_terms(BackwardArgs const& args, DkdvShared<C> const& shared, int keys, int head,
                                        int block, int stage, float (&scores)[C::BLOCK_M / 2],
                                        uint32 (&p)[C::BLOCK_M / 4]) {
  using T = typename C::Element;
  Tile const tile = read_tile(shared.tile());
  Place const at = this_place();
  Pairs<true> const pairs = {tile.row + keys + at.first_row() % 64, block * C::BLOCK_M + at.first_column()};
  uint32 slopes[C::BLOCK_M / 4];
  scale_scores<T, true>(scores, slopes, args.p);
  add_terms<T>(scores, args.p, tile, head, band_of(args.p, tile), pairs,
               contains(read_blocks(shared.tile()).unmasked, block));
  uint32 left = 0xffffffff;
  if (args.p.numbers.dropout_threshold) {
    left = bits_left(dropout_of(args.p, tile, head), pairs.first_row, pairs.first_column);
  }
  uint32 const statistics = of_columns(shared.lse(stage), 8);
  FA_UNROLL
  for (int j = 0; j < C::BLOCK_M / 8; ++j) {
    Float4 const lse = load_shared_floats(statistics + 64 * j);
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      int const e = 4 * j + 2 * r;
      float const first = weight_of(scores[e], 1.f, lse.x, lse.y), second = weight_of(scores[e + 1], 1.f, lse.z, lse.w);
      p[e / 2] = pack(T{}, left >> e & 1 ? first : 0.f, left >> (e + 1) & 1 ? second : 0.f);
      scores[e] = first * low(T{}, slopes[e / 2]), scores[e + 1] = second * high(T{}, slopes[e / 2]);
    }
  }
  return left;
}

// Gradients of the weights before dropout, from those after it.
template <int N>
FA_DEVICE void undo_dropout(float (&dp)[N], uint32 left, float scale) {
  FA_UNROLL
  for (int e = 0; e < N; ++e) dp[e] = left >> e & 1 ? dp[e] * scale : 0.f;
}

// dp becomes the gradient of the scores.
template <class C>
FA_DEVICE void score_gradients(DkdvShared<C> const& shared, int stage, float const (&scores)[C::BLOCK_M / 2],
                               uint32 const (&sloped)[C::BLOCK_M / 4], float (&dp)[C::BLOCK_M / 2]) {
  using T = typename C::Element;
  uint32 const statistics = of_columns(shared.delta(stage), 4);
  FA_UNROLL
  for (int j = 0; j < C::BLOCK_M / 8; ++j) {
    Float2 const delta = load_shared_pair(statistics + 32 * j);
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      int const i = 4 * j + 2 * r;
      float const first = C::SLOPED_IN_16_BITS ? low(T{}, sloped[i / 2]) : scores[i];
      float const second = C::SLOPED_IN_16_BITS ? high(T{}, sloped[i / 2]) : scores[i + 1];
      dp[i] = first * (dp[i] - delta.x);
      dp[i + 1] = second * (dp[i + 1] - delta.y);
    }
  }
}

// 64 columns of dS K for a block of queries, from those of a chunk of K: over KEYS keys. `ds` is where dS^T of the first
// of them begins, `k` their row in the chunk.
template <class C, int KEYS>
FA_DEVICE void issue_columns(float (&dq)[32], uint32 ds, uint32 k) {
  ds = n_major(ds, 64), k = n_major(k, C::BLOCK_N);
  FA_UNROLL
  for (int key = 0; key < KEYS; key += 16) {  // dS^T of each consumer: [64 keys, 64 queries], once or twice
    uint32 const step = (key / 64 * (C::BLOCK_M / 64) * 64 * kRowBytes >> 4) + n_major_step(key % 64);
    wgmma_ss<1, 1>(typename C::Element{}, dq, ds + step, k + n_major_step(key), key != 0);
  }
  wgmma_commit();
}

// This consumer's part of dS K, summed over the keys of both consumers.
template <class C>
FA_DEVICE void issue_dq(float (&dq)[32], DkdvShared<C> const& shared, int consumer, int buffer) {
  issue_columns<C, C::BLOCK_N>(dq, shared.ds(buffer) + (C::DQ_BY_ROWS ? consumer * 64 * kRowBytes : 0),
                               shared.k() + (C::DQ_BY_ROWS ? 0 : consumer * C::BLOCK_N * kRowBytes));
}

// Address in dq_sums of a part: the consumer's, or 2 for the third chunk.
template <class C>
FA_DEVICE float* part_of_sums(BackwardArgs const& args, Tile const& tile, int part, int head, int block) {
  int64 const row = padded_row(args.p, tile, head) + block * C::BLOCK_M;
  return args.p.dq_sums + row * C::D_QK + part * 64 * 64;
}

// Adds a part to dq_sums, or stages it for the warp that does: four numbers of each thread, thread after thread.
template <class C>
FA_DEVICE void add_dq(BackwardArgs const& args, DkdvShared<C> const& shared, int part, int head, int block,
                      float const (&dq)[32]) {
  int const first = this_place().thread % kWarpgroup * 4;
  if (C::STAGED) named_sync(kPartFreeBarrier + part, kWarpgroup + 32);
  float* const to = part_of_sums<C>(args, read_tile(shared.tile()), part, head, block) + first;
  FA_UNROLL
  for (int j = 0; j < 8; ++j) {
    if (C::D_QK % 64 && part * 64 + 8 * j >= C::D_QK) continue;
    Float4 const four = {dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]};
    if (C::STAGED) store_shared_floats(shared.part(part) + 4 * (first + j * 512), four);
    else add_global(to + j * 512, four);
  }
  if (!C::STAGED) return;
  fence_proxy_async();
  named_arrive(kPartStagedBarrier + part, kWarpgroup + 32);
}

// Adds staged parts of dq to their sums, by one warp beside the producer.
template <class C>
FA_DEVICE void add_staged(BackwardArgs const& args, DkdvShared<C> const& shared) {
  int const end = query_heads(args.p, read_tile(shared.tile())).end;
  for (int head = query_heads(args.p, read_tile(shared.tile())).first; head < end; ++head) {
    Tile const tile = read_tile(shared.tile());  // values are read again when needed: this warp has 24 registers
    Range const blocks = read_blocks(shared.tile()).all;
    float* to = part_of_sums<C>(args, tile, 0, head, blocks.begin);
    for (int left = blocks.end - blocks.begin; left > 0; --left, to += C::BLOCK_M * C::D_QK) {
      FA_UNROLL
      for (int consumer = 0; consumer < C::CONSUMERS; ++consumer) {
        bool const adds = elect_one();
        if (adds) tma_store_wait_read_but<C::CONSUMERS - 1>();  // the part before has been read
        warp_sync();
        named_arrive(kPartFreeBarrier + consumer, kWarpgroup + 32);
        named_sync(kPartStagedBarrier + consumer, kWarpgroup + 32);
        if (!adds) continue;
        int const columns = C::DQ_BY_ROWS ? C::D_QK : smaller(64, C::D_QK - 64 * consumer);
        bulk_add(to + consumer * 64 * 64, shared.part(consumer), columns * 64 * 4);
        tma_store_commit();
      }
    }
  }
  if (elect_one()) tma_store_wait();
}

// Sums over all queries that see the tile. OF_K, OF_V: which of the sums this consumer owns; `keys` is the first of its
// 64 keys in the tile.
template <class C, bool OF_K, bool OF_V, int NK, int NV>
FA_DEVICE void sum_over_queries(BackwardArgs const& args, DkdvShared<C> const& shared, int consumer, int keys,
                                float (&dk)[NK], float (&dv)[NV]) {
  using T = typename C::Element;
  constexpr int N = C::BLOCK_M;
  Range const blocks = read_blocks(shared.tile()).all;
  Heads const heads = query_heads(args.p, read_tile(shared.tile()));
  Ring<C::STAGES> q{shared.q_ring()};
  int buffer = 0;
  mbarrier_wait(shared.k_full(), 0);
  mbarrier_wait(shared.v_full(), 0);
  clear_unkept_keys<C>(args, shared);
  for (int head = heads.first; head < heads.end; ++head) {
    for (int block = blocks.begin; block < blocks.end; ++block) {
      float scores[N / 2], dp[N / 2];
      uint32 p[N / 4], sloped[N / 4];
      mbarrier_wait(q.full(), q.parity);
      clear_rows_past_end<C>(args, shared, block, q);
      wgmma_fence();
      multiply_by_rows<T, C::D_QK, C::BLOCK_N, N>(scores, k_major(shared.k() + keys * kRowBytes),
                                                  k_major(shared.q(q.stage)));
      auto const issue_dp = [&] {
        wgmma_fence();
        multiply_by_rows<T, C::D_V, C::BLOCK_N, N>(dp, k_major(shared.v() + keys * kRowBytes),
                                                   k_major(shared.dout(q.stage)));
      };
      mbarrier_wait(shared.dout_full(q.stage), q.parity);
      if constexpr (OF_K && !C::LATE_DP) {
        issue_dp();
        wgmma_wait<1>(scores);
      } else {
        wgmma_wait<0>(scores);
      }
      [[maybe_unused]] uint32 left = 0;
      if constexpr (C::TERMS) {
        left = weigh_block_with_terms<C>(args, shared, keys, head, block, q.stage, scores, p);
      } else {
        weigh_block<C>(args, shared, keys, block, q.stage, scores, p, sloped);
      }
      if constexpr (OF_K && C::LATE_DP) issue_dp();
      if constexpr (OF_V) {
        wgmma_fence();
        add_product<T>(dv, p, n_major(shared.dout(q.stage), N));
      }
      if constexpr (OF_K) {
        uint32 ds[N / 4];
        wgmma_wait<OF_V ? 1 : 0>(dp);
        if constexpr (C::TERMS) undo_dropout(dp, left, static_cast<float>(args.p.numbers.dropout_scale));
        score_gradients<C>(shared, q.stage, scores, sloped, dp);
        pack_fragment<T>(ds, dp);
        if constexpr (C::FUSED) {
          stage_fragment<64>(shared.ds(buffer) + consumer * (N / 64 * 64 * kRowBytes), ds);
          fence_proxy_async();
          named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);  // dS^T of both is there
        }
        if constexpr (C::FUSED && !C::HAS_THIRD_CHUNK) {
          float dq[32];
          wgmma_fence();
          issue_dq<C>(dq, shared, consumer, buffer);
          wgmma_fence();
          add_product<T>(dk, ds, n_major(shared.q(q.stage), N));
          wgmma_wait<1>(dq);
          add_dq<C>(args, shared, consumer, head, block, dq);  // under the product for dk
        } else {
          wgmma_fence();
          add_product<T>(dk, ds, n_major(shared.q(q.stage), N));
        }
        wgmma_wait<0>(dk);
        release(q);
        if constexpr (C::HAS_THIRD_CHUNK) {  // one after the other: dq and dk in flight together are too many registers
          float dq[32];
          wgmma_fence();
          issue_dq<C>(dq, shared, consumer, buffer);
          wgmma_wait<0>(dq);
          add_dq<C>(args, shared, consumer, head, block, dq);
          wgmma_fence();
          issue_columns<C, 64>(dq, shared.ds(buffer) + consumer * 64 * kRowBytes,
                               shared.k() + (2 * C::BLOCK_N + keys) * kRowBytes);
          wgmma_wait<0>(dq);
          add_dq<C>(args, shared, 2, head, block, dq);
        }
        if constexpr (C::FUSED) buffer ^= 1;
      } else {
        wgmma_wait<0>(dv);
        release(q);
      }
    }
  }
}

// Stores one finished sum of 64 keys, through the tile that held the operand. `to` is row 0 of the tensor.
template <class C, int N>
FA_DEVICE void write_sum(BackwardArgs const& args, Tile const& tile, int keys, int64 columns, TensorMap const& map,
                         void* to, uint32 staging, float const (&sum)[N]) {
  BackwardParams const& p = args.p;
  int const first = tile.row + keys, map_row = tile.first_kv + static_cast<int>(p.key_begin) + first;
  uint32 packed[N / 2];
  pack_fragment<typename C::Element>(packed, sum);
  if (p.cu_seqlens_q && first + 64 > tile.s_kv) {
    int64 const stride = p.heads_kv * columns;
    store_fragment(static_cast<uint16*>(to) + map_row * stride + tile.head * columns, stride, tile.s_kv - first,
                   static_cast<int>(columns), packed);
    return;
  }
  uint32 const from = staging + keys * kRowBytes;
  stage_fragment<C::BLOCK_N>(from, packed);
  fence_proxy_async();
  named_sync(kOwnBarrier + this_place().consumer(), kWarpgroup);
  if (warp_uniform(this_place().warp()) == 0 && elect_one()) {
    for (int chunk = 0; chunk < (N + 31) / 32; ++chunk) {
      tma_store(&map, from + chunk * C::BLOCK_N * kRowBytes, chunk * kChunkColumns, map_row, tile.head, tile.map_batch);
    }
    tma_store_commit();
    tma_store_wait();
  }
}

// Stores one finished sum of 64 keys as a part, in the order of registers: four numbers of each thread, thread after
// thread.
template <int N>
FA_DEVICE void write_part(float* part, float const (&sum)[N]) {
  float* const to = part + this_place().thread % kWarpgroup * 4;
  FA_UNROLL
  for (int j = 0; j < N / 4; ++j) {
    Float4 const four = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
    store_global(reinterpret_cast<Float4*>(to + j * 512), four);
  }
}

template <class C, bool OF_K, bool OF_V>
FA_DEVICE void consume(BackwardArgs const& args, DkdvShared<C> const& shared, int consumer) {
  int const keys = C::SPLIT ? 0 : consumer * 64;
  constexpr int kSumsK = OF_K ? C::D_QK / 2 : 1, kSumsV = OF_V ? C::D_V / 2 : 1;
  float dk[kSumsK], dv[kSumsV];
  FA_UNROLL
  for (int i = 0; i < kSumsK; ++i) dk[i] = 0.f;
  FA_UNROLL
  for (int i = 0; i < kSumsV; ++i) dv[i] = 0.f;
  Range const blocks = read_blocks(shared.tile()).all;
  if (blocks.begin < blocks.end) sum_over_queries<C, OF_K, OF_V>(args, shared, consumer, keys, dk, dv);
  named_sync(kConsumersBarrier, C::CONSUMERS * kWarpgroup);  // nobody reads K and V any more
  Tile const tile = read_tile(shared.tile());
  if constexpr (OF_K) {
    float const scale = static_cast<float>(args.p.scale);
    FA_UNROLL
    for (int i = 0; i < kSumsK; ++i) dk[i] *= scale;
  }
  if constexpr (C::TERMS && OF_V) {
    float const scale = static_cast<float>(args.p.numbers.dropout_scale);
    FA_UNROLL
    for (int i = 0; i < kSumsV; ++i) dv[i] *= scale;
  }
  if (args.p.dk_parts) {  // one branch around both: with one for each of them the kernel for head dim 64 spills
    int64 const row = part_row(args.p, tile, tile.head) + keys;
    if constexpr (OF_V) write_part(args.p.dv_parts + row * C::D_V, dv);
    if constexpr (OF_K) write_part(args.p.dk_parts + row * C::D_QK, dk);
    return;
  }
  if constexpr (OF_V) write_sum<C>(args, tile, keys, args.p.head_dim_v, args.dv, args.p.dv, shared.v(), dv);
  if constexpr (OF_K) write_sum<C>(args, tile, keys, args.p.head_dim_qk, args.dk, args.p.dk, shared.k(), dk);
}

template <class C>
FA_DEVICE void backward_dkdv(BackwardArgs const& args) {
  DkdvShared<C> const shared{shared_base()};
  int const warpgroup = warp_uniform(thread_index() / kWarpgroup);
  if (thread_index() == 0) begin_dkdv<C>(args, shared);
  block_sync();
  if (read_tile(shared.tile()).row == kNoTile) return;
  if (warpgroup == 0) {
    give_registers<C::PRODUCER_REGISTERS>();
    int const warp = warp_uniform(thread_index() / 32);
    if (warp == 0 && elect_one()) produce<C>(args, shared);
    if (C::STAGED && warp == 1) add_staged<C>(args, shared);
    return;
  }
  take_registers<C::CONSUMER_REGISTERS>();
  if constexpr (!C::SPLIT) {
    consume<C, true, true>(args, shared, warpgroup - 1);
  } else if (warpgroup == 1) {
    consume<C, false, true>(args, shared, 0);
  } else {
    consume<C, true, false>(args, shared, 1);
  }
}

template <class C>
FA_GLOBAL(C::THREADS)
backward_dkdv_kernel(FA_KERNEL_ARGUMENT BackwardArgs args) {
  backward_dkdv<C>(args);
}

}  // namespace fa::sm90
