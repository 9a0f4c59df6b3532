// The tile scheduler of the forward kernel. Blocks are persistent: block b takes tiles b, b + blocks, ... The producer
// walks this sequence and writes each tile to shared memory with its Q. Consumers read it there whenever they need it,
// so it occupies no registers during the computation.
//
// Tiles are numbered pass by pass. A pass has as many heads as fit L2 with their keys and values. Inside it the last
// query rows come first, since under a causal mask they have the most keys: long tiles start first, and short ones fill
// the gaps at the end.
//
// In that order tiles of a causal mask get shorter, and whoever is first in each round of tiles would have the longest of each.
// So every second round of a pass is dealt from the other end, and each pass begins where the one before left some blocks
// without a tile. The longest block then works at most 1.01 times the mean in the shapes of a language model
// (tests/backends/cuda/test_schedule.py), without the counter in global memory that a dynamic scheduler needs.
#pragma once
#include "../common/mask.h"
#include "../common/params.h"
#include "ptx.cuh"

namespace fa::sm90 {

struct Tile {
  int row;  // first query row in its sequence; kNoTile after the last tile
  int s_q, s_kv;  // lengths of the sequence
  int head, batch;
  int map_batch;  // batch coordinate in the tensor maps: 0 if packed
  int first_q, first_kv;  // row coordinates of the sequence's row 0 in the tensor maps
};

constexpr int kNoTile = -1;

// Blocks of keys that a tile works on, and those among them that need no mask.
struct TileBlocks {
  Range all, unmasked;
};

FA_DEVICE void write_tile(uint32 to, Tile const& tile, TileBlocks const& blocks) {
  store_shared(to, {tile.row, tile.s_q, tile.s_kv, tile.head});
  store_shared(to + 16, {tile.batch, tile.map_batch, tile.first_q, tile.first_kv});
  store_shared(to + 32, {blocks.all.begin, blocks.all.end, blocks.unmasked.begin, blocks.unmasked.end});
}

FA_DEVICE Tile read_tile(uint32 from) {
  Int4 const a = load_shared(from), b = load_shared(from + 16);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

FA_DEVICE TileBlocks read_blocks(uint32 from) {
  Int4 const c = load_shared(from + 32);
  return {{c.x, c.y}, {c.z, c.w}};
}

template <int BLOCK_M>
class Schedule {
 public:
  FA_DEVICE explicit Schedule(ForwardParams const& params) : p(params), next_tile(gets_shorter() ? 0 : block_index()) {}

  // The next tile of this block; false when there is none.
  FA_DEVICE bool next(Tile& tile) { return p.cu_seqlens_q ? next_packed(tile) : next_dense(tile); }

 private:
  ForwardParams const& p;
  int next_tile;  // of a causal mask: the next turn
  int sequence = 0, tiles_before = 0;  // packed: the sequence reached, and the tiles of those before it

  FA_DEVICE bool next_dense(Tile& tile) {
    int const blocks = row_blocks(static_cast<int>(p.seqlen_q)), heads = static_cast<int>(p.heads_q);
    int const pairs = heads * static_cast<int>(p.batch);
    int const index = gets_shorter() ? dealt(blocks, pairs) : next_tile;
    if (index >= blocks * pairs) return false;
    int const pair = place(tile, index, blocks, pairs);
    tile.batch = tile.map_batch = pair / heads;
    tile.head = pair - tile.batch * heads;
    tile.s_q = static_cast<int>(p.seqlen_q);
    tile.s_kv = static_cast<int>(p.seqlen_kv);
    tile.first_q = 0;
    tile.first_kv = -static_cast<int>(p.key_begin);
    next_tile += gets_shorter() ? 0 : block_count();
    return true;
  }

  // Whether the tiles of a pass get shorter from the first to the last, which is nearly empty: those of a causal mask.
  FA_DEVICE bool gets_shorter() const {
    return !p.cu_seqlens_q && p.left == kUnbounded && p.right != kUnbounded && p.seqlen_q >= p.seqlen_kv;
  }

  // The tile that this block gets in its next turn with any, dealt forwards and backwards; a number too large if none is left.
  FA_DEVICE int dealt(int blocks, int pairs) {
    int const players = block_count(), of_pass = static_cast<int>(p.heads_per_pass) * blocks;
    int const rounds = (of_pass + players - 1) / players;
    while (true) {
      int const pass = next_tile / rounds, round = next_tile - pass * rounds;
      int const seat = (block_index() + pass * of_pass) % players;
      int const in_pass = round * players + (round % 2 ? players - 1 - seat : seat);
      ++next_tile;
      if (in_pass < of_pass || pass * of_pass >= blocks * pairs) return pass * of_pass + in_pass;
    }
  }

  FA_DEVICE bool next_packed(Tile& tile) {
    int const heads = static_cast<int>(p.heads_q);
    for (; sequence < p.batch; ++sequence) {
      tile.first_q = load_global(p.cu_seqlens_q + sequence);
      tile.s_q = load_global(p.cu_seqlens_q + sequence + 1) - tile.first_q;
      int const blocks = row_blocks(tile.s_q);
      if (next_tile - tiles_before < blocks * heads) {
        tile.head = place(tile, next_tile - tiles_before, blocks, heads);
        tile.batch = sequence;
        tile.map_batch = 0;
        tile.first_kv = load_global(p.cu_seqlens_kv + sequence);
        tile.s_kv = load_global(p.cu_seqlens_kv + sequence + 1) - tile.first_kv;
        next_tile += block_count();
        return true;
      }
      tiles_before += blocks * heads;
    }
    return false;
  }

  // Sets the rows of tile `index` out of `blocks` x `pairs`, and returns its (batch, head) pair.
  FA_DEVICE int place(Tile& tile, int index, int blocks, int pairs) const {
    int const wanted = static_cast<int>(p.heads_per_pass);
    int const pass = index / (wanted * blocks), in_pass = index - pass * wanted * blocks;
    int const left = pairs - pass * wanted, width = left < wanted ? left : wanted;
    int const block = in_pass / width;
    tile.row = (blocks - 1 - block) * BLOCK_M;
    return pass * wanted + in_pass - block * width;
  }

  FA_DEVICE static int row_blocks(int rows) { return (rows + BLOCK_M - 1) / BLOCK_M; }
};

}  // namespace fa::sm90
