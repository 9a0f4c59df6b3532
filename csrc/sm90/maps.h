// The part of a tensor that each tensor map of a kernel covers. Host code; the including file defines encode():
// host.cu through the driver, emulator/library.cpp for the emulated machine.
#pragma once
#include "backward.h"
#include "decode.h"

namespace fa {

struct View {  // (batch, row, head, column), strides in elements
  void const* data;
  int64 columns, rows, heads, batch;
  Strides strides;
};

// Fills in a map whose boxes have 64 columns and `box_rows` rows; false if the driver refuses it.
bool encode(sm90::TensorMap& map, View const& x, int64 dtype, int box_rows);

// The rows of K and V that some query keeps; TMA loads zeros for rows outside the map.
template <class Params>
inline View kept_rows(void const* data, int64 columns, Params const& p, Strides const& strides, int64 batch) {
  char const* const first = static_cast<char const*>(data) + p.key_begin * strides.row * 2;
  return {first, columns, p.key_end - p.key_begin, p.heads_kv, batch, strides};
}

// A result: contiguous, (batch, row, head, column).
inline View contiguous(void const* data, int64 columns, int64 rows, int64 heads, int64 batch) {
  return {data, columns, rows, heads, batch, {rows * heads * columns, heads * columns, columns}};
}

// The maps of q, k and v, which both passes read.
template <class Params, class Args>
inline char const* make_input_maps(Params const& p, int block_m, int block_n, Args& args) {
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch;
  if (!encode(args.q, {p.q, p.head_dim_qk, p.seqlen_q, p.heads_q, batch, p.q_strides}, p.dtype, block_m)) {
    return "the tensor map of q was refused: check its address and strides";
  }
  args.k = args.v = args.q;  // placeholders: if no key is kept, nothing is loaded
  if (p.key_begin == p.key_end) return nullptr;
  if (!encode(args.k, kept_rows(p.k, p.head_dim_qk, p, p.k_strides, batch), p.dtype, block_n)) {
    return "the tensor map of k was refused: check its address and strides";
  }
  if (!encode(args.v, kept_rows(p.v, p.head_dim_v, p, p.v_strides, batch), p.dtype, block_n)) {
    return "the tensor map of v was refused: check its address and strides";
  }
  return nullptr;
}

inline char const* make_maps(ForwardParams const& p, int block_m, int block_n, sm90::ForwardArgs& args) {
  if (char const* wrong = make_input_maps(p, block_m, block_n, args)) return wrong;
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch;
  return encode(args.out, contiguous(p.out, p.head_dim_v, p.seqlen_q, p.heads_q, batch), p.dtype, 64)
             ? nullptr
             : "the tensor map of out was refused: check its address";
}

inline char const* make_backward_maps(BackwardParams const& p, int block_m, int block_n, sm90::BackwardArgs& args) {
  if (char const* wrong = make_input_maps(p, block_m, block_n, args)) return wrong;
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch;
  if (!encode(args.dout, {p.dout, p.head_dim_v, p.seqlen_q, p.heads_q, batch, p.dout_strides}, p.dtype, block_m)) {
    return "the tensor map of dout was refused: check its address and strides";
  }
  args.dq = args.dk = args.dv = args.q;  // placeholders for gradients that are not written
  if (p.dq && !encode(args.dq, contiguous(p.dq, p.head_dim_qk, p.seqlen_q, p.heads_q, batch), p.dtype, 64)) {
    return "the tensor map of dq was refused: check its address";
  }
  if (p.dk && !encode(args.dk, contiguous(p.dk, p.head_dim_qk, p.seqlen_kv, p.heads_kv, batch), p.dtype, 64)) {
    return "the tensor map of dk was refused: check its address";
  }
  if (p.dv && !encode(args.dv, contiguous(p.dv, p.head_dim_v, p.seqlen_kv, p.heads_kv, batch), p.dtype, 64)) {
    return "the tensor map of dv was refused: check its address";
  }
  return nullptr;
}

// The maps of the caches, with pages in place of the batch, so that a box lies in one page.
inline char const* make_decode_maps(DecodeParams const& p, sm90::DecodeArgs& args) {
  int const rows = static_cast<int>(p.box_rows);
  if (!encode(args.k, {p.k_cache, p.head_dim_qk, p.page_size, p.heads_kv, p.pages, p.k_strides}, p.dtype, rows)) {
    return "the tensor map of k_cache was refused: check its address and strides";
  }
  if (!encode(args.v, {p.v_cache, p.head_dim_v, p.page_size, p.heads_kv, p.pages, p.v_strides}, p.dtype, rows)) {
    return "the tensor map of v_cache was refused: check its address and strides";
  }
  return nullptr;
}

}  // namespace fa
