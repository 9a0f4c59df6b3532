// One line of instances.inc for the emulator: compiled with -DFA_DECODE=D_QK,D_V,... Both types, or bfloat16
// alone with -DFA_BFLOAT16_ONLY.
#include "../sm90/append.cuh"
#include "../sm90/combine.cuh"
#include "../sm90/decode_gathered.cuh"
#include "decode_case.h"

namespace {

using namespace fa;

#ifdef FA_DECODE_GATHERED
#define FA_LINE FA_DECODE_GATHERED
template <class T, int D_QK, int D_V, int STAGES, int SLOTS>
struct Register {
  Register(bool is_half, char const* type, char const* line) {
    using Traits = sm90::GatheredTraits<T, D_QK, D_V, STAGES, SLOTS>;
    emu::Shape const shape = {D_QK, D_V, Traits::BLOCK_M, Traits::BLOCK_N, is_half, true, true, true, SLOTS > 0};
    emu::decode_instances().push_back({std::string("decode_gathered<") + type + "," + line + ">", shape,
                                       Traits::THREADS, sm90::kAppendThreads, sm90::kCombineThreads,
                                       sm90::append_kernel<T>, nullptr, sm90::combine_kernel<T>,
                                       sm90::decode_gathered_kernel<Traits>});
  }
};
#else
#define FA_LINE FA_DECODE
template <class T, int D_QK, int D_V, int SOFTCAP, int BLOCK_N, int STAGES>
struct Register {
  Register(bool is_half, char const* type, char const* line) {
    using Traits = sm90::DecodeTraits<T, D_QK, D_V, SOFTCAP != 0, BLOCK_N, STAGES>;
    emu::Shape const shape = {D_QK, D_V, Traits::BLOCK_M, BLOCK_N, is_half, true, Traits::SOFTCAP};
    emu::decode_instances().push_back({std::string("decode<") + type + "," + line + ">", shape, Traits::THREADS,
                                       sm90::kAppendThreads, sm90::kCombineThreads, sm90::append_kernel<T>,
                                       sm90::decode_kernel<Traits>, sm90::combine_kernel<T>});
  }
};

#endif

#define FA_TEXT_OF(...) #__VA_ARGS__
#define FA_TEXT(...) FA_TEXT_OF(__VA_ARGS__)
Register<sm90::Bf16, FA_LINE> const bf16(false, "bf16", FA_TEXT(FA_LINE));
#ifndef FA_BFLOAT16_ONLY
Register<sm90::F16, FA_LINE> const f16(true, "f16", FA_TEXT(FA_LINE));
#endif

}  // namespace
