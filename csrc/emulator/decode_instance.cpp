// One line of decode_instances.inc for the emulator: compiled with -DFA_INSTANCE=D_QK,D_V,... Both types, or bfloat16
// alone with -DFA_BFLOAT16_ONLY.
#include "../sm90/combine.cuh"
#include "../sm90/decode.cuh"
#include "decode_case.h"

namespace {

using namespace fa;

template <class T, int D_QK, int D_V, int SOFTCAP, int BLOCK_N, int STAGES>
struct Register {
  Register(bool is_half, char const* type, char const* line) {
    using Traits = sm90::DecodeTraits<T, D_QK, D_V, SOFTCAP != 0, BLOCK_N, STAGES>;
    emu::decode_instances().push_back({std::string("decode<") + type + "," + line + ">", D_QK, D_V, BLOCK_N,
                                       Traits::THREADS, is_half, SOFTCAP != 0, sm90::decode_kernel<Traits>,
                                       sm90::kCombineThreads, sm90::combine_kernel<T>});
  }
};

#define FA_TEXT_OF(...) #__VA_ARGS__
#define FA_TEXT(...) FA_TEXT_OF(__VA_ARGS__)
Register<sm90::Bf16, FA_INSTANCE> const bf16(false, "bf16", FA_TEXT(FA_INSTANCE));
#ifndef FA_BFLOAT16_ONLY
Register<sm90::F16, FA_INSTANCE> const f16(true, "f16", FA_TEXT(FA_INSTANCE));
#endif

}  // namespace
