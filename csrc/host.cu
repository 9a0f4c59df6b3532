// The C interface of the shared library: one function for each pass, taking a flat struct (params.h).
//
// It chooses the kernel, builds the tensor maps and launches; it allocates nothing and waits for nothing. The one
// function of the driver that it needs is asked for at run time, so the library loads where there is no driver, and
// says so. Errors come back as text.
#include <cstdio>

#include "launch.h"

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

struct View {  // (batch, row, head, column), strides in elements
  void const* data;
  int64 columns, rows, heads, batch;
  Strides strides;
};

// A dimension of size 1 is never stepped over, so any valid stride will do for it.
static cuuint64_t stride_bytes(int64 size, int64 stride) { return size == 1 ? 16 : static_cast<cuuint64_t>(stride) * 2; }

static bool encode(sm90::TensorMap& map, View const& x, int64 dtype, int box_rows) {
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

// K and V as far as some query keeps them: what lies outside of the map arrives as zeros.
static View kept_rows(void const* data, int64 columns, ForwardParams const& p, Strides const& strides, int64 batch) {
  char const* const first = static_cast<char const*>(data) + p.key_begin * strides.row * 2;
  return {first, columns, p.key_end - p.key_begin, p.heads_kv, batch, strides};
}

static char const* make_maps(ForwardParams const& p, int block_m, int block_n, sm90::ForwardArgs& args) {
  if (!encoder()) return "the driver has no cuTensorMapEncodeTiled: it is missing, or older than CUDA 12";
  int64 const batch = p.cu_seqlens_q ? 1 : p.batch;
  Strides const out = {p.seqlen_q * p.heads_q * p.head_dim_v, p.heads_q * p.head_dim_v, p.head_dim_v};
  if (!encode(args.q, {p.q, p.head_dim_qk, p.seqlen_q, p.heads_q, batch, p.q_strides}, p.dtype, block_m)) {
    return "the tensor map of q was refused: check its address and strides";
  }
  if (!encode(args.out, {p.out, p.head_dim_v, p.seqlen_q, p.heads_q, batch, out}, p.dtype, 64)) {
    return "the tensor map of out was refused: check its address";
  }
  args.k = args.v = args.q;  // where no key is kept, nothing is loaded
  if (p.key_begin == p.key_end) return nullptr;
  if (!encode(args.k, kept_rows(p.k, p.head_dim_qk, p, p.k_strides, batch), p.dtype, block_n)) {
    return "the tensor map of k was refused: check its address and strides";
  }
  if (!encode(args.v, kept_rows(p.v, p.head_dim_v, p, p.v_strides, batch), p.dtype, block_n)) {
    return "the tensor map of v was refused: check its address and strides";
  }
  return nullptr;
}

// ---- the choice of a kernel ------------------------------------------------------------------------------------------
#define FA_TRAITS(T, QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG) \
  sm90::ForwardTraits<sm90::T, QK, V, M, N, STAGES, PINGPONG != 0, BAND != 0, SOFTCAP != 0>

#define FORWARD(...)                                                                                                    \
  extern template char const* launch_forward<FA_TRAITS(Bf16, __VA_ARGS__)>(ForwardParams const&, MakeMaps, int,         \
                                                                           cudaStream_t);                              \
  extern template char const* launch_forward<FA_TRAITS(F16, __VA_ARGS__)>(ForwardParams const&, MakeMaps, int,          \
                                                                          cudaStream_t);
#include "instances.inc"
#undef FORWARD

static char const* launch(ForwardParams const& p, int blocks) {
  auto const stream = static_cast<cudaStream_t>(p.stream);
#define FORWARD(QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG)                                                           \
  if (p.head_dim_qk <= QK && p.head_dim_v <= V && p.has_band <= BAND && p.has_softcap <= SOFTCAP) {                     \
    return p.dtype == kFloat16                                                                                          \
               ? launch_forward<FA_TRAITS(F16, QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG)>(p, make_maps, blocks, stream)  \
               : launch_forward<FA_TRAITS(Bf16, QK, V, BAND, SOFTCAP, M, N, STAGES, PINGPONG)>(p, make_maps, blocks, stream); \
  }
#include "instances.inc"
#undef FORWARD
  return "no kernel holds these head dims";
}

// Runs with the problem's device current, and leaves the device as it was.
static char const* forward_on_device(ForwardParams const& p) {
  int before = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(p.device));
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, static_cast<int>(p.device));
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  char const* const wrong = launch(p, p.blocks ? static_cast<int>(p.blocks) : multiprocessors);
  cudaSetDevice(before);
  return wrong;
}

}  // namespace fa

#define FA_EXPORT extern "C" __attribute__((visibility("default")))

// What the caller's struct has to be like.
FA_EXPORT long long fa_forward_version() { return fa::kForwardVersion; }
FA_EXPORT long long fa_forward_bytes() { return sizeof(fa::ForwardParams); }

// 0, or 1 with the reason in `error`.
FA_EXPORT int fa_forward(fa::ForwardParams const* params, char* error, long long error_bytes) {
  char const* wrong = nullptr;
  if (params->version != fa::kForwardVersion) {
    wrong = "the caller was written for another version of this library";
  } else if (params->batch > 0 && params->seqlen_q > 0) {
    wrong = fa::forward_on_device(*params);
  }
  if (wrong) std::snprintf(error, static_cast<size_t>(error_bytes), "%s", wrong);
  return wrong != nullptr;
}
