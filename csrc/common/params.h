// The binary interface: one flat struct for each pass, the same bytes for Python, host code and kernels.
//
// Every field is 8 bytes wide and the version comes first, so that `struct.pack` writes it and no compiler can
// pad it. It is passed to the kernel unchanged; csrc/README.md maps the fields of AttentionSpec to it. This file
// holds the structs and the meaning of their fields only.
#pragma once

namespace fa {

using int64 = long long;
using uint64 = unsigned long long;
using int32 = int;
using uint32 = unsigned int;
using uint16 = unsigned short;
using uint8 = unsigned char;

constexpr int64 kForwardVersion = 4, kBackwardVersion = 4;

// Positions are 32-bit. A side of the band that is unbounded, or wider, is kUnbounded: more than any length.
constexpr int32 kUnbounded = 1 << 29;

enum Dtype : int64 { kBfloat16 = 0, kFloat16 = 1 };

struct Strides {  // in elements; the head dim is contiguous. A packed tensor has no batch: its stride is unused
  int64 batch, row, head;
};

// Of a tensor with a number for each pair, in elements; 0 where it is shared. Those of queries and keys have 32 bits.
struct PairStrides {
  int64 batch, head, query, key;
};

// What changes scores or weights pair by pair, besides the band and softcap; null where there is none.
struct TermTensors {
  const float* alibi_slopes;  // (1|B, H_q); packed: of each sequence
  const int64* segment_ids_q;  // (1|B, S_q)
  const int64* segment_ids_kv;
  const uint8* mask;  // not 0: attend
  const void* bias;  // fp32, or the dtype of q
  const int64* rng_state;  // the seed and the offset of dropout
  // Written before the large kernels (prepare_terms.cuh). For each 64 queries, and each 64 keys, the rows of the other
  // side that may share a segment with them, and those that all do: [first, full_first, full_end, end).
  int32* ranges_q;
  int32* ranges_kv;
  // Where a term may leave a key to no query: k and v as given. Those of the struct are contiguous copies, written
  // before the large kernels, with zeros in rows that no query keeps, since they may hold NaN, and 0 times NaN is NaN.
  const void* given_k;
  const void* given_v;
};

struct TermNumbers {
  int64 has_terms;  // 1 selects a kernel with terms
  int64 slopes_batch_stride, ids_q_batch_stride, ids_kv_batch_stride;  // 0 if all sequences share them
  PairStrides mask_strides, bias_strides;
  int64 bias_is_float;
  Strides given_k_strides, given_v_strides;
  int64 dropout_threshold;  // a weight is dropped where its 16 random bits are below; 0: no dropout
  double dropout_scale;  // of the weights that are left
};

struct ForwardParams {
  int64 version;  // kForwardVersion
  // Tensors. out and lse are contiguous: (B, S_q, H_q, D_v) and (B, H_q, S_q); packed (T_q, H_q, D_v) and (H_q, T_q).
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;  // rounded to the nearest float
  float* lse_low;  // the rounding error of lse
  const float* sinks;  // (1|B, H_q) logits, natural; null if there are none
  const int32* cu_seqlens_q;  // (B + 1) boundaries if packed, else null
  const int32* cu_seqlens_kv;
  int32* counter;  // 0, and 0 again after the kernel: of tiles that blocks draw; null if each block has its own
  TermTensors terms;
  Strides q_strides, k_strides, v_strides;
  int64 sinks_batch_stride;  // H_q, or 0 if all sequences share them
  int64 dtype;  // Dtype of q, k, v and out
  int64 batch;  // B, or the number of packed sequences
  int64 heads_q, heads_kv;
  int64 head_dim_qk, head_dim_v;
  int64 seqlen_q, seqlen_kv;  // rows of each sequence; packed: rows of all of them, T_q and T_kv
  // Dense: the keys [key_begin, key_end) that some query keeps; rows outside may hold NaN, so the tensor maps exclude
  // them. Packed: [0, T_kv), and the kernel clears rows that a sequence does not keep.
  int64 key_begin, key_end;
  int64 left, right;  // the band; kUnbounded for a side without limit
  int64 lower_right;  // 1: the diagonal ends in the lower right corner; 0: it begins in the upper left
  int64 has_band;  // 0 selects a kernel without masks inside its loop
  int64 has_softcap;
  TermNumbers numbers;
  double score_scale;  // scores are score_scale * q k^T, or with softcap score_scale * tanh(...): scale, or softcap
  double cap_scale;  // with softcap: x = tanh(cap_scale * q k^T), cap_scale = scale / softcap
  int64 heads_per_pass;  // query heads worked on together, so that their keys and values stay in L2
  int64 device;  // CUDA device index
  int64 blocks;  // persistent blocks, 0 for one on each multiprocessor
  void* stream;  // cudaStream_t
};

// Rows of the backward pass's own tensors are padded: a dense sequence to a multiple of this, and in a packed batch
// sequence n begins at the multiple below cu_seqlens[n] + n * kPaddedRows. So a tile never holds two sequences.
constexpr int32 kPaddedRows = 128;

struct BackwardParams {
  int64 version;  // kBackwardVersion
  // Inputs and results of the forward pass. out, lse and dlse are contiguous, shaped as there.
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const void* dout;
  const float* lse;
  const float* lse_low;
  const float* dlse;  // null if lse has no gradient
  const float* sinks;  // null if there are none, or their gradient is not wanted
  const int32* cu_seqlens_q;
  const int32* cu_seqlens_kv;
  // Gradients, contiguous. Null if not wanted; dk and dv come together. dsinks is (B, H_q): of each sequence.
  void* dq;
  void* dk;
  void* dv;
  float* dsinks;
  // Workspace, (B, H_q, padded_q) or packed (H_q, padded_q):
  // - lse_parts: pairs of lse and lse_low in base 2; with softcap and no terms pairs of their sum in base 2 and 0. lse is +inf for a
  //   row that keeps nothing or does not exist, so that its weights are 0;
  // - delta: rowsum(dout * out) - dlse;
  // - dq_sums: for the fused kernel, fp32 sums of dq with sum_columns columns for each padded row; else null.
  // - dk_parts, dv_parts: where every query head has a block of its own, fp32 sums of dk and dv with the columns of the
  //   kernel for each padded row of keys, (B, H_q, padded_kv) or packed (H_q, padded_kv); null where a block sums over
  //   the heads that share its keys.
  float* lse_parts;
  float* delta;
  float* dq_sums;
  float* dk_parts;
  float* dv_parts;
  float* dbias;  // (B, H_q, S_q, S_kv), zeros: of every pair, before it is summed where the bias is shared; or null
  TermTensors terms;
  Strides q_strides, k_strides, v_strides, dout_strides;
  int64 sinks_batch_stride;
  int64 dtype;
  int64 batch;
  int64 heads_q, heads_kv;
  int64 head_dim_qk, head_dim_v;
  int64 seqlen_q, seqlen_kv;
  int64 padded_q, padded_kv;  // rows with padding, of each sequence; packed: of all of them
  int64 sum_columns;  // head dim of the kernel that fills dq_sums; 0 without
  int64 key_begin, key_end;
  int64 left, right;
  int64 lower_right;
  int64 has_softcap;
  TermNumbers numbers;
  double scale;  // of q k^T
  double score_scale;
  double cap_scale;
  int64 heads_per_pass;  // query heads worked on together by kernels that stream keys: their K and V stay in L2
  int64 kv_heads_per_pass;  // K/V heads worked on together by kernels that stream queries: their Q and dout stay in L2
  int64 device;
  void* stream;
};

constexpr int64 kDecodeVersion = 5;

// Attention to a cache. Position j of a sequence lies in row j % page_size of page block_table[j / page_size].
struct DecodeParams {
  int64 version;  // kDecodeVersion
  const void* q;
  void* k_cache;  // (pages, page_size, H_kv, D); new rows are stored in it
  void* v_cache;
  void* out;  // out and lse as in ForwardParams
  float* lse;
  float* partial_out;  // (splits, rows of q, H_q, D_v): out of each split; null with one split, which writes out itself
  float* partial_lse;  // (splits, rows of q, H_q, 2): both parts of lse of each split; null likewise
  const float* sinks;
  const int32* cache_lengths;  // (B): positions of each sequence without the new ones; null: capacity, and none are new
  const int32* block_table;  // null: sequence b owns page b only
  const int32* cu_seqlens_q;  // if q is packed, else null
  const void* new_k;  // (B, new_keys, H_kv, D) or packed like q: to be stored first; null if they are there already
  const void* new_v;
  const float* k_scale;  // (1|pages, H_kv): factors of an e4m3 cache; null: 1
  const float* v_scale;
  const int32*
      tree;  // (1|B, S_q, tree_words) or packed (T_q, tree_words): bits of the new keys that a query sees, or null
  const int32* depths;  // (B, S_q) or packed (T_q,): of the new keys in their tree; null where nothing counts them
  const float* alibi_slopes;  // (1|B, H_q); null if there are none, and likewise
  const void* bias;  // (1|B, 1|H_q, 1|S_q, 1|S_bias), fp32 or the dtype of q; capacity is at most S_bias
  Strides q_strides;
  Strides k_strides, v_strides;  // with the stride of a page in place of the batch stride
  Strides new_k_strides, new_v_strides;
  int64 sinks_batch_stride, table_stride;
  int64 k_scale_stride, v_scale_stride;  // H_kv, or 0 if all pages share them
  int64 tree_words;  // of a row
  int64 shares_tree;  // 1 if all sequences have the same
  int64 slopes_batch_stride;  // H_q, or 0 if all sequences share them
  PairStrides bias_strides;
  int64 bias_is_float;
  int64 dtype;
  int64 is_e4m3;  // the caches; else they have the dtype of q
  int64 is_gathered;  // selects the kernels that copy rows one by one: for e4m3, terms, or boxes of fewer than 8 rows
  int64 batch;
  int64 heads_q, heads_kv;
  int64 head_dim_qk, head_dim_v;
  int64 seqlen_q;  // rows of each sequence; packed: of all of them
  int64 new_keys;  // positions of each sequence past cache_lengths; negative: as many as it has queries
  int64 pages, page_size;
  int64 capacity;  // positions that a sequence may have
  int64 box_rows;  // rows of a box: box_rows rows from any multiple of it lie in one page; 8 to 64, unless is_gathered
  int64 left, right;  // the anchor is the lower right
  int64 has_softcap;
  double score_scale, cap_scale;
  // A tile has 64 rows: query heads of one K/V head, times positions. Rows beyond these are not used.
  int64 heads_per_tile, positions_per_tile;
  int64 tiles;  // of each K/V head, in the whole batch; packed: at least as many as there are
  int64 splits;  // parts into which the keys of a tile are divided, at most kMostSplits
  int64 device;
  void* stream;
};

constexpr int kMostSplits = 128;

}  // namespace fa
