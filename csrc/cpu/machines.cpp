// Which instruction sets this machine has. fastattn/backends/cpu/build.py says what is compiled for each.
#include "machines.h"

#include "threads.h"

#if defined(FA_BASELINE_ALONE)
#elif defined(__x86_64__)
#define FA_X86 1
#elif defined(__aarch64__)
#define FA_ARM 1
#include <sys/auxv.h>
#endif

#define FA_DECODE(machine) extern "C" fa::cpu::Decode const* fa_decode_##machine();
#define FA_ATTENTION(operand, machine) extern "C" fa::cpu::Attention const* fa_attention_##operand##_##machine();

FA_DECODE(baseline)
FA_ATTENTION(Single, baseline)
FA_ATTENTION(Double, baseline)
#if defined(FA_X86)
FA_DECODE(avx2)
FA_DECODE(avx512)
FA_DECODE(avx512bf16)
FA_ATTENTION(Single, avx2)
FA_ATTENTION(Double, avx2)
FA_ATTENTION(Single, avx512)
FA_ATTENTION(Pairs, avx512bf16)
#elif defined(FA_ARM)
FA_ATTENTION(Pairs, bf16)
#endif

namespace fa::cpu {

static bool always() { return true; }

#if defined(FA_X86)
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(FA_ARM)
static bool has_bf16() { return getauxval(AT_HWCAP2) & 1ul << 14; }  // HWCAP2_BF16
#endif

static Machine const kMachines[] = {
#if defined(FA_X86)
    {"avx512bf16", has_avx512bf16, fa_decode_avx512bf16(), fa_attention_Single_avx512(),
     fa_attention_Pairs_avx512bf16(), fa_attention_Double_avx2()},
    {"avx512", has_avx512, fa_decode_avx512(), fa_attention_Single_avx512(), nullptr, fa_attention_Double_avx2()},
    {"avx2", has_avx2, fa_decode_avx2(), fa_attention_Single_avx2(), nullptr, fa_attention_Double_avx2()},
#elif defined(FA_ARM)
    {"bf16", has_bf16, fa_decode_baseline(), fa_attention_Single_baseline(), fa_attention_Pairs_bf16(),
     fa_attention_Double_baseline()},
#endif
    {"baseline", always, fa_decode_baseline(), fa_attention_Single_baseline(), nullptr, fa_attention_Double_baseline()},
};
constexpr int kMachineCount = sizeof(kMachines) / sizeof(*kMachines);

Machine const* machine_for(int64 index) {
  if (index >= 0) return index < kMachineCount && kMachines[index].runs_here() ? kMachines + index : nullptr;
  static Machine const* const best = [] {
    for (Machine const& machine : kMachines)
      if (machine.runs_here()) return &machine;
    return static_cast<Machine const*>(nullptr);
  }();
  return best;
}

}  // namespace fa::cpu

FA_PUBLIC const char* fa_cpu_sources() { return FA_SOURCES; }  // a hash of what it was built from
FA_PUBLIC int fa_cpu_has_threads() { return GOMP_parallel != nullptr; }

// The name of an instruction set, the best first; null where there are no more. `runs`: whether this machine has it.
FA_PUBLIC const char* fa_cpu_machine(long long index, int* runs) {
  if (index >= fa::cpu::kMachineCount) return nullptr;
  *runs = fa::cpu::kMachines[index].runs_here();
  return fa::cpu::kMachines[index].name;
}
