// Between the C interface (host.cu) and the files that hold one kernel each (made by the build): how to launch one.
// Host code; needs the headers of the CUDA runtime and nothing of the driver at link time.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "backward.h"
#include "decode.h"

namespace fa {

static_assert(sizeof(sm90::TensorMap) == sizeof(CUtensorMap), "TensorMap stands for CUtensorMap");

// Fills in the tensor maps; null, or what went wrong. Boxes of what is read have as many rows as the tile; those of
// what is written have the 64 rows of a consumer.
using MakeMaps = char const* (*)(ForwardParams const&, int block_m, int block_n, sm90::ForwardArgs&);
using MakeBackwardMaps = char const* (*)(BackwardParams const&, int block_m, int block_n, sm90::BackwardArgs&);
using MakeDecodeMaps = char const* (*)(DecodeParams const&, sm90::DecodeArgs&);

// Null, or what went wrong.
template <class C>
char const* launch_forward(ForwardParams const& p, MakeMaps make_maps, int blocks, cudaStream_t stream);

// dk and dv, and if the kernel is fused dq out of its sums.
template <class C>
char const* launch_backward_dkdv(BackwardParams const& p, MakeBackwardMaps make_maps, cudaStream_t stream);

// dq.
template <class C>
char const* launch_backward_dq(BackwardParams const& p, MakeBackwardMaps make_maps, cudaStream_t stream);

// lse_parts, delta and zeros in dq_sums, which the others need; and dsinks.
template <class T>
char const* launch_backward_preprocess(BackwardParams const& p, cudaStream_t stream);

// out and lse of each split.
template <class C>
char const* launch_decode(DecodeParams const& p, MakeDecodeMaps make_maps, cudaStream_t stream);

// out and lse out of those of several splits.
template <class T>
char const* launch_combine(DecodeParams const& p, cudaStream_t stream);

}  // namespace fa
