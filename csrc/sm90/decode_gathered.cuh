// The decode kernel for caches that TMA cannot load: pages of fewer than 8 rows, or rows in e4m3;
// and for calls with ALiBi or a bias.
//
// Its consumer is that of decode.cuh. Its producers are a warpgroup, of which two threads copy each row of a block,
// asynchronously, many blocks ahead. What a thread has copied it finds in shared memory without a barrier, so e4m3
// needs none between the copy and the conversion to the dtype of q.
#pragma once
#include "decode.cuh"

namespace fa::sm90 {

// Keys or values of a block, in the order in which the consumer takes them: K, K, V, K, V, ..., K, V, V.
struct Item {
  bool is_values;
  int block;
};

FA_DEVICE Item item_of(Range const& blocks, int number) {
  int const count = blocks.end - blocks.begin, last = 2 * count - 1;
  bool const is_values = number == last || (number > 0 && number % 2 == 0);
  int const back = number == last ? count - 1 : is_values ? number / 2 - 1 : (number + 1) / 2;
  return {is_values, blocks.end - 1 - back};
}

struct Cache {  // of keys, or of values
  void const* rows;
  Strides strides;
  int64 columns;
  float const* scale;
  int64 scale_stride;
};

FA_DEVICE Cache cache_of(DecodeParams const& p, bool is_values) {
  return is_values ? Cache{p.v_cache, p.v_strides, p.head_dim_v, p.v_scale, p.v_scale_stride}
                   : Cache{p.k_cache, p.k_strides, p.head_dim_qk, p.k_scale, p.k_scale_stride};
}

struct CacheRow {
  int page, row;
  bool exists;  // else there are zeros in its place
};

// Rows that the tile does not keep are not looked up; a page that does not exist has no rows.
template <class T>
FA_DEVICE CacheRow find_row(DecodeParams const& p, Work const& work, Range const& kept, int key) {
  if (!contains(kept, key)) return {0, 0, false};
  if (p.bias && !is_kept_by_bias<T>(p, work, key)) return {0, 0, false};
  int const page_size = static_cast<int>(p.page_size), entry = key / page_size;
  int const page = p.block_table ? load_global(p.block_table + work.sequence * p.table_stride + entry) : work.sequence;
  return {page, key - entry * page_size, page >= 0 && page < p.pages};
}

// Where piece `piece`, of 16 bytes, of a row of a tile in shared memory lies.
FA_DEVICE uint32 place_of(uint32 tile, int row, int piece) {
  return tile + (piece / 8 * 64 + row) * kRowBytes + (piece % 8 * 16 ^ row % 8 * 16);
}

// Begins to copy this thread's half of a row: 16-bit numbers into the tile at `to`, e4m3 ones into the slot at `to`.
template <class C, int COLUMNS>
FA_DEVICE void copy_row(Cache const& cache, CacheRow const& at, int head, uint32 to) {
  constexpr int kBytes = C::E4M3 ? 1 : 2, kColumns = 16 / kBytes;  // of a number; in a piece
  int const thread = thread_index(), half = thread % 2;
  int64 const first = at.page * cache.strides.batch + at.row * cache.strides.row + head * cache.strides.head;
  uint8 const* const from = static_cast<uint8 const*>(cache.rows) + (at.exists ? first * kBytes : 0);
  FA_UNROLL
  for (int i = 0; i < COLUMNS / kColumns / 2; ++i) {
    int const piece = 2 * i + half;
    bool const exists = at.exists && piece * kColumns < cache.columns;
    uint32 const place = C::E4M3 ? to + (i * kWarpgroup + thread) * 16 : place_of(to, thread / 2, piece);
    copy_async<16>(place, exists ? from + 16 * piece : from, exists);
  }
  if (C::E4M3 && cache.scale) {
    float const* const scale = cache.scale + (at.exists ? at.page * cache.scale_stride : 0) + head;
    copy_async<4>(to + C::SCALES + 16 * thread, scale, at.exists);
  }
}

template <class T>
FA_DEVICE uint32 scaled_pair(uint32 bytes, float scale) {  // of two e4m3 numbers
  uint32 const halves = pair_of_e4m3(bytes & 0xffff);
  return pack(T{}, low(F16{}, halves) * scale, high(F16{}, halves) * scale);
}

// Converts this thread's half of a row from its slot into the tile.
template <class C, int COLUMNS>
FA_DEVICE void convert_row(uint32 slot, bool has_scale, uint32 tile) {
  using T = typename C::Element;
  int const thread = thread_index(), half = thread % 2;
  float const scale = has_scale ? load_shared_float(slot + C::SCALES + 16 * thread) : 1.f;
  auto const word = [&](int bytes, int shift) {
    return static_cast<int>(scaled_pair<T>(static_cast<uint32>(bytes) >> shift, scale));
  };
  FA_UNROLL
  for (int i = 0; i < COLUMNS / 32; ++i) {
    int const piece = 2 * (2 * i + half);
    Int4 const x = load_shared(slot + (i * kWarpgroup + thread) * 16);
    store_shared(place_of(tile, thread / 2, piece), {word(x.x, 0), word(x.x, 16), word(x.y, 0), word(x.y, 16)});
    store_shared(place_of(tile, thread / 2, piece + 1), {word(x.z, 0), word(x.z, 16), word(x.w, 0), word(x.w, 16)});
  }
}

// Hands a stage over to the consumer: what this warp wrote there by ordinary stores or copies.
template <int STAGES>
FA_DEVICE void hand_over(Ring<STAGES>& ring) {
  fence_proxy_async();
  warp_sync();
  if (thread_index() % 32 == 0) mbarrier_arrive(ring.full());
  ring.advance();
}

// Every thread begins its copies of an item, and finishes those of the item AHEAD before it. With 16-bit rows an item
// needs a free stage at its beginning. While the consumer waits for V of one block it still holds K of the next, so of
// 2 * STAGES stages up to 2 * STAGES - 2 may be on their way. With e4m3 it needs a stage at its end, and a slot before.
template <class C>
FA_DEVICE void gather(DecodeParams const& p, Shared<C> const& shared, Work const& work) {
  Ring<C::STAGES> k{shared.k_ring()}, v{shared.v_ring()}, full_k = k, full_v = v;
  Range const blocks = blocks_of<C>(p, work).all, kept = kept_keys(p, work);
  int const items = 2 * (blocks.end - blocks.begin);
  auto const slot = [&](int number) {
    return shared.base + C::SLOT + number % (C::E4M3 ? C::SLOTS : 1) * C::SLOT_BYTES;
  };
  auto const free_stage = [](Ring<C::STAGES>& ring) {
    mbarrier_wait(ring.empty(), ring.parity ^ 1);
    int const stage = ring.stage;
    ring.advance();
    return stage;
  };
  auto const begin = [&](int number) {
    Item const item = item_of(blocks, number);
    CacheRow const row = find_row<typename C::Element>(p, work, kept, item.block * C::BLOCK_N + thread_index() / 2);
    Cache const cache = cache_of(p, item.is_values);
    if (item.is_values) {
      copy_row<C, C::D_V>(cache, row, work.head_kv, C::E4M3 ? slot(number) : shared.v(free_stage(v)));
    } else {
      copy_row<C, C::D_QK>(cache, row, work.head_kv, C::E4M3 ? slot(number) : shared.k(free_stage(k)));
    }
  };
  auto const finish = [&](int number) {
    if (item_of(blocks, number).is_values) {
      if (C::E4M3) convert_row<C, C::D_V>(slot(number), p.v_scale, shared.v(free_stage(v)));
      hand_over(full_v);
    } else {
      if (C::E4M3) convert_row<C, C::D_QK>(slot(number), p.k_scale, shared.k(free_stage(k)));
      hand_over(full_k);
    }
  };
  wait_for_kernel_before();
  for (int number = 0; number < items + C::AHEAD; ++number) {
    if (number < items) begin(number);
    copies_commit();  // a group without copies, too: groups are counted
    if (number < C::AHEAD) continue;
    copies_wait<C::AHEAD>();
    finish(number - C::AHEAD);
  }
}

template <class C>
FA_DEVICE void decode_gathered(DecodeParams const& p) {
  let_next_begin();
  Shared<C> const shared{shared_base()};
  Work const work = find_work(p, block_index());
  if (work.position >= work.s_q) return;
  if (thread_index() == 0) init_barriers<C>(shared);
  block_sync();
  if (warp_uniform(thread_index() / 32) >= 4) consume<C>(p, shared, work);
  else gather<C>(p, shared, work);
}

template <class C>
FA_GLOBAL(C::THREADS)
decode_gathered_kernel(FA_KERNEL_ARGUMENT DecodeParams params) {
  decode_gathered<C>(params);
}

}  // namespace fa::sm90
