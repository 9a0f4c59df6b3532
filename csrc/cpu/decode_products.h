// How queries and keys are multiplied, and weights and values, by what the cache stores.
#pragma once

#include "functions.h"

namespace {

using namespace fa::cpu;

// In floats. One read gives one vector; of bf16 two, the lower and the upper halves of words of 32 bits, which takes one
// instruction each. Queries and sums lie in the order of reads.
template <class Stored>
struct Spread {
  using T = Stored;
  static constexpr bool kIsPaired = false;
  static constexpr int kVectors = 1, kStep = kLanes;  // of one read: vectors, and numbers

  static int column(int, int lane) { return lane; }
  static void read(T const* p, Floats (&to)[1]) { to[0] = load(p); }
  static void read_values(T const* const* v, int c, Floats (&to)[1]) { read(v[0] + c, to); }
  static Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }
};

template <>
struct Spread<Bfloat16> {
  using T = Bfloat16;
  static constexpr bool kIsPaired = false;
  static constexpr int kVectors = 2, kStep = 2 * kLanes;

  static int column(int x, int lane) { return 2 * lane + x; }
  static void read(T const* p, Floats (&to)[2]) {
    Words const pairs = loaded<Words>(p);
    to[0] = as_floats(pairs << 16);
    to[1] = as_floats(pairs & 0xffff0000u);
  }
  static void read_values(T const* const* v, int c, Floats (&to)[2]) { read(v[0] + c, to); }
  static Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
// In pairs of bf16 that are added up in floats: neighbours along the head dim for scores, two keys for sums of values.
// The processor takes subnormal numbers for 0 here.
struct Paired {
  using T = Bfloat16;
  static constexpr bool kIsPaired = true;
  static constexpr int kVectors = 2, kStep = 2 * kLanes;

  static int column(int x, int lane) { return lane / 4 * 8 + x * 4 + lane % 4; }
  // Rounded numbers of x, then of y.
  static Floats joined(Floats x, Floats y) { return (Floats)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }
  static void read_values(T const* const* v, int c, Floats (&to)[2]) {
    __m512i const a = loaded<__m512i>(v[0] + c), b = loaded<__m512i>(v[1] + c);
    to[0] = (Floats)_mm512_unpacklo_epi16(a, b);
    to[1] = (Floats)_mm512_unpackhi_epi16(a, b);
  }
  static Floats multiply_add(Floats a, Floats b, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

[[maybe_unused]] bool is_paired(Params const& p) { return p.dtype == kBfloat16 && p.cache_dtype == kBfloat16; }

template <class Product>
constexpr int kTogether = Product::kIsPaired ? 2 : 1;  // keys whose weights are one word

// Rows of which `count` numbers are left, as copies with zeros behind them.
template <class T, int ROWS, int STEP>
struct Ends {
  T rows[ROWS][STEP] = {};
  T const* at[ROWS];

  Ends(T const* const* from, int64 c, int64 count) {
    for (int n = 0; n < ROWS; ++n) {
      __builtin_memcpy(rows[n], from[n] + c, count * sizeof(T));
      at[n] = rows[n];
    }
  }
};

// A row of padded(dim) floats from the order of reads to that of the head dim, and back.
template <class Product>
inline void put_in_order(float const* from, int64 width, float* to) {
  for (int64 c = 0; c < width; c += Product::kStep)
    for (int x = 0; x < Product::kVectors; ++x)
      for (int n = 0; n < kLanes; ++n) to[c + Product::column(x, n)] = from[c + x * kLanes + n];
}

template <class Product>
inline void put_as_read(float const* from, int64 width, float* to) {
  for (int64 c = 0; c < width; c += Product::kStep)
    for (int x = 0; x < Product::kVectors; ++x)
      for (int n = 0; n < kLanes; ++n) to[c + x * kLanes + n] = from[c + Product::column(x, n)];
}

}  // namespace
