// A FORWARD line of instances.inc for the emulator: compiled with -DFA_FORWARD=D_QK,D_V,... Both types, or bfloat16
// alone with -DFA_BFLOAT16_ONLY.
#include "../sm90/forward.cuh"
#include "forward_case.h"

namespace {

using namespace fa;

template <class T, int D_QK, int D_V, int BAND, int SOFTCAP, int BLOCK_M, int BLOCK_N, int STAGES, int PINGPONG,
          int TERMS>
struct Register {
  Register(bool is_half, char const* type, char const* line) {
    using Traits = sm90::ForwardTraits<T, D_QK, D_V, BLOCK_M, BLOCK_N, STAGES, PINGPONG, BAND, SOFTCAP, TERMS != 0>;
    emu::Shape const shape = {D_QK, D_V, BLOCK_M, BLOCK_N, is_half, BAND != 0, SOFTCAP != 0, false, false, TERMS != 0};
    emu::forward_instances().push_back({std::string("forward<") + type + "," + line + ">", shape, Traits::THREADS,
                                        sm90::forward_kernel<Traits>,
                                        sm90::prepare_terms_kernel<sm90::PrepareTraits<T, ForwardParams>>});
  }
};

#define FA_TEXT_OF(...) #__VA_ARGS__
#define FA_TEXT(...) FA_TEXT_OF(__VA_ARGS__)
Register<sm90::Bf16, FA_FORWARD> const bf16(false, "bf16", FA_TEXT(FA_FORWARD));
#ifndef FA_BFLOAT16_ONLY
Register<sm90::F16, FA_FORWARD> const f16(true, "f16", FA_TEXT(FA_FORWARD));
#endif

}  // namespace
