// The tile scheduler of the forward kernel. Blocks are persistent: each begins with the tile of its own number and takes another
// when it has loaded the last. The producer takes tiles and writes each to shared memory with its Q. Consumers read it there
// whenever they need it, so it occupies no registers during the computation.
//
// Tiles are numbered pass by pass. A pass has as many heads as fit L2 with their keys and values. Inside it the last
// query rows come first, since under a causal mask they have the most keys: long tiles start first, and short ones fill
// the gaps at the end.
//
// Where tiles differ in length, a block draws the number of its next tile from a counter in global memory, so whoever is free
// takes the longest that is left: the longest block works at most 1.03 times the mean (tests/backends/cuda/test_schedule.py).
// Without a counter it takes every tile that lies as many numbers on as there are blocks.
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
  FA_DEVICE explicit Schedule(ForwardParams const& params) : p(params) {}

  // The next tile of this block; false when there is none.
  FA_DEVICE bool next(Tile& tile) {
    if (number < 0) number = block_index();
    else number = block_count() + (p.counter ? draw(p.counter) : number);
    int const tiles = p.cu_seqlens_q ? find_packed(tile) : find_dense(tile);
    if (number < tiles) return true;
    // Every block that had a tile has drawn a number past the last: whoever drew the largest leaves the counter at 0.
    if (p.counter && number == tiles + block_count() - 1) store_global(p.counter, 0);
    return false;
  }

 private:
  ForwardParams const& p;
  int number = -1;  // of the tile
  int sequence = 0, tiles_before = 0;  // packed: the sequence reached, and the tiles of those before it

  // These return how many tiles there are, or at least a number larger than that of the tile.
  FA_DEVICE int find_dense(Tile& tile) const {
    int const blocks = row_blocks(static_cast<int>(p.seqlen_q)), heads = static_cast<int>(p.heads_q);
    int const pairs = heads * static_cast<int>(p.batch);
    if (number >= blocks * pairs) return blocks * pairs;
    int const pair = place(tile, number, blocks, pairs);
    tile.batch = tile.map_batch = pair / heads;
    tile.head = pair - tile.batch * heads;
    tile.s_q = static_cast<int>(p.seqlen_q);
    tile.s_kv = static_cast<int>(p.seqlen_kv);
    tile.first_q = 0;
    tile.first_kv = -static_cast<int>(p.key_begin);
    return blocks * pairs;
  }

  FA_DEVICE int find_packed(Tile& tile) {
    int const heads = static_cast<int>(p.heads_q);
    for (; sequence < p.batch; ++sequence) {
      tile.first_q = load_global(p.cu_seqlens_q + sequence);
      tile.s_q = load_global(p.cu_seqlens_q + sequence + 1) - tile.first_q;
      int const blocks = row_blocks(tile.s_q);
      if (number - tiles_before < blocks * heads) {
        tile.head = place(tile, number - tiles_before, blocks, heads);
        tile.batch = sequence;
        tile.map_batch = 0;
        tile.first_kv = load_global(p.cu_seqlens_kv + sequence);
        tile.s_kv = load_global(p.cu_seqlens_kv + sequence + 1) - tile.first_kv;
        return tiles_before + blocks * heads;
      }
      tiles_before += blocks * heads;
    }
    return tiles_before;
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
