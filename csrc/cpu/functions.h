// Elementary functions of vectors. NaN in, NaN out.
#pragma once

#include "vector.h"

namespace {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// fraction * 2^whole, 0 far below what floats hold. `whole` is between -160 and 127.
inline Floats scaled(Floats fraction, Floats whole) {
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)fraction, (__m512)whole);
#else
  Ints const vanishes = whole < -126.0f;
  Words const power = (Words)((__builtin_convertvector(whole, Ints) + 127) << 23);
  return vanishes ? Floats{} : fraction * as_floats(power);  // a product, so that NaN stays NaN
#endif
}

inline Doubles scaled(Doubles fraction, Doubles whole) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_scalef_pd((__m512d)fraction, (__m512d)whole);
#else
  Longs const vanishes = whole < -1022.0;
  Doubles const shifted = whole + 6755399441055744.0;  // 1.5 * 2^52: the number itself in the lowest bits
  Longs const power = ((Longs)shifted + 1023) << 52;
  return vanishes ? Doubles{} : fraction * (Doubles)power;
#endif
}

// 2^x for x <= 100, -inf included; the polynomial is of degree 6 (2e-9) or 4 (3e-6, enough for weights in bf16).
// Both are exact at 0, so that the largest score weighs 1.
template <int DEGREE>
inline Floats power_of_2(Floats x) {
  Floats const magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  x = larger(broadcast(-160.0f), x);
  Floats const whole = (x + magic) - magic, r = x - whole;
  Floats p;
  if (DEGREE == 4) {
    p = 9.582843376368218e-3f * r + 5.590642563318595e-2f;
    p = p * r + 2.402409877774328e-1f;
    p = p * r + 6.931241933669637e-1f;
    p = p * r + 1.0f;
  } else {
    p = 1.5345811985865076e-4f * r + 1.3399931218777774e-3f;
    p = p * r + 9.618488957166292e-3f;
    p = p * r + 5.5503287769660896e-2f;
    p = p * r + 2.4022646890633623e-1f;
    p = p * r + 6.931472057372678e-1f;
    p = p * r + 1.0f;
  }
  return scaled(p, whole);
}

// By the Taylor polynomial of e^(r ln 2), whose next term is below 4e-18.
template <int DEGREE>
inline Doubles power_of_2(Doubles x) {
  Doubles const magic = broadcast(6755399441055744.0);
  x = larger(broadcast(-1100.0), x);
  Doubles const whole = (x + magic) - magic, r = (x - whole) * kLn2;
  constexpr double kInverse[] = {1,      1,      1. / 2, 1. / 3,  1. / 4,  1. / 5,  1. / 6,
                                 1. / 7, 1. / 8, 1. / 9, 1. / 10, 1. / 11, 1. / 12, 1. / 13};
  Doubles p = broadcast(1.0);
  for (int n = 13; n > 0; --n) p = p * (r * kInverse[n]) + 1.0;
  return scaled(p, whole);
}

// The natural logarithm of positive normal numbers: the polynomial of Cephes' logf (Moshier, netlib.org/cephes).
inline Floats natural_log(Floats x) {
  Words const bits = (Words)x;  // unsigned: lanes that nobody reads may hold anything
  Ints const exponent = (Ints)(bits - 0x3f3504f3u) >> 23;  // so that the rest is in [sqrt(1/2), sqrt(2))
  Floats const e = __builtin_convertvector(exponent, Floats), r = (Floats)(bits - ((Words)exponent << 23)) - 1.0f;
  Floats p = 7.0376836292e-2f * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  Floats const square = r * r;
  Floats const found = (p * r * square - 0.5f * square + -2.12194440e-4f * e) + r + 0.693359375f * e;
  return x == x ? found : x;
}

inline Doubles natural_log(Doubles x) {
  for (int n = 0; n < kCount<double>; ++n) x[n] = __builtin_log(x[n]);
  return x;
}

// tanh; near 0 by the polynomial of Cephes' tanhf, since 1 - 2 / (e^2x + 1) cancels there.
inline Floats hyperbolic_tangent(Floats x) {
  Floats const square = x * x, magnitude = (Floats)((Ints)x & 0x7fffffff);
  Floats p = -5.70498872745e-3f * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  Floats const near = p * square * x + x;
  Floats const e = power_of_2<6>((magnitude < 10.0f ? magnitude : x == x ? broadcast(10.0f) : x) * float(2 * kLog2E));
  Floats const far = 1.0f - 2.0f / (e + 1.0f);
  Floats const signed_far = (Floats)((Ints)far | ((Ints)x & int32(0x80000000)));
  return magnitude < 0.625f ? near : signed_far;
}

inline Doubles hyperbolic_tangent(Doubles x) {
  for (int n = 0; n < kCount<double>; ++n) x[n] = __builtin_tanh(x[n]);
  return x;
}

}  // namespace
