// The definitions of launch.h, for the files that hold one kernel each.
#pragma once
#include "launch.h"
#include "append.cuh"
#include "combine.cuh"
#include "decode.cuh"
#include "decode_gathered.cuh"
#include "forward.cuh"
#include "backward_dkdv.cuh"
#include "backward_dq.cuh"
#include "backward_postprocess.cuh"
#include "backward_preprocess.cuh"
#include "backward_sum_heads.cuh"
#include "prepare_terms.cuh"

namespace fa {

// Null, or what went wrong. A kernel that `follows` may begin before the one before it in the stream has ended.
template <class Args>
char const* launch(void (*kernel)(Args), Args const& args, int64 blocks, int threads, int shared_bytes,
                   cudaStream_t stream, bool follows = false) {
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = follows;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class C>
char const* launch_forward(ForwardParams const& p, MakeMaps make_maps, int blocks, cudaStream_t stream) {
  sm90::ForwardArgs args;
  args.p = p;
  if (char const* wrong = make_maps(p, C::BLOCK_M, C::BLOCK_N, args)) return wrong;
  return launch(sm90::forward_kernel<C>, args, blocks, C::THREADS, C::SHARED_BYTES, stream);
}

template <class C>
char const* launch_backward_dkdv(BackwardParams const& p, MakeBackwardMaps make_maps, cudaStream_t stream) {
  sm90::BackwardArgs args;
  args.p = p;
  if (char const* wrong = make_maps(p, C::BLOCK_M, C::BLOCK_N, args)) return wrong;
  int64 const blocks = sm90::tile_count<C::BLOCK_N, sm90::Of::kKeys>(p);
  char const* wrong = launch(sm90::backward_dkdv_kernel<C>, args, blocks, C::THREADS, C::SHARED_BYTES, stream);
  if constexpr (C::FUSED) {
    int64 const row_blocks = sm90::tile_count<kPaddedRows, sm90::Of::kQueries>(p);
    if (!wrong) wrong = launch(sm90::backward_postprocess_kernel<C>, p, row_blocks, sm90::kRowThreads, 0, stream);
  }
  if (!wrong && p.dk_parts) {
    int64 const key_blocks = sm90::tile_count<kPaddedRows, sm90::Of::kSharedKeys>(p);
    wrong = launch(sm90::backward_sum_heads_kernel<C>, p, key_blocks, sm90::kRowThreads, 0, stream);
  }
  return wrong;
}

template <class C>
char const* launch_backward_dq(BackwardParams const& p, MakeBackwardMaps make_maps, cudaStream_t stream) {
  sm90::BackwardArgs args;
  args.p = p;
  if (char const* wrong = make_maps(p, C::BLOCK_M, C::BLOCK_N, args)) return wrong;
  int64 const blocks = sm90::tile_count<C::BLOCK_M, sm90::Of::kQueries>(p);
  return launch(sm90::backward_dq_kernel<C>, args, blocks, C::THREADS, C::SHARED_BYTES, stream);
}

template <class T>
char const* launch_backward_preprocess(BackwardParams const& p, cudaStream_t stream) {
  int64 const blocks = sm90::tile_count<kPaddedRows, sm90::Of::kQueries>(p);
  char const* wrong = launch(sm90::backward_preprocess_kernel<T>, p, blocks, sm90::kRowThreads, 0, stream);
  if (!wrong && p.dsinks) {
    int const bytes = sm90::kRowWarps * 16;
    wrong = launch(sm90::backward_dsinks_kernel<T>, p, p.batch * p.heads_q, sm90::kRowThreads, bytes, stream);
  }
  return wrong;
}

template <class Traits>
char const* launch_prepare(typename Traits::Params const& p, cudaStream_t stream) {
  int64 const blocks = sm90::prepare_blocks(p);
  return blocks
             ? launch(sm90::prepare_terms_kernel<Traits>, p, blocks, sm90::kPrepareThreads, sm90::kPrepareBytes, stream)
             : nullptr;
}

template <class C>
char const* launch_decode(DecodeParams const& p, MakeDecodeMaps make_maps, cudaStream_t stream) {
  sm90::DecodeArgs args;
  args.p = p;
  if (char const* wrong = make_maps(p, args)) return wrong;
  int64 const blocks = p.tiles * p.splits * p.heads_kv;
  return launch(sm90::decode_kernel<C>, args, blocks, C::THREADS, C::SHARED_BYTES, stream, p.new_k != nullptr);
}

template <class C>
char const* launch_decode_gathered(DecodeParams const& p, cudaStream_t stream) {
  int64 const blocks = p.tiles * p.splits * p.heads_kv;
  bool const follows = p.new_k != nullptr;
  return launch(sm90::decode_gathered_kernel<C>, p, blocks, C::THREADS, C::SHARED_BYTES, stream, follows);
}

template <class T>
char const* launch_append(DecodeParams const& p, cudaStream_t stream) {
  constexpr int kRows = sm90::kAppendThreads / 32;  // of a block
  int64 const blocks = (sm90::new_rows_of(p) * p.heads_kv + kRows - 1) / kRows;
  return launch(sm90::append_kernel<T>, p, blocks, sm90::kAppendThreads, 0, stream);
}

template <class T>
char const* launch_combine(DecodeParams const& p, cudaStream_t stream) {
  constexpr int kOutputs = sm90::kCombineThreads / 32;  // of a block
  int64 const blocks = (sm90::rows_of(p) * p.heads_q + kOutputs - 1) / kOutputs;
  return launch(sm90::combine_kernel<T>, p, blocks, sm90::kCombineThreads, 0, stream, true);
}

}  // namespace fa
