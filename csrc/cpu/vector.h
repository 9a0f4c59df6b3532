// Vectors of floats as wide as the machine's, and numbers of every stored type turned into them.
//
// GCC's and Clang's vector extension: the same source for AVX-512, AVX2, SSE2 and NEON. Everything here has internal
// linkage, because the file is compiled once for each instruction set into one library.
#pragma once

#include <utility>

#include "params.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__x86_64__)
#include <emmintrin.h>  // parsed in a tenth of the time
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// What runs once for many pairs and is called from several places: GCC's copies of it would gain nothing, and each takes
// time to compile.
#define FA_CALLED __attribute__((noinline))

namespace {

using fa::cpu::int32;
using fa::cpu::int64;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef int32 Ints __attribute__((vector_size(4 * kLanes)));
typedef int64 Longs __attribute__((vector_size(4 * kLanes)));
typedef uint32 Words __attribute__((vector_size(4 * kLanes)));
typedef float Four __attribute__((vector_size(16)));
typedef uint16 Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8 Bytes __attribute__((vector_size(kLanes)));
typedef int32 FewInts __attribute__((vector_size(2 * kLanes)));  // beside Doubles
typedef uint16 FewHalves __attribute__((vector_size(kLanes)));
typedef uint8 FewBytes __attribute__((vector_size(kLanes / 2)));

// What is computed with: words of 4 or 8 bytes, vectors of them, and integers as wide.
template <class Word>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = Floats;
  using Integers = Ints;
  using Integer = int32;
  using Narrow32 = Ints;
  using Narrow16 = Halves;
  static constexpr int kCount = kLanes;
};

template <>
struct Lanes<double> {
  using Vector = Doubles;
  using Integers = Longs;
  using Integer = int64;
  using Narrow32 = FewInts;
  using Narrow16 = FewHalves;
  static constexpr int kCount = kLanes / 2;
};

template <class Word>
using Vector = typename Lanes<Word>::Vector;
template <class Word>
using Integers = typename Lanes<Word>::Integers;
template <class Word>
constexpr int kCount = Lanes<Word>::kCount;

// Numbers as they are stored.
struct Bfloat16 {
  uint16 bits;
};
struct Float16 {
  uint16 bits;
};
struct Float8 {
  uint8 bits;
};  // e4m3: a sign, 4 bits of exponent, 3 of mantissa, no infinity

template <class V>
inline V loaded(void const* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Brings the line of memory at p towards the second cache. The empty assembly has no effect, but tells GCC that there may
// be one: it drops calls of functions that do nothing else.
inline void prefetch_line(void const* p) {
  __builtin_prefetch(p, 0, 2);
  __asm__ volatile("");
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, Doubles v) { __builtin_memcpy(p, &v, sizeof v); }
inline Floats as_floats(Words w) { return (Floats)w; }

template <class Word, int... LANE>
inline Vector<Word> filled(Word x, std::integer_sequence<int, LANE...>) {
  return Vector<Word>{(static_cast<void>(LANE), x)...};
}

template <class Word, int... LANE>
inline Integers<Word> numbered(std::integer_sequence<int, LANE...>) {
  return Integers<Word>{LANE...};
}

template <class Word>
using LaneSequence = std::make_integer_sequence<int, kCount<Word>>;

// The bits of a word in every lane, whatever they mean.
template <class Word>
inline Vector<Word> broadcast(Word x) {
  return filled<Word>(x, LaneSequence<Word>{});
}

template <class Word>
inline Integers<Word> lane_numbers() {
  return numbered<Word>(LaneSequence<Word>{});
}

// A small float, its sign taken off and its exponent and mantissa at their places in 32 bits, as a float:
// `bias` is what the exponents differ by, and those with exponent 0 count from there, which a subtraction does.
inline Floats widened(Words magnitude, Words sign, Words special, uint32 bias) {
  constexpr uint32 kOne = 1u << 23;
  Words const bits = magnitude + (bias << 23);
  Floats const least = as_floats(Words{} + ((bias + 1) << 23));
  Floats const subnormal = as_floats(bits + kOne) - least;
  Words const is_subnormal = (Words)(magnitude < kOne);
  Words const value = ((Words)subnormal & is_subnormal) | (bits & ~is_subnormal);
  return as_floats(value | special | sign);
}

inline Floats load(float const* p) { return loaded<Floats>(p); }
inline Doubles load(double const* p) { return loaded<Doubles>(p); }

inline Floats load(Bfloat16 const* p) { return as_floats(__builtin_convertvector(loaded<Halves>(p), Words) << 16); }

inline Floats load(Float16 const* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(loaded<__m256i>(p));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(loaded<__m128i>(p));
#endif
  Words const w = __builtin_convertvector(loaded<Halves>(p), Words);
  Words const magnitude = (w & 0x7fffu) << 13;
  Words const special = (Words)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN keep the mantissa
  return widened(magnitude, (w & 0x8000u) << 16, special, 112);
}

// As many bytes as there are lanes of 32 or of 64 bits, in them. GCC 12 converts vectors of bytes one by one.
inline Ints bytes_in_ints(uint8 const* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(loaded<__m128i>(p));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, loaded<int64>(p)));
#else
  return __builtin_convertvector(loaded<Bytes>(p), Ints);
#endif
}

inline Longs bytes_in_longs(uint8 const* p) {
#if defined(__AVX512F__)
  return (Longs)_mm512_cvtepu8_epi64(_mm_set_epi64x(0, loaded<int64>(p)));
#elif defined(__AVX2__)
  return (Longs)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(loaded<int32>(p)));
#else
  return __builtin_convertvector(loaded<FewBytes>(p), Longs);
#endif
}

inline Floats load(Float8 const* p) {
  Words const w = (Words)bytes_in_ints(&p->bits);
  Words const magnitude = (w & 0x7fu) << 20;
  Words const special = (Words)(magnitude == 0x07f00000u) & 0x7fc00000u;  // the one NaN
  return widened(magnitude, (w & 0x80u) << 24, special, 120);
}

// The first `count` numbers, and zeros.
template <class T>
inline auto load_some(T const* p, int count) {
  T some[kLanes] = {};
  __builtin_memcpy(some, p, count * sizeof(T));
  return load(some);
}

template <class T>
inline auto to_float(T x) {
  return load_some(&x, 1)[0];
}

// Rounded to nearest, ties to even.
inline void round_to(float x, float* p) { *p = x; }

inline void round_to(float x, Bfloat16* p) {
  uint32 bits;
  __builtin_memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void round_to(float x, Float16* p) {
  uint32 bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32 const sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    p->bits = uint16(sign | 0x7e00);  // NaN
  } else if (magnitude >= 0x477ff000) {
    p->bits = uint16(sign | 0x7c00);  // above the largest number, and a tie with it: infinity
  } else if (magnitude < 0x38800000) {
    float absolute, half = 0.5f;  // subnormal: adding 1/2 rounds at 2^-24, and leaves the bits at the lower end
    __builtin_memcpy(&absolute, &magnitude, 4);
    absolute += half;
    __builtin_memcpy(&bits, &absolute, 4);
    p->bits = uint16(sign | (bits - 0x3f000000));
  } else {
    p->bits = uint16(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

inline void round_to(double x, double* p) { *p = x; }

inline void store(Bfloat16* p, Floats v) {
#if defined(__AVX512BF16__)
  __m256i const rounded = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
#else
  Words const bits = (Words)v, is_nan = (Words)(v != v);
  Words const rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 & ~is_nan) | (0x7fc0 & is_nan);
  Halves const halves = __builtin_convertvector(rounded, Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
#endif
}

inline void store(Float16* p, Floats v) {
#if defined(__AVX512F__)
  __m256i const rounded = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &rounded, sizeof rounded);
#elif defined(__F16C__)
  __m128i const rounded = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &rounded, sizeof rounded);
#else
  for (int n = 0; n < kLanes; ++n) round_to(v[n], p + n);
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define FA_SHUFFLE(Word, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FA_SHUFFLE(Word, a, b, ...) __builtin_shuffle(a, b, Integers<Word>{__VA_ARGS__})
#endif

// Lanes whose number has the bit STEP change places with those of the other vector that do not.
template <class Word, int STEP, int... LANE>
inline void exchange(Vector<Word>& a, Vector<Word>& b, std::integer_sequence<int, LANE...>) {
  constexpr int kLast = kCount<Word>;
  Vector<Word> const upper = FA_SHUFFLE(Word, a, b, ((LANE & STEP) ? kLast + LANE - STEP : LANE)...);
  b = FA_SHUFFLE(Word, a, b, ((LANE & STEP) ? kLast + LANE : LANE + STEP)...);
  a = upper;
}

// In lanes whose number has the bit STEP the sums of b with the lanes beside them, in the others those of a. What stays in its
// lane is blended, which takes no unit that moves lanes.
template <int STEP, int... LANE>
inline Floats folded(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
  constexpr int kLast = kLanes;
  return FA_SHUFFLE(float, a, b, ((LANE & STEP) ? kLast + LANE : LANE)...) +
         FA_SHUFFLE(float, a, b, ((LANE & STEP) ? kLast + LANE - STEP : LANE + STEP)...);
}

template <int STEP>
inline void fold(Floats* v) {
#pragma GCC unroll 16
  for (int n = 0; n < STEP; ++n) v[n] = folded<STEP>(v[n], v[n + STEP], LaneSequence<float>{});
}

// The sums of as many vectors as there are lanes, side by side.
inline Floats sums_of(Floats (&v)[kLanes]) {
  if constexpr (kLanes > 8) fold<8>(v);
  if constexpr (kLanes > 4) fold<4>(v);
  fold<2>(v);
  fold<1>(v);
  return v[0];
}

inline float sum(Floats v) {
  Four quarters[kLanes / 4];
  __builtin_memcpy(quarters, &v, sizeof v);
  Four total = quarters[0];
  for (int n = 1; n < kLanes / 4; ++n) total += quarters[n];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

inline float largest(Floats v) {
  Four quarters[kLanes / 4];
  __builtin_memcpy(quarters, &v, sizeof v);
  Four most = quarters[0];
  for (int n = 1; n < kLanes / 4; ++n) most = quarters[n] > most ? quarters[n] : most;
  float const left = most[0] > most[1] ? most[0] : most[1], right = most[2] > most[3] ? most[2] : most[3];
  return left > right ? left : right;
}

inline double sum(Doubles v) {
  double total = v[0];
  for (int n = 1; n < kCount<double>; ++n) total += v[n];
  return total;
}

inline Doubles sums_of(Doubles (&v)[kCount<double>]) {
  Doubles sums;
  for (int n = 0; n < kCount<double>; ++n) sums[n] = sum(v[n]);
  return sums;
}

inline double largest(Doubles v) {
  double most = v[0];
  for (int n = 1; n < kCount<double>; ++n) most = v[n] > most ? v[n] : most;
  return most;
}

// The second, if one of them is NaN.
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

}  // namespace
