// How products are computed. A matrix is one of words: a number each, or for bf16 a pair of numbers that follow each
// other along the contraction; so that tiles, packing and loops are the same source for all.
#pragma once

#include "functions.h"

namespace {

// fp32, and what is turned into it while it is packed.
struct Single {
  using Word = float;
  static constexpr int kPerWord = 1;
  static constexpr int kDegree = 6;
  static constexpr int64 kChain = 128;  // longer sums are cut, which halves the error of fp32
  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
};

struct Double {
  using Word = double;
  static constexpr int kPerWord = 1;
  static constexpr int kDegree = 13;
  static constexpr int64 kChain = 1 << 20;
  static Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FA_PAIRS 1

// bf16 in pairs, added up in fp32.
struct Pairs {
  using Word = float;
  static constexpr int kPerWord = 2;
  static constexpr int kDegree = 4;
  static constexpr int64 kChain = 1 << 20;

#if defined(__AVX512BF16__)
  static Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // Rounded numbers of x, then of y.
  static Floats joined(Floats x, Floats y) { return (Floats)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }
#else
  static Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
  static Floats joined(Floats x, Floats y) {
    return (Floats)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)x), (float32x4_t)y);
  }
#endif
};

#if defined(__AVX512BF16__)
// Numbers of x and y by turns.
inline Floats in_pairs(__m256i x, __m256i y) {
  const __m512i order =
      (__m512i)(__attribute__((vector_size(64))) short){0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return (Floats)_mm512_permutex2var_epi16(_mm512_castsi256_si512(x), order, _mm512_castsi256_si512(y));
}
#endif

// The halves of what `joined` makes by turns: x and y in pairs.
inline Floats in_pairs(Floats joined) {
#if defined(__AVX512BF16__)
  const __m512i order =
      (__m512i)(__attribute__((vector_size(64))) short){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Floats)_mm512_permutexvar_epi16(order, (__m512i)joined);
#else
  bfloat16x8_t const all = (bfloat16x8_t)joined;
  uint16x4_t const x = vget_low_u16((uint16x8_t)all), y = vget_high_u16((uint16x8_t)all);
  return (Floats)vcombine_u16(vzip1_u16(x, y), vzip2_u16(x, y));
#endif
}
#endif

}  // namespace
