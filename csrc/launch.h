// Between the C interface (host.cu) and the files that hold one kernel each (made by the build): how to launch one.
// Host code; needs the headers of the CUDA runtime and nothing of the driver at link time.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "sm90/shared.h"

namespace fa {

static_assert(sizeof(sm90::TensorMap) == sizeof(CUtensorMap), "TensorMap stands for CUtensorMap");

// Fills in the tensor maps; null, or what went wrong. Boxes of K, V and Q have as many rows as the tile; those of out the 64 rows of a consumer.
using MakeMaps = char const* (*)(ForwardParams const&, int block_m, int block_n, sm90::ForwardArgs&);

// Null, or what went wrong.
template <class C>
char const* launch_forward(ForwardParams const& p, MakeMaps make_maps, int blocks, cudaStream_t stream);

}  // namespace fa
