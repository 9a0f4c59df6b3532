// A BACKWARD_DKDV or BACKWARD_DQ line of instances.inc for the emulator: compiled with -DFA_KEYS=D_QK,D_V,... or
// -DFA_QUERIES=... Both types, or bfloat16 alone with -DFA_BFLOAT16_ONLY.
#include "../sm90/backward_dkdv.cuh"
#include "../sm90/backward_dq.cuh"
#include "../sm90/backward_postprocess.cuh"
#include "../sm90/backward_preprocess.cuh"
#include "../sm90/backward_sum_heads.cuh"
#include "backward_case.h"

namespace {

using namespace fa;

#define FA_TEXT_OF(...) #__VA_ARGS__
#define FA_TEXT(...) FA_TEXT_OF(__VA_ARGS__)

#ifdef FA_BACKWARD_DKDV
#define FA_LINE "backward_dkdv<", FA_TEXT(FA_BACKWARD_DKDV)
template <class T, int D_QK, int D_V, int SOFTCAP, int BLOCK_M, int BLOCK_N, int STAGES, int FUSED, int TERMS>
emu::BackwardInstance instance_of() {
  using C = sm90::BackwardDkdvTraits<T, D_QK, D_V, SOFTCAP != 0, BLOCK_M, BLOCK_N, STAGES, FUSED != 0, TERMS != 0>;
  emu::BackwardInstance made{};
  made.shape = {D_QK, D_V, C::BLOCK_M, C::BLOCK_N, false, true, SOFTCAP != 0, false, false, C::TERMS};
  made.threads = C::THREADS, made.is_fused = C::FUSED;
  made.kernel = sm90::backward_dkdv_kernel<C>, made.tiles = sm90::tile_count<C::BLOCK_N, sm90::Of::kKeys>;
  made.prepare_keys = sm90::prepare_terms_kernel<sm90::PrepareTraits<T, BackwardParams>>;
  made.prepare = sm90::backward_preprocess_kernel<T>, made.sinks = sm90::backward_dsinks_kernel<T>;
  made.sum_heads = sm90::backward_sum_heads_kernel<C>;
  if constexpr (C::FUSED) made.finish = sm90::backward_postprocess_kernel<C>;
  return made;
}
#define FA_INSTANCE(T) instance_of<T, FA_BACKWARD_DKDV>()
#else
#define FA_LINE "backward_dq<", FA_TEXT(FA_BACKWARD_DQ)
template <class T, int D_QK, int D_V, int SOFTCAP, int BLOCK_N, int K_STAGES, int V_STAGES, int TERMS>
emu::BackwardInstance instance_of() {
  using C = sm90::BackwardDqTraits<T, D_QK, D_V, SOFTCAP != 0, BLOCK_N, K_STAGES, V_STAGES, TERMS != 0>;
  emu::BackwardInstance made{};
  made.shape = {D_QK, D_V, C::BLOCK_M, C::BLOCK_N, false, true, SOFTCAP != 0, false, false, C::TERMS};
  made.threads = C::THREADS, made.of_queries = true;
  made.kernel = sm90::backward_dq_kernel<C>, made.tiles = sm90::tile_count<C::BLOCK_M, sm90::Of::kQueries>;
  made.prepare_keys = sm90::prepare_terms_kernel<sm90::PrepareTraits<T, BackwardParams>>;
  made.prepare = sm90::backward_preprocess_kernel<T>, made.sinks = sm90::backward_dsinks_kernel<T>;
  return made;
}
#define FA_INSTANCE(T) instance_of<T, FA_BACKWARD_DQ>()
#endif

struct Register {
  Register(emu::BackwardInstance made, bool is_half, char const* kind, char const* line) {
    made.name = std::string(kind) + (is_half ? "f16," : "bf16,") + line + (FA_STAGED ? ", staged>" : ">");
    made.shape.is_half = is_half;
    made.row_threads = sm90::kRowThreads;
    emu::backward_instances().push_back(made);
  }
};

Register const bf16(FA_INSTANCE(sm90::Bf16), false, FA_LINE);
#ifndef FA_BFLOAT16_ONLY
Register const f16(FA_INSTANCE(sm90::F16), true, FA_LINE);
#endif

}  // namespace
