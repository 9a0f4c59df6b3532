// The producer: one thread that loads Q, K and V of every tile into shared memory by TMA, as buffers become free.
#pragma once
#include "fragment.cuh"
#include "terms.cuh"

namespace fa::sm90 {

template <class C>
FA_DEVICE void produce(ForwardArgs const& args, Shared<C> const& shared) {
  Ring<C::STAGES> k{shared.k_ring()}, v{shared.v_ring()};
  uint32 q_parity = 0;
  int const group = static_cast<int>(args.p.heads_q / args.p.heads_kv);
  Schedule<C::BLOCK_M> schedule(args.p);
  Tile tile{};
  bool more;
  do {
    more = schedule.next(tile);
    if (!more) tile.row = kNoTile;
    TileBlocks blocks{};
    if (more) {
      if constexpr (C::TERMS) {
        int32 const* const ranges = ranges_of(args.p, args.p.terms.ranges_q, tile.s_q, tile.batch);
        blocks = blocks_of<C::BLOCK_M, C::BLOCK_N>(band_of<C>(args.p, tile), tile.row, ranges);
      } else {
        blocks = blocks_of<C::BLOCK_M, C::BLOCK_N>(band_of<C>(args.p, tile), tile.row);
      }
    }
    int const head_kv = tile.head / group;
    auto const load_k = [&](int block) {
      mbarrier_wait(k.empty(), k.parity ^ 1);
      load_tile<C::BLOCK_N, C::CHUNKS_QK>(shared.k(k.stage), args.k, k.full(), tile.first_kv + block * C::BLOCK_N,
                                          head_kv, tile.map_batch, kEvictLast);
      k.advance();
    };
    auto const load_v = [&](int block) {
      mbarrier_wait(v.empty(), v.parity ^ 1);
      load_tile<C::BLOCK_N, C::CHUNKS_V>(shared.v(v.stage), args.v, v.full(), tile.first_kv + block * C::BLOCK_N,
                                         head_kv, tile.map_batch, kEvictLast);
      v.advance();
    };
    bool const any = blocks.all.begin < blocks.all.end;
    if (any) load_k(blocks.all.end - 1);
    mbarrier_wait(shared.q_empty(), q_parity ^ 1);
    q_parity ^= 1;
    write_tile(shared.tile(), tile, blocks);
    if (!any) {
      mbarrier_arrive(shared.q_full());
      continue;
    }
    load_tile<C::BLOCK_M, C::CHUNKS_QK>(shared.q(), args.q, shared.q_full(), tile.first_q + tile.row, tile.head,
                                        tile.map_batch, kEvictFirst);
    for (int block = blocks.all.end - 2; block >= blocks.all.begin; --block) {
      load_k(block);
      load_v(block + 1);
    }
    load_v(blocks.all.begin);
  } while (more);
}

}  // namespace fa::sm90
