// The instruction sets of the library, the best first, and the kernels that each has.
#pragma once

#include "attention.h"
#include "decode.h"

namespace fa::cpu {

struct Machine {
  const char* name;
  bool (*runs_here)();
  Decode const* decode;
  Attention const *single, *pairs, *wide;  // fp32, and bf16 and fp16 as fp32; bf16 in pairs, or null; fp64

  Attention const& attention(int64 dtype) const {
    return dtype == kFloat64 ? *wide : dtype == kBfloat16 && pairs ? *pairs : *single;
  }
};

// The machine at an index; for a negative one the best that runs here. Null if there is none, or it does not run here.
Machine const* machine_for(int64 index);

}  // namespace fa::cpu

#define FA_PUBLIC extern "C" __attribute__((visibility("default")))
