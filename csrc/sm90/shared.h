// Shared by producer and consumers of the forward kernel: arguments, shared memory, rings, ranges of keys.
#pragma once
#include "../common/mask.h"
#include "../common/params.h"
#include "ptx.cuh"
#include "schedule.h"
#include "traits.h"

namespace fa::sm90 {

// Tensor maps are 4-D: (head dim, row, head, batch), boxes of 64 columns. See host.cu.
struct ForwardArgs {
  TensorMap q, k, v, out;
  ForwardParams p;
};

template <class C>
struct Shared {  // addresses
  uint32 base;
  FA_DEVICE uint32 q() const { return base + C::Q; }
  FA_DEVICE uint32 k(int stage) const { return base + C::K + stage * C::K_BYTES; }
  FA_DEVICE uint32 v(int stage) const { return base + C::V + stage * C::V_BYTES; }
  FA_DEVICE uint32 tile() const { return base + C::TILE; }
  FA_DEVICE uint32 q_full() const { return base + C::BARRIERS; }
  FA_DEVICE uint32 q_empty() const { return base + C::BARRIERS + 8; }
  FA_DEVICE uint32 k_ring() const { return base + C::BARRIERS + 16; }
  FA_DEVICE uint32 v_ring() const { return base + C::BARRIERS + 16 + 16 * C::STAGES; }
};

// A position in a ring of stages. Each stage has a barrier that says it is full and one that says it is empty.
template <int STAGES>
struct Ring {
  uint32 barriers;
  int stage = 0;
  uint32 parity = 0;  // of the round: flips with each time around
  FA_DEVICE uint32 full() const { return barriers + 8 * stage; }
  FA_DEVICE uint32 empty() const { return barriers + 8 * (STAGES + stage); }
  FA_DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <class C>
FA_DEVICE Band band_of(ForwardParams const& p, Tile const& tile) {
  if (!C::BAND) return make_band(kUnbounded, kUnbounded, false, tile.s_q, tile.s_kv);
  return make_band(static_cast<int>(p.left), static_cast<int>(p.right), p.lower_right != 0, tile.s_q, tile.s_kv);
}

// The factor between differences of scores and exponents of 2.
template <class Params>
FA_DEVICE float scale_log2_of(Params const& p) {
  return static_cast<float>(p.score_scale) * kLog2E;
}

// In blocks of COLUMNS columns: those with a column that is kept, and those with none that is not.
template <int COLUMNS>
FA_DEVICE TileBlocks blocks_in(Range kept, Range full) {
  int const first_full = (full.begin + COLUMNS - 1) / COLUMNS;
  return {{kept.begin / COLUMNS, (kept.end + COLUMNS - 1) / COLUMNS},
          {first_full, larger(first_full, full.end / COLUMNS)}};
}

// For the ROWS rows from `row` on, in blocks of COLUMNS columns.
template <int ROWS, int COLUMNS>
FA_DEVICE TileBlocks blocks_of(Band const& band, int row) {
  int const end_row = smaller(row + ROWS, band.s_q);
  return blocks_in<COLUMNS>(tile_range(band, row, end_row), full_range(band, row, end_row));
}

template <class C>
FA_DEVICE Range keys_of(int block) {
  return {block * C::BLOCK_N, (block + 1) * C::BLOCK_N};
}

}  // namespace fa::sm90
