// The kernel that runs before decode, or beside its first instructions, and stores new keys and values in the caches.
//
// One warp for each new row and K/V head copies its key and its value, in pieces of 16 bytes. A row beyond the capacity
// of its sequence, or whose page does not exist, is dropped.
#pragma once
#include "decode.h"

namespace fa::sm90 {

constexpr int kAppendThreads = 128;

// New rows of all sequences.
FA_EVERYWHERE int64 new_rows_of(DecodeParams const& p) { return p.new_keys < 0 ? p.seqlen_q : p.batch * p.new_keys; }

// The packed sequence to which a row belongs.
FA_DEVICE int sequence_of_row(DecodeParams const& p, int row) {
  int low = 0, end = static_cast<int>(p.batch);
  while (end - low > 1) {
    int const middle = (low + end) / 2;
    if (load_global(p.cu_seqlens_q + middle) <= row) low = middle;
    else end = middle;
  }
  return low;
}

// All lanes together.
FA_DEVICE void copy_row(void const* from, int64 at, void* to, int64 to_at, int64 columns) {
  Int4 const* const pieces = reinterpret_cast<Int4 const*>(static_cast<uint16 const*>(from) + at);
  Int4* const stored = reinterpret_cast<Int4*>(static_cast<uint16*>(to) + to_at);
  for (int piece = thread_index() % 32; 8 * piece < columns; piece += 32) {
    store_global(stored + piece, load_global(pieces + piece));
  }
}

template <class T>
FA_DEVICE void append(DecodeParams const& p) {
  static_assert(sizeof(T{}) > 0 && sizeof(Int4) == 8 * sizeof(uint16), "elements of 16 bits");
  let_next_begin();
  int64 const index = int64{block_index()} * (kAppendThreads / 32) + warp_uniform(thread_index() / 32);
  int64 const row = index / p.heads_kv, head = index - row * p.heads_kv;
  if (row >= new_rows_of(p)) return;
  bool const is_packed = p.new_keys < 0;
  int64 const sequence = is_packed ? sequence_of_row(p, static_cast<int>(row)) : row / p.new_keys;
  int64 const first = is_packed ? load_global(p.cu_seqlens_q + sequence) : sequence * p.new_keys;
  int64 const position = load_global(p.cache_lengths + sequence) + row - first;
  if (position < 0 || position >= p.capacity) return;
  int64 const entry = position / p.page_size, in_page = position - entry * p.page_size;
  int64 const page = p.block_table ? load_global(p.block_table + sequence * p.table_stride + entry) : sequence;
  if (page < 0 || page >= p.pages) return;
  auto const copy = [&](void const* from, Strides const& new_rows, void* to, Strides const& cache, int64 columns) {
    int64 const of_row = is_packed ? row * new_rows.row : sequence * new_rows.batch + (row - first) * new_rows.row;
    int64 const place = page * cache.batch + in_page * cache.row + head * cache.head;
    copy_row(from, of_row + head * new_rows.head, to, place, columns);
  };
  copy(p.new_k, p.new_k_strides, p.k_cache, p.k_strides, p.head_dim_qk);
  copy(p.new_v, p.new_v_strides, p.v_cache, p.v_strides, p.head_dim_v);
}

template <class T>
FA_GLOBAL(kAppendThreads)
append_kernel(FA_KERNEL_ARGUMENT DecodeParams params) {
  append<T>(params);
}

}  // namespace fa::sm90
