// Shared by the roles of the decode kernel: traits, arguments, and the work of each thread block.
//
// A block works on one tile (64 rows: the query heads of one K/V head, times positions), and of its keys on one split.
#pragma once
#include "shared.h"

#ifndef FA_LEAST_KEYS  // an experiment of docs/measured.md; smaller in the emulator, for more splits
#define FA_LEAST_KEYS 256
#endif

namespace fa::sm90 {

template <class T, int D_QK_, int D_V_, bool SOFTCAP_, int BLOCK_N_, int STAGES_>
struct DecodeTraits {
  using Element = T;
  static constexpr int D_QK = D_QK_, D_V = D_V_, BLOCK_M = 64, BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  static constexpr bool SOFTCAP = SOFTCAP_, BAND = true, PINGPONG = false, EXP_OVERLAP = FA_EXP_OVERLAP;
  static constexpr bool GATHERED = false;
  static constexpr int CONSUMERS = 1, THREADS = 2 * kWarpgroup;  // few enough that every thread has 255 registers

  static constexpr int CHUNKS_QK = (D_QK + 63) / 64, CHUNKS_V = (D_V + 63) / 64;  // of 64 columns
  static constexpr int Q_BYTES = BLOCK_M * CHUNKS_QK * 128;
  static constexpr int K_BYTES = BLOCK_N * CHUNKS_QK * 128, V_BYTES = BLOCK_N * CHUNKS_V * 128;
  static constexpr int Q = 0, K = Q_BYTES, V = K + STAGES * K_BYTES, BARRIERS = V + STAGES * V_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 4 * STAGES);  // the first two as in Shared, not used here

  static_assert(BLOCK_N % 64 == 0 && D_QK % 16 == 0 && D_V % 16 == 0, "boxes have up to 64 rows, wgmma steps of 16");
  static_assert(SHARED_BYTES <= kSharedLimit, "more shared memory than a block can have");
};

// A kernel whose producers, a warpgroup, copy the rows one by one: 16-bit ones where they belong, or with SLOTS e4m3
// ones into slots, from which they convert them. It caps scores where it masks them, if the problem asks for it.
template <class T, int D_QK_, int D_V_, int STAGES_, int SLOTS_>
struct GatheredTraits : DecodeTraits<T, D_QK_, D_V_, false, 64, STAGES_> {
  using Base = DecodeTraits<T, D_QK_, D_V_, false, 64, STAGES_>;
  static constexpr bool GATHERED = true, E4M3 = SLOTS_ > 0;
  static constexpr int SLOTS = SLOTS_, AHEAD = E4M3 ? SLOTS - 1 : 2 * STAGES_ - 2;  // copies in flight; see gather()
  static constexpr int SCALES = Base::BLOCK_N * (D_QK_ > D_V_ ? D_QK_ : D_V_);  // in a slot, behind its rows
  static constexpr int SLOT_BYTES = SCALES + kWarpgroup * 16;
  static constexpr int SLOT = (Base::SHARED_BYTES + 15) / 16 * 16, SHARED_BYTES = SLOT + SLOTS * SLOT_BYTES;

  static_assert(SHARED_BYTES <= kSharedLimit, "more shared memory than a block can have");
};

// Tensor maps of the caches are 4-D: (head dim, row of a page, K/V head, page), boxes of 64 columns, box_rows rows.
struct DecodeArgs {
  TensorMap k, v;
  DecodeParams p;
};

// Rows of q, of all sequences.
FA_EVERYWHERE int64 rows_of(DecodeParams const& p) { return p.cu_seqlens_q ? p.seqlen_q : p.batch * p.seqlen_q; }

// ALiBi or a bias: scores are finished before the softmax (decode_terms.cuh).
FA_EVERYWHERE bool has_terms(DecodeParams const& p) { return p.alibi_slopes || p.bias; }

// Index into lse of a head and of row `row` among all rows of q. A packed batch counts as one sequence.
FA_DEVICE int64 lse_index(DecodeParams const& p, int64 row, int64 head) {
  int64 const sequence = row / p.seqlen_q;
  return (sequence * p.heads_q + head) * p.seqlen_q + row - sequence * p.seqlen_q;
}

struct Work {
  int sequence, s_q, s_kv;
  int first_q;   // where the sequence begins among all rows of q
  int position;  // the tile's first query row in its sequence; past s_q: there is nothing to do
  int head_kv, first_head, end_head;  // query heads of the tile
  int split;
};

// Tiles of the packed sequences before sequence n, at least: each may leave its last tile in part empty.
FA_DEVICE int tiles_before(DecodeParams const& p, int n) {
  return load_global(p.cu_seqlens_q + n) / static_cast<int>(p.positions_per_tile) + n;
}

// The packed sequence to which a tile belongs.
FA_DEVICE int sequence_of(DecodeParams const& p, int tile) {
  int low = 0, end = static_cast<int>(p.batch);
  while (end - low > 1) {
    int const middle = (low + end) / 2;
    if (tiles_before(p, middle) <= tile) low = middle;
    else end = middle;
  }
  return low;
}

// Part `index` of the work. Consecutive parts read the same keys, if several tiles do.
FA_DEVICE Work find_work(DecodeParams const& p, int index) {
  int const tiles = static_cast<int>(p.tiles), splits = static_cast<int>(p.splits);
  int const group = static_cast<int>(p.heads_q / p.heads_kv), heads = static_cast<int>(p.heads_per_tile);
  int const parts_of_group = (group + heads - 1) / heads, positions = static_cast<int>(p.positions_per_tile);
  Work work{};
  work.split = index / tiles % splits;
  work.head_kv = index / tiles / splits;
  int const tile = index % tiles / parts_of_group, part = index % tiles % parts_of_group;
  work.first_head = work.head_kv * group + part * heads;
  work.end_head = smaller(work.first_head + heads, (work.head_kv + 1) * group);
  if (p.cu_seqlens_q) {
    work.sequence = sequence_of(p, tile);
    work.position = (tile - tiles_before(p, work.sequence)) * positions;
    work.first_q = load_global(p.cu_seqlens_q + work.sequence);
    work.s_q = load_global(p.cu_seqlens_q + work.sequence + 1) - work.first_q;
  } else {
    work.s_q = static_cast<int>(p.seqlen_q);
    int const tiles_of_sequence = (work.s_q + positions - 1) / positions;
    work.sequence = tile / tiles_of_sequence;
    work.position = (tile - work.sequence * tiles_of_sequence) * positions;
    work.first_q = work.sequence * work.s_q;
  }
  int const new_keys = p.new_keys < 0 ? work.s_q : static_cast<int>(p.new_keys),
            capacity = static_cast<int>(p.capacity);
  work.s_kv = p.cache_lengths ? smaller(load_global(p.cache_lengths + work.sequence) + new_keys, capacity) : capacity;
  return work;
}

FA_DEVICE Band band_of(DecodeParams const& p, Work const& work) {
  return make_band(static_cast<int>(p.left), static_cast<int>(p.right), true, work.s_q, work.s_kv);
}

struct Positions {  // of the query rows of a tile
  int begin, end;
};

FA_DEVICE Positions positions_of(DecodeParams const& p, Work const& work) {
  return {work.position, smaller(work.position + static_cast<int>(p.positions_per_tile), work.s_q)};
}

// The rows that bound the keys of the tile. In a tree a row may stand anywhere between its first row and its last.
FA_DEVICE Positions bounds_of(DecodeParams const& p, Work const& work) {
  return p.tree ? Positions{0, work.s_q} : positions_of(p, work);
}

// The keys that some row of the tile keeps, in all splits together.
FA_DEVICE Range kept_keys(DecodeParams const& p, Work const& work) {
  Positions const rows = bounds_of(p, work);
  return tile_range(band_of(p, work), rows.begin, rows.end);
}

// The device divides the keys by cache_lengths; the host knows only the most splits there may be. Splits shorter than
// this are assumed to cost more to combine than they save.
constexpr int kLeastKeys = FA_LEAST_KEYS;

// Blocks of keys of the tile's split, and those among them that need no mask.
template <class C>
FA_DEVICE TileBlocks blocks_of(DecodeParams const& p, Work const& work) {
  constexpr int N = C::BLOCK_N;
  Positions const rows = bounds_of(p, work);
  Range const kept = kept_keys(p, work);
  Range full = full_range(band_of(p, work), rows.begin, rows.end);
  if (p.tree) full.end = smaller(full.end, work.s_kv - work.s_q);
  int const begin = kept.begin / N, end = (kept.end + N - 1) / N, splits = static_cast<int>(p.splits);
  int const blocks = larger((end - begin + splits - 1) / splits, kLeastKeys / N), first = begin + work.split * blocks;
  Range const of_split = {first, larger(first, smaller(first + blocks, end))};
  // Scores are capped, and finished, where they are masked.
  if (C::GATHERED && (p.has_softcap || has_terms(p))) return {of_split, {0, 0}};
  int const first_full = (full.begin + N - 1) / N;
  return {of_split, {first_full, larger(first_full, full.end / N)}};
}

}  // namespace fa::sm90
