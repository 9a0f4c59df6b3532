// The kernel that runs after the fused backward kernel and converts the fp32 sums of dq to 16 bits. Bound by memory.
//
// A block has eight warps and works on 128 padded rows of one head (kPaddedRows).
#pragma once
#include "backward.h"
#include "backward_traits.h"

namespace fa::sm90 {

// dq of a tile from its sums, which are in the register order of the kernel that made them (backward_dkdv.cuh, add_dq).
// A lane takes eight columns of a row, from four threads of that kernel.
template <class C>
FA_DEVICE void backward_postprocess(BackwardParams const& p) {
  Tile const tile = find_tile<kPaddedRows, Of::kQueries>(p, block_index());
  int64 const first_padded = padded_row(p, tile, tile.head) + tile.row;
  int const columns = static_cast<int>(p.head_dim_qk);
  float const scale = static_cast<float>(p.scale);
  constexpr int kGroups = (C::D_QK + 7) / 8;
  for (int i = thread_index(); i < kPaddedRows * kGroups; i += kRowThreads) {
    int const row = i % 16 + i / (16 * kGroups) * 16, group = i / 16 % kGroups;  // a half warp takes 16 rows
    if (tile.row + row >= tile.s_q || 8 * group >= columns) continue;
    int const in_block = row % C::BLOCK_M, part = C::DQ_BY_ROWS ? in_block / 64 : group / 8;
    float const* from = p.dq_sums + (first_padded + row - in_block) * C::D_QK + part * 64 * 64;
    from += (C::DQ_BY_ROWS ? group : group % 8) * 512 + in_block % 64 / 16 * 128 + row % 8 * 16 + row / 8 % 2 * 2;
    Packed8 packed;
    FA_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      Float2 const x = load_global(reinterpret_cast<Float2 const*>(from + 4 * pair));
      packed.pair[pair] = pack(typename C::Element{}, x.x * scale, x.y * scale);
    }
    int64 const map_row = tile.map_batch * p.seqlen_q + tile.first_q + tile.row + row;
    uint16* const to = static_cast<uint16*>(p.dq) + (map_row * p.heads_q + tile.head) * columns + 8 * group;
    store_global(reinterpret_cast<Packed8*>(to), packed);
  }
}

template <class C>
FA_GLOBAL(kRowThreads)
backward_postprocess_kernel(FA_KERNEL_ARGUMENT BackwardParams p) {
  backward_postprocess<C>(p);
}

}  // namespace fa::sm90
