// Dropout's random bits: Philox4x32 with 7 rounds, the transcription of fastattn/rng.py.
#pragma once

#include "vector.h"

namespace {

typedef uint64 Wides __attribute__((vector_size(4 * kLanes)));  // numbers of 32 bits in lanes of 64
typedef uint32 HalfWords __attribute__((vector_size(2 * kLanes)));

// The lower halves of lanes times a number of 32 bits.
inline Wides product_of_lower(Wides a, uint32 b) {
#if defined(__AVX512F__)
  return (Wides)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Wides)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Wides)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__ARM_NEON)
  return (Wides)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
  return (a & 0xffffffffu) * uint64(b);
#endif
}

// The words of as many calls as there are lanes of 64 bits; the upper halves are not used.
inline void philox(Wides (&counter)[4], uint32 key0, uint32 key1) {
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    Wides const product0 = product_of_lower(counter[0], 0xD2511F53u);
    Wides const product1 = product_of_lower(counter[2], 0xCD9E8D57u);
    counter[0] = (product1 >> 32) ^ counter[1] ^ uint64(key0);
    counter[1] = product1;
    counter[2] = (product0 >> 32) ^ counter[3] ^ uint64(key1);
    counter[3] = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

constexpr int kCallsAtOnce = kLanes, kBitsAtOnce = 8 * kCallsAtOnce;  // two vectors of calls, eight keys each

// The 16 random bits of keys begin .. end - 1 and more: `bits` takes whole steps of kBitsAtOnce. `begin` is a multiple of 32.
FA_CALLED void random_bits(int64 const* seed_and_offset, int64 head, int row, int begin, int end, uint16* bits) {
  uint64 const seed = uint64(seed_and_offset[0]);
  for (int j = begin; j < end; j += kBitsAtOnce, bits += kBitsAtOnce) {
    uint32 words[4][kCallsAtOnce];
    for (int half = 0; half < 2; ++half) {
      Wides const calls = (Wides)(lane_numbers<double>() + int64(j / 32 * 4 + half * (kLanes / 2)));
      Wides counter[4] = {Wides{} + uint64(row), calls, Wides{} + uint64(uint32(head)),
                          Wides{} + uint64(uint32(seed_and_offset[1]))};
      philox(counter, uint32(seed), uint32(seed >> 32));
      for (int w = 0; w < 4; ++w) {
        HalfWords const narrow = __builtin_convertvector(counter[w], HalfWords);
        __builtin_memcpy(words[w] + half * (kLanes / 2), &narrow, sizeof narrow);
      }
    }
    for (int group = 0; group < kCallsAtOnce / 4; ++group)
      for (int w = 0; w < 4; ++w) __builtin_memcpy(bits + 32 * group + 8 * w, words[w] + 4 * group, 16);
  }
}

}  // namespace
