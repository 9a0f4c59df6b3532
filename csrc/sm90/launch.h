// The launch functions that the C interface (host.cu) calls and the generated files with one kernel each define.
// Host code; it needs the headers of the CUDA runtime, and no driver at link time.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "backward.h"
#include "decode.h"

namespace fa::sm90 {
template <class T, class Params>
struct PrepareTraits;  // prepare_terms.cuh
}

namespace fa {

static_assert(sizeof(sm90::TensorMap) == sizeof(CUtensorMap), "TensorMap stands for CUtensorMap");

// Fills in the tensor maps and returns null, or an error message. Boxes for loads have the rows of the tile; boxes for
// stores have the 64 rows of a consumer.
using MakeMaps = char const* (*)(ForwardParams const&, int block_m, int block_n, sm90::ForwardArgs&);
using MakeBackwardMaps = char const* (*)(BackwardParams const&, int block_m, int block_n, sm90::BackwardArgs&);
using MakeDecodeMaps = char const* (*)(DecodeParams const&, sm90::DecodeArgs&);

// Null, or what went wrong.
template <class C>
char const* launch_forward(ForwardParams const& p, MakeMaps make_maps, int blocks, cudaStream_t stream);

// Launches backward_dkdv; then for a fused kernel backward_postprocess, which writes dq, and with parts of dk and dv
// backward_sum_heads, which adds them up.
template <class C>
char const* launch_backward_dkdv(BackwardParams const& p, MakeBackwardMaps make_maps, cudaStream_t stream);

// Launches backward_dq.
template <class C>
char const* launch_backward_dq(BackwardParams const& p, MakeBackwardMaps make_maps, cudaStream_t stream);

// Launches backward_preprocess (lse_parts, delta, zeros in dq_sums), which must come first, and backward_dsinks.
template <class T>
char const* launch_backward_preprocess(BackwardParams const& p, cudaStream_t stream);

// Launches prepare_terms, if the problem needs it.
template <class Traits>
char const* launch_prepare(typename Traits::Params const& p, cudaStream_t stream);

// Launches decode: out and lse of each split.
template <class C>
char const* launch_decode(DecodeParams const& p, MakeDecodeMaps make_maps, cudaStream_t stream);

// The same by a kernel whose threads copy the rows.
template <class C>
char const* launch_decode_gathered(DecodeParams const& p, cudaStream_t stream);

// Launches append: new keys and values into the caches.
template <class T>
char const* launch_append(DecodeParams const& p, cudaStream_t stream);

// Launches combine: out and lse from those of several splits.
template <class T>
char const* launch_combine(DecodeParams const& p, cudaStream_t stream);

}  // namespace fa
