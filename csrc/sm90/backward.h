// Shared by the kernels of the backward pass: arguments, and the tile of each thread block.
//
// A block works on one tile. The hardware starts blocks in order, so long tiles come first. Tiles are numbered pass by
// pass as in schedule.h, and all warps read the tile of the block from shared memory, as there.
#pragma once
#include "../common/gradient.h"
#include "shared.h"

namespace fa::sm90 {

constexpr int kRowThreads = 256;  // of a block of the kernels before and after the large ones

// Tensor maps as in ForwardArgs. A kernel has those that it needs: boxes of dq, dk and dv have 64 rows.
struct BackwardArgs {
  TensorMap q, k, v, dout, dq, dk, dv;
  BackwardParams p;
};

// First padded row of packed sequence n, which begins at row `begin`.
FA_DEVICE int padded_begin(int begin, int n) { return (begin + n * kPaddedRows) / kPaddedRows * kPaddedRows; }

// The packed sequence to which a padded row belongs.
FA_DEVICE int sequence_at(int32 const* cu_seqlens, int sequences, int padded_row) {
  int low = 0, end = sequences;
  while (end - low > 1) {
    int const middle = (low + end) / 2;
    if (padded_begin(load_global(cu_seqlens + middle), middle) <= padded_row) low = middle;
    else end = middle;
  }
  return low;
}

// Whose heads the tiles are: of queries; of keys, with a tile for each query head if they have parts; of keys in any case.
enum class Of { kQueries, kKeys, kSharedKeys };

template <Of OF>
FA_EVERYWHERE int64 heads_of(BackwardParams const& p) {
  return OF == Of::kQueries || (OF == Of::kKeys && p.dk_parts) ? p.heads_q : p.heads_kv;
}

// Tile `index` of BLOCK query rows, or key rows. Its row may lie past the end of its sequence, in the padding. Under a
// causal mask the first keys and the last queries have the longest tiles: those come first.
template <int BLOCK, Of OF>
FA_DEVICE Tile find_tile(BackwardParams const& p, int index) {
  constexpr bool OF_KEYS = OF != Of::kQueries;
  bool const is_packed = p.cu_seqlens_q != nullptr;
  int const heads = static_cast<int>(heads_of<OF>(p));
  int const pairs = is_packed ? heads : heads * static_cast<int>(p.batch);
  int const blocks = static_cast<int>(OF_KEYS ? p.padded_kv : p.padded_q) / BLOCK;
  int const wanted =
      static_cast<int>(OF_KEYS ? p.kv_heads_per_pass * (heads_of<OF>(p) / p.heads_kv) : p.heads_per_pass);
  int const pass = index / (wanted * blocks), in_pass = index - pass * wanted * blocks;
  int const width = smaller(pairs - pass * wanted, wanted), block = in_pass / width;
  int const pair = pass * wanted + in_pass - block * width;
  Tile tile{};
  tile.row = (OF_KEYS ? block : blocks - 1 - block) * BLOCK;
  if (!is_packed) {
    tile.batch = tile.map_batch = pair / heads;
    tile.head = pair - tile.batch * heads;
    tile.s_q = static_cast<int>(p.seqlen_q);
    tile.s_kv = static_cast<int>(p.seqlen_kv);
    tile.first_kv = -static_cast<int>(p.key_begin);
    return tile;
  }
  int32 const* const own = OF_KEYS ? p.cu_seqlens_kv : p.cu_seqlens_q;
  int const n = sequence_at(own, static_cast<int>(p.batch), tile.row);
  tile.row -= padded_begin(load_global(own + n), n);
  tile.batch = n;
  tile.head = pair;
  tile.first_q = load_global(p.cu_seqlens_q + n);
  tile.s_q = load_global(p.cu_seqlens_q + n + 1) - tile.first_q;
  tile.first_kv = load_global(p.cu_seqlens_kv + n);
  tile.s_kv = load_global(p.cu_seqlens_kv + n + 1) - tile.first_kv;
  return tile;
}

// The number of tiles of `find_tile`.
template <int BLOCK, Of OF>
FA_EVERYWHERE int64 tile_count(BackwardParams const& p) {
  return (OF == Of::kQueries ? p.padded_q : p.padded_kv) / BLOCK * heads_of<OF>(p) * (p.cu_seqlens_q ? 1 : p.batch);
}

struct Heads {  // of a tile of keys: its K/V head, and the query heads that it works on
  int kv, first, end;
};

FA_DEVICE Heads query_heads(BackwardParams const& p, Tile const& tile) {
  int const group = static_cast<int>(p.heads_q / p.heads_kv);
  if (p.dk_parts) return {tile.head / group, tile.head, tile.head + 1};
  return {tile.head, tile.head * group, (tile.head + 1) * group};
}

// Row 0 of a tile of keys in dk_parts and dv_parts, for a query head.
FA_DEVICE int64 part_row(BackwardParams const& p, Tile const& tile, int head_q) {
  int const begin = p.cu_seqlens_q ? padded_begin(tile.first_kv, tile.batch) : 0;
  return (tile.map_batch * p.heads_q + head_q) * p.padded_kv + begin + tile.row;
}

// Row 0 of a tile's sequence and query head in lse_parts and delta.
FA_DEVICE int64 padded_row(BackwardParams const& p, Tile const& tile, int head_q) {
  int const begin = p.cu_seqlens_q ? padded_begin(tile.first_q, tile.batch) : 0;
  return (tile.map_batch * p.heads_q + head_q) * p.padded_q + begin;
}

FA_DEVICE Band band_of(BackwardParams const& p, Tile const& tile) {
  return make_band(static_cast<int>(p.left), static_cast<int>(p.right), p.lower_right != 0, tile.s_q, tile.s_kv);
}

FA_DEVICE ScoreScales scales_of(BackwardParams const& p) {
  return {static_cast<float>(p.score_scale), static_cast<float>(p.cap_scale)};
}

// The keys of a packed sequence that some query keeps, counted from `first`; rows outside belong to another sequence or
// may hold NaN. In a dense batch all rows: tensor maps include only keys that are kept.
FA_DEVICE Range keys_to_keep(BackwardParams const& p, Tile const& tile, int first, int rows) {
  if (!p.cu_seqlens_q) return {0, rows};
  Range const kept = tile_range(band_of(p, tile), 0, tile.s_q);
  return {kept.begin - first, kept.end - first};
}

}  // namespace fa::sm90
