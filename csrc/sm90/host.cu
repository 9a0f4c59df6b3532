// The C interface of the shared library: one function for each pass, taking a flat struct (params.h).
//
// It chooses the kernel, builds the tensor maps and launches; it allocates nothing and waits for nothing. It looks up
// the one driver function that it needs at run time, so the library loads without a driver, and then reports that there
// is none. Errors are returned as text.
#include <cstdio>

#include "launch.h"
#include "maps.h"
#include "sm90/backward_traits.h"

namespace fa {

// ---- tensor maps -----------------------------------------------------------------------------------------------------
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*, cuuint64_t const*,
                            cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static Encode encoder() {
  static Encode const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t const error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// A dimension of size 1 is never stepped over, so any valid stride will do for it.
static cuuint64_t stride_bytes(int64 size, int64 stride) {
  return size == 1 ? 16 : static_cast<cuuint64_t>(stride) * 2;
}

bool encode(sm90::TensorMap& map, View const& x, int64 dtype, int box_rows) {
  cuuint64_t const sizes[4] = {static_cast<cuuint64_t>(x.columns), static_cast<cuuint64_t>(x.rows),
                               static_cast<cuuint64_t>(x.heads), static_cast<cuuint64_t>(x.batch)};
  cuuint64_t const strides[3] = {stride_bytes(x.rows, x.strides.row), stride_bytes(x.heads, x.strides.head),
                                 stride_bytes(x.batch, x.strides.batch)};
  cuuint32_t const box[4] = {sm90::kChunkColumns, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encoder()(reinterpret_cast<CUtensorMap*>(&map),
                   dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                   const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---- the choice of a kernel ------------------------------------------------------------------------------------------
#define FA_TRAITS(T, QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG, TERMS) \
  sm90::ForwardTraits<sm90::T, QK, V, M, N, STAGES, PINGPONG != 0, BAND != 0, SOFTCAP != 0, TERMS != 0>

#define FORWARD(...) \
  extern template char const* launch_forward<FA_TRAITS(Bf16, __VA_ARGS__)>(ForwardParams const&, MakeMaps, int, \
                                                                           cudaStream_t); \
  extern template char const* launch_forward<FA_TRAITS(F16, __VA_ARGS__)>(ForwardParams const&, MakeMaps, int, \
                                                                          cudaStream_t);
#include "instances.inc"

#define FA_EXTERN_PREPARE(T, PARAMS) \
  extern template char const* launch_prepare<sm90::PrepareTraits<sm90::T, PARAMS>>(PARAMS const&, cudaStream_t);
FA_EXTERN_PREPARE(Bf16, ForwardParams)
FA_EXTERN_PREPARE(F16, ForwardParams)
FA_EXTERN_PREPARE(Bf16, BackwardParams)
FA_EXTERN_PREPARE(F16, BackwardParams)

// What the large kernels of a pass with terms read besides the inputs.
template <class Params>
static char const* prepare(Params const& p, cudaStream_t stream) {
  if (!p.numbers.has_terms) return nullptr;
  return p.dtype == kFloat16 ? launch_prepare<sm90::PrepareTraits<sm90::F16, Params>>(p, stream)
                             : launch_prepare<sm90::PrepareTraits<sm90::Bf16, Params>>(p, stream);
}

static char const* launch(ForwardParams const& p, int blocks) {
  auto const stream = static_cast<cudaStream_t>(p.stream);
  if (char const* wrong = prepare(p, stream)) return wrong;
#define FORWARD(QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG, TERMS) \
  if (p.head_dim_qk <= QK && p.head_dim_v <= V && p.has_band <= BAND && p.has_softcap <= SOFTCAP && \
      p.numbers.has_terms == TERMS) { \
    return p.dtype == kFloat16 ? launch_forward<FA_TRAITS(F16, QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG, TERMS)>( \
                                     p, make_maps, blocks, stream) \
                               : launch_forward<FA_TRAITS(Bf16, QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG, TERMS)>( \
                                     p, make_maps, blocks, stream); \
  }
#include "instances.inc"
  return "no kernel holds these head dims";
}

#define FA_BACKWARD_DKDV_TRAITS(T, QK, V, SOFTCAP, M, N, STAGES, FUSED, TERMS) \
  sm90::BackwardDkdvTraits<sm90::T, QK, V, SOFTCAP != 0, M, N, STAGES, FUSED != 0, TERMS != 0>
#define FA_BACKWARD_DQ_TRAITS(T, QK, V, SOFTCAP, N, K_STAGES, V_STAGES, TERMS) \
  sm90::BackwardDqTraits<sm90::T, QK, V, SOFTCAP != 0, N, K_STAGES, V_STAGES, TERMS != 0>
#define FA_EXTERN(LAUNCH, TRAITS) \
  extern template char const* LAUNCH<TRAITS>(BackwardParams const&, MakeBackwardMaps, cudaStream_t);

extern template char const* launch_backward_preprocess<sm90::Bf16>(BackwardParams const&, cudaStream_t);
extern template char const* launch_backward_preprocess<sm90::F16>(BackwardParams const&, cudaStream_t);
#define BACKWARD_DKDV(...) \
  FA_EXTERN(launch_backward_dkdv, FA_BACKWARD_DKDV_TRAITS(Bf16, __VA_ARGS__)) \
  FA_EXTERN(launch_backward_dkdv, FA_BACKWARD_DKDV_TRAITS(F16, __VA_ARGS__))
#define BACKWARD_DQ(...) \
  FA_EXTERN(launch_backward_dq, FA_BACKWARD_DQ_TRAITS(Bf16, __VA_ARGS__)) \
  FA_EXTERN(launch_backward_dq, FA_BACKWARD_DQ_TRAITS(F16, __VA_ARGS__))
#include "instances.inc"

// dk and dv; with dq_sums also dq, by the fused kernel whose head dim is sum_columns.
static char const* launch_dkdv(BackwardParams const& p, cudaStream_t stream) {
#define BACKWARD_DKDV(QK, V, SOFTCAP, M, N, STAGES, FUSED, TERMS) \
  if (p.head_dim_qk <= QK && p.head_dim_v <= V && p.has_softcap <= SOFTCAP && p.sum_columns == (FUSED ? QK : 0) && \
      p.numbers.has_terms == TERMS) { \
    return p.dtype == kFloat16 \
               ? launch_backward_dkdv<FA_BACKWARD_DKDV_TRAITS(F16, QK, V, SOFTCAP, M, N, STAGES, FUSED, TERMS)>( \
                     p, make_backward_maps, stream) \
               : launch_backward_dkdv<FA_BACKWARD_DKDV_TRAITS(Bf16, QK, V, SOFTCAP, M, N, STAGES, FUSED, TERMS)>( \
                     p, make_backward_maps, stream); \
  }
#include "instances.inc"
  return "no kernel holds these head dims";
}

static char const* launch_dq(BackwardParams const& p, cudaStream_t stream) {
#define BACKWARD_DQ(QK, V, SOFTCAP, N, K_STAGES, V_STAGES, TERMS) \
  if (p.head_dim_qk <= QK && p.head_dim_v <= V && p.has_softcap <= SOFTCAP && p.numbers.has_terms == TERMS) { \
    return p.dtype == kFloat16 \
               ? launch_backward_dq<FA_BACKWARD_DQ_TRAITS(F16, QK, V, SOFTCAP, N, K_STAGES, V_STAGES, TERMS)>( \
                     p, make_backward_maps, stream) \
               : launch_backward_dq<FA_BACKWARD_DQ_TRAITS(Bf16, QK, V, SOFTCAP, N, K_STAGES, V_STAGES, TERMS)>( \
                     p, make_backward_maps, stream); \
  }
#include "instances.inc"
  return "no kernel holds these head dims";
}

static char const* launch(BackwardParams const& p) {
  auto const stream = static_cast<cudaStream_t>(p.stream);
  char const* wrong = p.dtype == kFloat16 ? launch_backward_preprocess<sm90::F16>(p, stream)
                                          : launch_backward_preprocess<sm90::Bf16>(p, stream);
  if (!wrong) wrong = prepare(p, stream);
  if (!wrong && p.dk) wrong = launch_dkdv(p, stream);
  if (!wrong && p.dq && !p.dq_sums) wrong = launch_dq(p, stream);
  return wrong;
}

#define FA_DECODE_TRAITS(T, QK, V, SOFTCAP, N, STAGES) sm90::DecodeTraits<sm90::T, QK, V, SOFTCAP != 0, N, STAGES>
#define FA_EXTERN_DECODE(TRAITS) \
  extern template char const* launch_decode<TRAITS>(DecodeParams const&, MakeDecodeMaps, cudaStream_t);

extern template char const* launch_append<sm90::Bf16>(DecodeParams const&, cudaStream_t);
extern template char const* launch_append<sm90::F16>(DecodeParams const&, cudaStream_t);
extern template char const* launch_combine<sm90::Bf16>(DecodeParams const&, cudaStream_t);
extern template char const* launch_combine<sm90::F16>(DecodeParams const&, cudaStream_t);
#define DECODE(...) \
  FA_EXTERN_DECODE(FA_DECODE_TRAITS(Bf16, __VA_ARGS__)) \
  FA_EXTERN_DECODE(FA_DECODE_TRAITS(F16, __VA_ARGS__))
#include "instances.inc"

#define FA_GATHERED_TRAITS(T, QK, V, STAGES, SLOTS) sm90::GatheredTraits<sm90::T, QK, V, STAGES, SLOTS>
#define FA_EXTERN_GATHERED(TRAITS) \
  extern template char const* launch_decode_gathered<TRAITS>(DecodeParams const&, cudaStream_t);
#define DECODE_GATHERED(...) \
  FA_EXTERN_GATHERED(FA_GATHERED_TRAITS(Bf16, __VA_ARGS__)) \
  FA_EXTERN_GATHERED(FA_GATHERED_TRAITS(F16, __VA_ARGS__))
#include "instances.inc"

static char const* launch_gathered(DecodeParams const& p, cudaStream_t stream) {
#define DECODE_GATHERED(QK, V, STAGES, SLOTS) \
  if (p.head_dim_qk <= QK && p.head_dim_v <= V && p.is_e4m3 == (SLOTS > 0)) { \
    return p.dtype == kFloat16 ? launch_decode_gathered<FA_GATHERED_TRAITS(F16, QK, V, STAGES, SLOTS)>(p, stream) \
                               : launch_decode_gathered<FA_GATHERED_TRAITS(Bf16, QK, V, STAGES, SLOTS)>(p, stream); \
  }
#include "instances.inc"
  return "no kernel holds these head dims";
}

static char const* launch_splits(DecodeParams const& p, cudaStream_t stream) {
  if (p.is_gathered) return launch_gathered(p, stream);
#define DECODE(QK, V, SOFTCAP, N, STAGES) \
  if (p.head_dim_qk <= QK && p.head_dim_v <= V && p.has_softcap <= SOFTCAP) { \
    return p.dtype == kFloat16 \
               ? launch_decode<FA_DECODE_TRAITS(F16, QK, V, SOFTCAP, N, STAGES)>(p, make_decode_maps, stream) \
               : launch_decode<FA_DECODE_TRAITS(Bf16, QK, V, SOFTCAP, N, STAGES)>(p, make_decode_maps, stream); \
  }
#include "instances.inc"
  return "no kernel holds these head dims";
}

static char const* launch(DecodeParams const& p) {
  auto const stream = static_cast<cudaStream_t>(p.stream);
  char const* wrong = nullptr;
  if (p.new_k) {
    wrong = p.dtype == kFloat16 ? launch_append<sm90::F16>(p, stream) : launch_append<sm90::Bf16>(p, stream);
  }
  if (!wrong) wrong = launch_splits(p, stream);
  if (wrong || p.splits == 1) return wrong;
  return p.dtype == kFloat16 ? launch_combine<sm90::F16>(p, stream) : launch_combine<sm90::Bf16>(p, stream);
}

static char const* launch(ForwardParams const& p) {
  int multiprocessors = static_cast<int>(p.blocks);
  if (!multiprocessors) {
    cudaError_t const error =
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, static_cast<int>(p.device));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return launch(p, multiprocessors);
}

// Runs with the problem's device current, and leaves the device as it was.
template <class Params>
static char const* launch_on_device(Params const& p) {
  int before = 0;
  if (!encoder()) return "the driver has no cuTensorMapEncodeTiled: it is missing, or older than CUDA 12";
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(p.device));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  char const* const wrong = launch(p);
  cudaSetDevice(before);
  return wrong;
}

// 0, or 1 with the reason in `error`.
template <class Params>
static int run(Params const* params, int64 version, char* error, long long error_bytes) {
  char const* wrong = nullptr;
  if (params->version != version) {
    wrong = "the caller was written for another version of this library";
  } else if (params->batch > 0 && params->seqlen_q > 0) {
    wrong = launch_on_device(*params);
  }
  if (wrong) std::snprintf(error, static_cast<size_t>(error_bytes), "%s", wrong);
  return wrong != nullptr;
}

}  // namespace fa

#define FA_EXPORT extern "C" __attribute__((visibility("default")))

// Versions and sizes that the caller's structs must have.
FA_EXPORT long long fa_forward_version() { return fa::kForwardVersion; }
FA_EXPORT long long fa_forward_bytes() { return sizeof(fa::ForwardParams); }
FA_EXPORT long long fa_backward_version() { return fa::kBackwardVersion; }
FA_EXPORT long long fa_backward_bytes() { return sizeof(fa::BackwardParams); }
FA_EXPORT long long fa_decode_version() { return fa::kDecodeVersion; }
FA_EXPORT long long fa_decode_bytes() { return sizeof(fa::DecodeParams); }
// The CUDA version that it was built with, 1000 * major + 10 * minor: the driver must support its major version.
FA_EXPORT long long fa_cuda_version() { return CUDART_VERSION; }

FA_EXPORT int fa_forward(fa::ForwardParams const* params, char* error, long long error_bytes) {
  return fa::run(params, fa::kForwardVersion, error, error_bytes);
}
FA_EXPORT int fa_backward(fa::BackwardParams const* params, char* error, long long error_bytes) {
  return fa::run(params, fa::kBackwardVersion, error, error_bytes);
}
FA_EXPORT int fa_decode(fa::DecodeParams const* params, char* error, long long error_bytes) {
  return fa::run(params, fa::kDecodeVersion, error, error_bytes);
}
