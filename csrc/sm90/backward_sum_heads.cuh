// The kernel that runs after backward_dkdv where every query head had a block of its own: dk and dv in 16 bits from the
// parts of the heads that share keys, added in their order, so with the same bits every time. Bound by memory.
//
// A block has eight warps and works on 128 padded rows of one K/V head (kPaddedRows).
#pragma once
#include "backward.h"
#include "backward_traits.h"

namespace fa::sm90 {

// One gradient of a tile, from parts in the order of registers (backward_dkdv.cuh, write_part). A lane takes eight
// columns of a row, from four threads of that kernel.
template <class T, int COLUMNS>
FA_DEVICE void sum_parts(BackwardParams const& p, Tile const& tile, float const* parts, int columns, void* to) {
  constexpr int kGroups = COLUMNS / 8;
  int const group = static_cast<int>(p.heads_q / p.heads_kv);
  int64 const first = part_row(p, tile, tile.head * group), head_step = p.padded_kv * COLUMNS;
  for (int i = thread_index(); i < kPaddedRows * kGroups; i += kRowThreads) {
    int const row = i % 16 + i / (16 * kGroups) * 16, eight = i / 16 % kGroups;  // a half warp takes 16 rows
    if (tile.row + row >= tile.s_kv || 8 * eight >= columns) continue;
    float const* from = parts + (first + row - row % 64) * COLUMNS;
    from += eight * 512 + row % 64 / 16 * 128 + row % 8 * 16 + row / 8 % 2 * 2;
    Float2 sums[4] = {};
    for (int head = 0; head < group; ++head, from += head_step) {
      FA_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        Float2 const x = load_global(reinterpret_cast<Float2 const*>(from + 4 * pair));
        sums[pair].x += x.x, sums[pair].y += x.y;
      }
    }
    Packed8 packed;
    FA_UNROLL
    for (int pair = 0; pair < 4; ++pair) packed.pair[pair] = pack(T{}, sums[pair].x, sums[pair].y);
    int64 const at = tile.map_batch * p.seqlen_kv + tile.first_kv + p.key_begin + tile.row + row;
    uint16* const result = static_cast<uint16*>(to) + (at * p.heads_kv + tile.head) * columns + 8 * eight;
    store_global(reinterpret_cast<Packed8*>(result), packed);
  }
}

template <class C>
FA_DEVICE void backward_sum_heads(BackwardParams const& p) {
  using T = typename C::Element;
  Tile const tile = find_tile<kPaddedRows, Of::kSharedKeys>(p, block_index());
  sum_parts<T, C::D_QK>(p, tile, p.dk_parts, static_cast<int>(p.head_dim_qk), p.dk);
  sum_parts<T, C::D_V>(p, tile, p.dv_parts, static_cast<int>(p.head_dim_v), p.dv);
}

template <class C>
FA_GLOBAL(kRowThreads)
backward_sum_heads_kernel(FA_KERNEL_ARGUMENT BackwardParams p) {
  backward_sum_heads<C>(p);
}

}  // namespace fa::sm90
