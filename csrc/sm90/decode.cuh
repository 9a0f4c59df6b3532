// The decode kernel for Hopper: a few queries against a long cache of keys and values, contiguous or in pages of whole
// multiples of 8 rows. decode_gathered.cuh serves smaller ones.
//
// One warp loads K and V by TMA, through as many stages as shared memory holds, since the kernel is bound by memory.
// One consumer warpgroup computes as in the forward kernel, with rows that are query heads of one K/V head times
// positions. Each split writes its own out and lse, which combine.cuh combines; a single split writes the final ones.
#pragma once
#include "consumer.cuh"
#include "decode.h"
#include "decode_terms.cuh"

namespace fa::sm90 {

// ---- producer: one warp ------------------------------------------------------------------------------------------------

// Loads a block of keys or values in boxes, each within one page. Every lane looks up the pages of its boxes. A box
// without a kept row is loaded from beyond the last page, which gives zeros, and its page is not looked up.
template <class C, int CHUNKS>
FA_DEVICE void load_block(DecodeParams const& p, TensorMap const& map, Work const& work, Range const& kept, int block,
                          uint32 to, Ring<C::STAGES>& ring) {
  int const lane = thread_index() % 32, rows = static_cast<int>(p.box_rows), page_size = static_cast<int>(p.page_size);
  uint64 const l2_hint =
      work.s_q > p.positions_per_tile ? kEvictLast : kEvictFirst;  // other tiles read the keys too, or no tile does
  mbarrier_wait(ring.empty(), ring.parity ^ 1);
  if (lane == 0) mbarrier_expect(ring.full(), C::BLOCK_N * CHUNKS * kRowBytes);
  warp_sync();
  if (int const at = lane * rows; at < C::BLOCK_N) {
    int const key = block * C::BLOCK_N + at;
    int page = static_cast<int>(p.pages), row = 0;
    if (key < kept.end && key + rows > kept.begin) {
      int const entry = key / page_size;
      row = key - entry * page_size;
      page = p.block_table ? load_global(p.block_table + work.sequence * p.table_stride + entry) : work.sequence;
    }
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      tma_load(to + (chunk * C::BLOCK_N + at) * kRowBytes, &map, ring.full(), chunk * kChunkColumns, row, work.head_kv,
               page, l2_hint);
    }
  }
  ring.advance();
}

template <class C>
FA_DEVICE void produce(DecodeArgs const& args, Shared<C> const& shared, Work const& work) {
  Ring<C::STAGES> k{shared.k_ring()}, v{shared.v_ring()};
  Range const blocks = blocks_of<C>(args.p, work).all, kept = kept_keys(args.p, work);
  auto const load_k = [&](int block) {
    load_block<C, C::CHUNKS_QK>(args.p, args.k, work, kept, block, shared.k(k.stage), k);
  };
  auto const load_v = [&](int block) {
    load_block<C, C::CHUNKS_V>(args.p, args.v, work, kept, block, shared.v(v.stage), v);
  };
  if (blocks.begin == blocks.end) return;
  wait_for_kernel_before();
  load_k(blocks.end - 1);
  for (int block = blocks.end - 2; block >= blocks.begin; --block) {
    load_k(block);
    load_v(block + 1);
  }
  load_v(blocks.begin);
}

// ---- consumer: one warpgroup -------------------------------------------------------------------------------------------

// The place of a row of the tile in q and out: row = position * heads_per_tile + head.
struct Query {
  int position, head;
  bool exists;
};

FA_DEVICE Query query_of(DecodeParams const& p, Work const& work, int row) {
  int const heads = static_cast<int>(p.heads_per_tile), position = row / heads;
  Query const query = {work.position + position, work.first_head + row - position * heads, true};
  return {query.position, query.head, query.position < positions_of(p, work).end && query.head < work.end_head};
}

// q into shared memory, swizzled as TMA would; zeros where there is no row or column.
template <class C>
FA_DEVICE void load_queries(DecodeParams const& p, Shared<C> const& shared, Work const& work) {
  constexpr int kPieces = C::CHUNKS_QK * 8;  // of 16 bytes in a row
  for (int i = this_place().thread; i < C::BLOCK_M * kPieces; i += kWarpgroup) {
    int const row = i / kPieces, piece = i % kPieces;
    Query const query = query_of(p, work, row);
    Int4 x = {0, 0, 0, 0};
    if (query.exists && piece * 8 < p.head_dim_qk) {
      int64 const first = p.cu_seqlens_q ? work.first_q * p.q_strides.row : work.sequence * p.q_strides.batch;
      int64 const at = first + query.position * p.q_strides.row + query.head * p.q_strides.head + piece * 8;
      x = load_global(reinterpret_cast<Int4 const*>(static_cast<uint16 const*>(p.q) + at));
    }
    store_shared(shared.q() + (piece / 8 * C::BLOCK_M + row) * kRowBytes + (piece % 8 * 16 ^ row % 8 * 16), x);
  }
  fence_proxy_async();
  named_sync(kOwnBarrier, kWarpgroup);
}

// Zeroes values that no row of the tile keeps: their weights are 0, but they may be NaN.
template <class C>
FA_DEVICE void clear_unkept_values(Shared<C> const& shared, Range const& kept, int block, Ring<C::STAGES> const& v) {
  Range const keys = keys_of<C>(block);
  if (contains(kept, keys)) return;
  mbarrier_wait(v.full(), v.parity);
  clear_rows<C::BLOCK_N, C::CHUNKS_V, C::CONSUMERS>(shared.v(v.stage),
                                                    {kept.begin - keys.begin, kept.end - keys.begin});
  fence_proxy_async();
  named_sync(kOwnBarrier, kWarpgroup);
}

// The keys that a row keeps; in a tree as far as its depth decides, which is that of its place on a path.
FA_DEVICE Range keys_of_row(DecodeParams const& p, Work const& work, int position) {
  Band const band = band_of(p, work);
  if (!p.tree || position >= work.s_q) return tile_range(band, position, position + 1);
  int const depth = p.depths ? load_global(p.depths + work.first_q + position) : 0;
  return {p.depths ? larger(0, band.diagonal + depth - band.left) : 0, work.s_kv};
}

// Sets the scores of new keys to -inf whose bit is not set in this row of the tree, or that a window excludes.
template <int N>
FA_DEVICE void mask_by_tree(DecodeParams const& p, Work const& work, float (&scores)[N], int position, int lower,
                            int column) {
  if (position >= work.s_q) return;
  int32 const* const words = p.tree + ((p.shares_tree ? 0 : work.first_q) + position) * p.tree_words;
  int32 const* const depths = p.depths ? p.depths + work.first_q : nullptr;
  int const least = depths ? load_global(depths + position) - static_cast<int>(p.left) : 0;
  int const first = column - (work.s_kv - work.s_q);  // among the new keys
  FA_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    int const key = first + i / 2 * 8 + i % 2;
    if (key < 0 || key >= work.s_q) continue;
    bool const is_seen = load_global(words + key / 32) >> key % 32 & 1;
    if (!is_seen || (depths && load_global(depths + key) < least)) {
      scores[i / 2 * 4 + 2 * lower + i % 2] = negative_infinity();
    }
  }
}

template <class C>
FA_DEVICE void attend_to_cache(DecodeParams const& p, Shared<C> const& shared, Work const& work,
                               TileBlocks const& blocks, float (&out)[C::D_V / 2], RowState& state) {
  Ring<C::STAGES> k{shared.k_ring()}, v{shared.v_ring()};
  auto const mask = [&](float (&scores)[C::BLOCK_N / 2], int block) {
    if (C::GATHERED && p.has_softcap) cap_scores(scores, static_cast<float>(p.cap_scale));
    Place const at = this_place();
    Query const rows[2] = {query_of(p, work, at.first_row()), query_of(p, work, at.first_row() + 8)};
    int const upper = rows[0].position, lower = rows[1].position, column = block * C::BLOCK_N + at.first_column();
    for (int r = 0; C::GATHERED && has_terms(p) && r < 2; ++r) {
      add_terms_to_row<typename C::Element>(p, work, scores, r, rows[r].head, rows[r].position, column);
    }
    Range const kept[2] = {keys_of_row(p, work, upper), keys_of_row(p, work, lower)};
    mask_scores(scores, kept, column);
    if (!p.tree) return;
    mask_by_tree(p, work, scores, upper, 0, column);
    mask_by_tree(p, work, scores, lower, 1, column);
  };
  auto const clear = [&](int block, Ring<C::STAGES> const& of) {
    if (!C::GATHERED) clear_unkept_values<C>(shared, kept_keys(p, work), block, of);
  };
  attend<C>(shared, blocks, softmax_scale(p) * kLog2E, static_cast<float>(p.cap_scale), 0, k, v, out, state, mask,
            clear);
}

// Writes one row of a thread's fragment, the upper (0) or the lower (1), times `factor`.
template <class C>
FA_DEVICE void write_row(DecodeParams const& p, int64 row, int lower, float factor, int64 split,
                         float const (&out)[C::D_V / 2]) {
  int64 const first = row * p.head_dim_v + this_place().first_column();
  FA_UNROLL
  for (int j = 0; j < C::D_V / 8; ++j) {
    if (8 * j >= p.head_dim_v) continue;
    float const x = out[4 * j + 2 * lower] * factor, y = out[4 * j + 2 * lower + 1] * factor;
    if (p.splits > 1) {
      float* const to = p.partial_out + split * (p.heads_q * p.head_dim_v * rows_of(p)) + first + 8 * j;
      store_global(reinterpret_cast<Float2*>(to), Float2{x, y});
    } else {
      uint16* const to = static_cast<uint16*>(p.out) + first + 8 * j;
      store_global(reinterpret_cast<uint32*>(to), pack(typename C::Element{}, x, y));
    }
  }
}

// Writes out and lse of the tile, or of its split. The first split includes the sink; a later one without keys writes
// only an lse of -inf.
template <class C>
FA_DEVICE void write_tile(DecodeParams const& p, Work const& work, bool any_keys, RowState const& state,
                          float const (&out)[C::D_V / 2]) {
  Place const at = this_place();
  FA_UNROLL
  for (int lower = 0; lower < 2; ++lower) {
    Query const query = query_of(p, work, at.first_row() + 8 * lower);
    if (!query.exists) continue;
    bool const has_sink = p.sinks && work.split == 0;
    float const sink =
        has_sink ? load_global(p.sinks + work.sequence * p.sinks_batch_stride + query.head) : negative_infinity();
    FinishedRow const finished = finish_row(state.max[lower], state.sum[lower], softmax_scale(p), sink);
    int64 const row = (work.first_q + query.position) * p.heads_q + query.head;
    if (at.lane() % 4 == 0) {
      Parts* const partial = reinterpret_cast<Parts*>(p.partial_lse);
      if (p.splits > 1) store_global(partial + work.split * (p.heads_q * rows_of(p)) + row, finished.lse);
      else store_global(p.lse + lse_index(p, work.first_q + query.position, query.head), finished.lse.high);
    }
    if (any_keys || work.split == 0) write_row<C>(p, row, lower, finished.factor, work.split, out);
  }
}

template <class C>
FA_DEVICE void consume(DecodeParams const& p, Shared<C> const& shared, Work const& work) {
  float out[C::D_V / 2];
  RowState state{{negative_infinity(), negative_infinity()}, {0.f, 0.f}};
  FA_UNROLL
  for (int i = 0; i < C::D_V / 2; ++i) out[i] = 0.f;
  TileBlocks const blocks = blocks_of<C>(p, work);
  bool const any_keys = blocks.all.begin < blocks.all.end;
  if (any_keys) {
    load_queries<C>(p, shared, work);
    attend_to_cache<C>(p, shared, work, blocks, out, state);
  }
  write_tile<C>(p, work, any_keys, state, out);
}

// ---- the kernel --------------------------------------------------------------------------------------------------------
template <class C>
FA_DEVICE void init_barriers(Shared<C> const& shared) {
  for (int stage = 0; stage < C::STAGES; ++stage) {
    for (uint32 ring : {shared.k_ring(), shared.v_ring()}) {
      mbarrier_init(ring + 8 * stage, C::GATHERED ? 4 : 1);
      mbarrier_init(ring + 8 * (C::STAGES + stage), 4);  // one lane of each warp
    }
  }
  mbarrier_fence_init();
}

template <class C>
FA_DEVICE void decode(DecodeArgs const& args) {
  let_next_begin();
  Shared<C> const shared{shared_base()};
  Work const work = find_work(args.p, block_index());
  if (work.position >= work.s_q) return;
  if (thread_index() == 0) {
    init_barriers<C>(shared);
    tma_prefetch(&args.k);
    tma_prefetch(&args.v);
  }
  block_sync();
  int const warp = warp_uniform(thread_index() / 32);
  if (warp >= 4) consume<C>(args.p, shared, work);
  else if (warp == 0) produce<C>(args, shared, work);
}

template <class C>
FA_GLOBAL(C::THREADS)
decode_kernel(FA_KERNEL_ARGUMENT DecodeArgs args) {
  decode<C>(args);
}

}  // namespace fa::sm90
