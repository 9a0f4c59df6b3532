// The binary interface of attention to a cache on a CPU: one flat struct, the same bytes for Python and C++.
//
// Every field is 8 bytes wide and the version comes first, so that `struct.pack` writes it and no compiler can pad it.
// Strides are in elements, and the head dim is contiguous everywhere.
#pragma once

namespace fa::cpu {

using int64 = long long;
using int32 = int;

constexpr int64 kVersion = 1;

// What a call may come to. With anything but kDone nothing was written.
enum Outcome : int64 { kDone = 0, kWrongValues = 1, kNoMachine = 2, kNoMemory = 3 };

enum Dtype : int64 { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat8 = 3 };  // kFloat8: e4m3, of caches alone

struct Strides {
  int64 batch, row, head;  // of a cache: page, row, head. A packed tensor has no batch: its stride is unused
};

struct Params {
  int64 version;  // kVersion
  int64 threads;
  int64 machine;  // index into the compiled instruction sets, the best first; -1: the best that runs here
  // What changes from call to call stands above, and here.
  const void* q;
  const void* k_cache;
  const void* v_cache;
  void* out;                   // contiguous (B, S_q, H_q, D_v), packed (T_q, H_q, D_v)
  float* lse;                  // contiguous (B, H_q, S_q), packed (H_q, T_q)
  const int32* cache_lengths;  // (B)
  const int32* block_table;    // (B, max_pages); null: sequence b owns page b
  const int32* cu_seqlens_q;   // (B + 1), null if q is dense
  const float* k_scale;        // (1|P, H_kv), null without
  const float* v_scale;
  const float* bias;           // (1|B, 1|H_q, 1|S_q, 1|S_bias), null without; strides of 0 broadcast
  const float* slopes;         // ALiBi's, (1|B, H_q), null without
  const float* sinks;          // (1|B, H_q), null without
  const void* new_keys;        // (B, S_new, H_kv, D_qk), packed (T_q, H_kv, D_qk), in the dtype of the caches, to be
  const void* new_values;      // stored first; null if there are none, or if they are stored already
  // What calls with the same kind of tensors share.
  Strides q_strides, k_strides, v_strides, new_keys_strides, new_values_strides;
  int64 table_stride;
  int64 k_scale_stride, v_scale_stride;  // from page to page, 0 if all share them
  int64 bias_batch, bias_head, bias_row, bias_key;
  int64 slopes_stride, sinks_stride;     // from sequence to sequence
  int64 dtype, cache_dtype;    // of q and out; of the caches
  int64 batch, heads_q, heads_kv, head_dim_qk, head_dim_v;
  int64 rows_q;                // S_q, or T_q
  int64 rows_new;              // positions added to each sequence; -1: as many as it has query rows
  int64 longest_q;             // no sequence has more query rows
  int64 pages, page_size;
  int64 capacity;              // the most positions a sequence may have
  int64 left, right;           // the band, kUnbounded (mask.h) where it has no limit; the anchor is lower right
  double scale;
  double softcap;              // 0: none
};

}  // namespace fa::cpu
