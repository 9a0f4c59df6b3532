// The binary interface of attention on a CPU: one flat struct for caches and one for the rest, the same bytes for Python
// and C++.
//
// Every field is 8 bytes wide and the version comes first, so that `struct.pack` writes it and no compiler can pad it.
// Strides are in elements, and the head dim is contiguous everywhere.
#pragma once

namespace fa::cpu {

using int64 = long long;
using int32 = int;

constexpr int64 kVersion = 2, kAttentionVersion = 6;

// What a call may come to. With anything but kDone nothing was written.
enum Outcome : int64 { kDone = 0, kWrongValues = 1, kNoMachine = 2, kNoMemory = 3 };

// kFloat8: e4m3, of caches alone; kFloat64: of everything else.
enum Dtype : int64 { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat8 = 3, kFloat64 = 4 };

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
  void* out;  // contiguous (B, S_q, H_q, D_v), packed (T_q, H_q, D_v)
  float* lse;  // contiguous (B, H_q, S_q), packed (H_q, T_q)
  const int32* cache_lengths;  // (B)
  const int32* block_table;  // (B, max_pages); null: sequence b owns page b
  const int32* cu_seqlens_q;  // (B + 1), null if q is dense
  const float* k_scale;  // (1|P, H_kv), null without
  const float* v_scale;
  const float* bias;  // (1|B, 1|H_q, 1|S_q, 1|S_bias), null without; strides of 0 broadcast
  const float* slopes;  // ALiBi's, (1|B, H_q), null without
  const float* sinks;  // (1|B, H_q), null without
  const void* new_keys;  // (B, S_new, H_kv, D_qk), packed (T_q, H_kv, D_qk), in the dtype of the caches, to be
  const void* new_values;  // stored first; null if there are none, or if they are stored already
  const int32* tree;  // words of the tree mask, (1|B, S_q, W), packed (T_q, W); null if new tokens follow each other
  const int32* depths;  // of the tokens in their tree, (B, S_q), packed (T_q); null where no term counts positions
  // What calls with the same kind of tensors share.
  Strides q_strides, k_strides, v_strides, new_keys_strides, new_values_strides;
  int64 table_stride;
  int64 k_scale_stride, v_scale_stride;  // from page to page, 0 if all share them
  int64 bias_batch, bias_head, bias_row, bias_key;
  int64 slopes_stride, sinks_stride;  // from sequence to sequence
  int64 tree_batch, tree_row, depths_batch;
  int64 invariant;  // 1: keys are cut at fixed positions, so that the bits of a sequence do not depend on the others
  int64 dtype, cache_dtype;  // of q and out; of the caches
  int64 batch, heads_q, heads_kv, head_dim_qk, head_dim_v;
  int64 rows_q;  // S_q, or T_q
  int64 rows_new;  // positions added to each sequence; -1: as many as it has query rows
  int64 longest_q;  // no sequence has more query rows
  int64 pages, page_size;
  int64 capacity;  // the most positions a sequence may have
  int64 left, right;  // the band, kUnbounded (mask.h) where it has no limit; the anchor is lower right
  double scale;
  double softcap;  // 0: none
};

// Forward and backward. Words are float, and double where dtype is kFloat64.
struct AttentionParams {
  int64 version;  // kAttentionVersion
  int64 threads;
  int64 machine;
  // What changes from call to call. Null where there is none, or where a gradient is not wanted.
  const void* q;
  const void* k;
  const void* v;
  void* out;  // contiguous (B, S_q, H_q, D_v), packed (T_q, H_q, D_v); forward writes it, backward reads it
  void* lse;  // words, contiguous (B, H_q, S_q), packed (H_q, T_q)
  void* lse_low;  // what rounding took from lse: exp((score - lse) - lse_low) is the weight
  const void* dout;
  const void* dlse;  // words, shaped like lse
  void* dq;  // contiguous, shaped like q, k and v; null or all of the pass they are of: dq, or dk and dv
  void* dk;
  void* dv;
  void* dbias;  // contiguous, shaped like the bias, zeros at first; words where pairs share a number
  void* dsinks;  // words, (B, H_q): of each sequence
  const void* bias;  // (1|B, 1|H_q, 1|S_q, 1|S_kv), of bias_dtype
  const unsigned char* mask;  // the same, bytes
  const void* slopes;  // ALiBi's, words, (1|B, H_q)
  const void* sinks;  // words, (1|B, H_q)
  const int32* segments_q;  // (1|B, S_q), contiguous rows
  const int32* segments_kv;
  const int32* intervals;  // (1|B, 1|H_q, S_q, n, 2), packed (1, 1|H_q, T_q, n, 2), contiguous rows
  const int32* cu_seqlens_q;  // (B + 1) where packed
  const int32* cu_seqlens_kv;
  const int64* rng_state;  // seed and offset
  // What calls with the same kind of tensors share. A stride of 0 broadcasts.
  Strides q_strides, k_strides, v_strides, dout_strides;
  int64 bias_batch, bias_head, bias_row, bias_key;
  int64 dbias_batch, dbias_head, dbias_row, dbias_key;
  int64 mask_batch, mask_head, mask_row, mask_key;
  int64 slopes_stride, sinks_stride, segments_q_stride, segments_kv_stride;  // from sequence to sequence
  int64 intervals_batch, intervals_head, intervals_row, intervals_count;  // the last one is n
  int64 dtype, bias_dtype, dbias_dtype;
  int64 dbias_adds;  // 0: each number of dbias is of one pair, and zero at first
  int64 batch, heads_q, heads_kv, head_dim_qk, head_dim_v;
  int64 rows_q, rows_kv;  // S_q and S_kv, or T_q and T_kv
  int64 left, right, lower_right;
  int64 dropout_threshold;  // a weight is dropped where its 16 random bits are below; 0: no dropout
  double scale;
  double softcap;  // 0: none
  double dropout_scale;
};

// Statistics of the weights or the weights themselves, beside the AttentionParams of the problem, whose values are not read.
// Numbers of rows are shaped like lse, those of keys (B, H_q, S_kv), packed (H_q, T_kv), and all are words. Of a pass, what
// belongs to another is null.
struct StatisticsParams {
  int64 rows_per_part;  // query rows that are added up into one share of key_sum and key_max, whole tiles of them
  int64 parts;  // shares: no sequence has more rows
  int64 share;  // words from share to share
  // Results; those of keys hold zeros at first. With dlse the pass computes what their gradient needs instead: lse, its
  // gradient, and largest_key.
  void* entropy;
  void* largest_logit;
  int64* largest_key;
  void* key_sum;
  void* key_max;
  void* dlse;
  // Gradients of the results, and of the weights: that of key_sum has a row stride of 0, that of averages, over their
  // number, a head stride of 0. Behind it lie 64 words more, which are read.
  const void* dentropy;
  const void* dlargest_logit;
  const void* dweights;
  int64 dweights_batch, dweights_head, dweights_row;
  // Not of packed sequences: (B, H_q, S_q, S_kv), or (B, S_q, S_kv) where they are averaged over the heads.
  void* weights;
  int64 weights_dtype, averages;
};

}  // namespace fa::cpu
