// The kernel that runs before the large ones where terms may leave keys or whole blocks out: copies of K and V with
// zeros in rows that no query keeps, and for segments the ranges of rows that blocks have to visit. Bound by memory.
//
// The first blocks copy 64 keys of one K/V head each; the others find the ranges of 64 rows.
#pragma once
#include "terms.cuh"

namespace fa::sm90 {

constexpr int kPrepareThreads = 256, kPrepareBytes = 16 * kPrepareThreads;  // of shared memory

template <class T, class Params_>
struct PrepareTraits {
  using Element = T;
  using Params = Params_;
};

FA_EVERYWHERE int64 entries_of(int64 rows) { return (rows + kSegmentRows - 1) / kSegmentRows; }

template <class Params>
FA_EVERYWHERE int64 copied_blocks(Params const& p) {
  return p.terms.given_k ? p.batch * p.heads_kv * entries_of(p.seqlen_kv) : 0;
}

// The number of blocks of the kernel; 0: it is not needed.
template <class Params>
FA_EVERYWHERE int64 prepare_blocks(Params const& p) {
  bool const is_shared = p.numbers.ids_q_batch_stride == 0 && p.numbers.ids_kv_batch_stride == 0;
  int64 const entries = entries_of(p.seqlen_q) + entries_of(p.seqlen_kv);
  return copied_blocks(p) + (p.terms.ranges_q ? entries * (is_shared ? 1 : p.batch) : 0);
}

// Whether mask, segments and bias keep a pair; the band is not asked.
template <class T, class Params>
FA_DEVICE bool terms_keep(Params const& p, Tile const& tile, int head, int i, int j) {
  if (p.terms.segment_ids_q) {
    int64 const a = load_global(p.terms.segment_ids_q + tile.batch * p.numbers.ids_q_batch_stride + i);
    if (a != load_global(p.terms.segment_ids_kv + tile.batch * p.numbers.ids_kv_batch_stride + j)) return false;
  }
  PairStrides const &m = p.numbers.mask_strides, &b = p.numbers.bias_strides;
  if (p.terms.mask && !load_global(p.terms.mask + head_offset(m, tile, head) + i * m.query + j * m.key)) return false;
  if (!p.terms.bias) return true;
  int64 const at = head_offset(b, tile, head) + i * b.query + j * b.key;
  float const bias = p.numbers.bias_is_float
                         ? load_global(static_cast<float const*>(p.terms.bias) + at)
                         : low(T{}, uint32{load_global(static_cast<uint16 const*>(p.terms.bias) + at)});
  return bias != negative_infinity();
}

// Whether this thread finds a query that keeps key j, among every fourth one, of any head that shares it.
template <class T, class Params>
FA_DEVICE bool finds_query(Params const& p, Tile const& tile, int head_kv, int j) {
  if (j >= tile.s_kv) return false;
  Band const band =
      make_band(static_cast<int>(p.left), static_cast<int>(p.right), p.lower_right != 0, tile.s_q, tile.s_kv);
  Range const rows = tile_range(transposed(band), j, j + 1);
  int const group = static_cast<int>(p.heads_q / p.heads_kv);
  for (int i = rows.begin + thread_index() / kSegmentRows; i < rows.end; i += kPrepareThreads / kSegmentRows) {
    for (int head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      if (terms_keep<T>(p, tile, head, i, j)) return true;
    }
  }
  return false;
}

// Copies one row in pieces of 16 bytes, or zeros.
FA_DEVICE void copy_row(void const* to, int64 at, void const* from, int64 from_at, int64 columns, bool is_used) {
  Packed8* const written = reinterpret_cast<Packed8*>(static_cast<uint16*>(const_cast<void*>(to)) + at);
  Packed8 const* const read = reinterpret_cast<Packed8 const*>(static_cast<uint16 const*>(from) + from_at);
  for (int piece = thread_index() % 4; piece < columns / 8; piece += 4) {
    store_global(written + piece, is_used ? load_global(read + piece) : Packed8{{0, 0, 0, 0}});
  }
}

template <class T, class Params>
FA_DEVICE void copy_keys(Params const& p, int index) {
  int const blocks = static_cast<int>(entries_of(p.seqlen_kv)), pair = index / blocks;
  int const heads = static_cast<int>(p.heads_kv), first = index % blocks * kSegmentRows;
  Tile tile{};
  tile.batch = pair / heads;
  tile.s_q = static_cast<int>(p.seqlen_q), tile.s_kv = static_cast<int>(p.seqlen_kv);
  int const head = pair % heads;
  bool const finds = finds_query<T>(p, tile, head, first + thread_index() % kSegmentRows);
  store_shared_float(shared_base() + 16 * thread_index(), finds ? 1.f : 0.f);
  block_sync();
  int const row = thread_index() / 4, j = first + row;  // four threads copy a row
  if (j >= tile.s_kv) return;
  float found = 0.f;
  for (int part = 0; part < kPrepareThreads / kSegmentRows; ++part) {
    found += load_shared_float(shared_base() + 16 * (part * kSegmentRows + row));
  }
  int64 const at = (tile.batch * p.seqlen_kv + j) * p.heads_kv + head;
  Strides const &k = p.numbers.given_k_strides, &v = p.numbers.given_v_strides;
  copy_row(p.k, at * p.head_dim_qk, p.terms.given_k, tile.batch * k.batch + j * k.row + head * k.head, p.head_dim_qk,
           found > 0.f);
  copy_row(p.v, at * p.head_dim_v, p.terms.given_v, tile.batch * v.batch + j * v.row + head * v.head, p.head_dim_v,
           found > 0.f);
}

struct Ids {  // of 64 rows
  int64 least, most;
};

FA_DEVICE Ids ids_at(int64 const* ids, int entry, int rows) {
  Ids found = {load_global(ids + entry * kSegmentRows), load_global(ids + entry * kSegmentRows)};
  for (int i = entry * kSegmentRows; i < smaller((entry + 1) * kSegmentRows, rows); ++i) {
    int64 const id = load_global(ids + i);
    found = {id < found.least ? id : found.least, id > found.most ? id : found.most};
  }
  return found;
}

// The ranges of one entry, by one warp that shares the entries of the other side. Ids may come in any order: entries
// are visited if their ids overlap, and full if both have a single id, the same.
FA_DEVICE void find_ranges(int64 const* rows, int s_rows, int64 const* others, int s_others, int entry, int32* to) {
  Ids const own = ids_at(rows, entry, s_rows);
  int const lane = thread_index() % 32, count = static_cast<int>(entries_of(s_others));
  float begin = static_cast<float>(count), end = 0.f, first_full = begin, end_full = 0.f, full = 0.f;
  for (int n = lane; n < count; n += 32) {
    Ids const other = ids_at(others, n, s_others);
    float const at = static_cast<float>(n);
    if (other.least <= own.most && other.most >= own.least) {
      begin = begin < at ? begin : at, end = maximum(end, at + 1.f);
    }
    if (own.least == own.most && other.least == own.least && other.most == own.least) {
      first_full = first_full < at ? first_full : at, end_full = maximum(end_full, at + 1.f), full += 1.f;
    }
  }
  FA_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    begin = -maximum(-begin, -shuffle_xor(begin, mask)), end = maximum(end, shuffle_xor(end, mask));
    first_full = -maximum(-first_full, -shuffle_xor(first_full, mask));
    end_full = maximum(end_full, shuffle_xor(end_full, mask)), full += shuffle_xor(full, mask);
  }
  if (lane) return;
  bool const has_gaps = end_full - first_full != full;
  int const rows_of = kSegmentRows;
  store_global(reinterpret_cast<Int4*>(to) + entry,
               Int4{static_cast<int>(begin) * rows_of, has_gaps ? 0 : static_cast<int>(first_full) * rows_of,
                    has_gaps ? 0 : static_cast<int>(end_full) * rows_of, static_cast<int>(end) * rows_of});
}

template <class Traits>
FA_DEVICE void prepare_terms(typename Traits::Params const& p) {
  int const copies = static_cast<int>(copied_blocks(p));
  if (block_index() < copies) return copy_keys<typename Traits::Element>(p, block_index());
  if (thread_index() >= 32) return;
  int const s_q = static_cast<int>(p.seqlen_q), s_kv = static_cast<int>(p.seqlen_kv);
  int const of_q = static_cast<int>(entries_of(s_q)), of_kv = static_cast<int>(entries_of(s_kv));
  int const index = block_index() - copies, batch = index / (of_q + of_kv), entry = index % (of_q + of_kv);
  int64 const* const q = p.terms.segment_ids_q + batch * p.numbers.ids_q_batch_stride;
  int64 const* const kv = p.terms.segment_ids_kv + batch * p.numbers.ids_kv_batch_stride;
  if (entry < of_q) find_ranges(q, s_q, kv, s_kv, entry, p.terms.ranges_q + int64{batch} * of_q * 4);
  else find_ranges(kv, s_kv, q, s_q, entry - of_q, p.terms.ranges_kv + int64{batch} * of_kv * 4);
}

template <class Traits>
FA_GLOBAL(kPrepareThreads)
prepare_terms_kernel(FA_KERNEL_ARGUMENT typename Traits::Params p) {
  prepare_terms<Traits>(p);
}

}  // namespace fa::sm90
