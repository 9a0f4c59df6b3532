// The definition of launch_forward, for the files that hold one kernel each.
#pragma once
#include "launch.h"
#include "sm90/forward.cuh"

namespace fa {

template <class C>
char const* launch_forward(ForwardParams const& p, MakeMaps make_maps, int blocks, cudaStream_t stream) {
  sm90::ForwardArgs args;
  args.p = p;
  if (char const* wrong = make_maps(p, C::BLOCK_M, C::BLOCK_N, args)) return wrong;
  cudaError_t error = cudaFuncSetAttribute(sm90::forward_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           C::SHARED_BYTES);
  if (error == cudaSuccess) {
    sm90::forward_kernel<C><<<blocks, C::THREADS, C::SHARED_BYTES, stream>>>(args);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fa
