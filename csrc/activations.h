// The activations of the LSTM cells and of the output layer: sigmoid, tanh and GELU, accurate to a few ulp.

#pragma once

#include <cstdint>

#include "softmax.h"
#include "vector.h"

namespace las {

// x, but no further from 0 than `most`; NaN stays NaN.
template <int W>
LAS_INLINE Float<W> within(Float<W> x, float most) {
  const Float<W> upper = x > most ? broadcast<W>(most) : x;
  return upper < -most ? broadcast<W>(-most) : upper;
}

// 1 + exp(-x), what a sigmoid divides 1 by, for x within `most`, at most 87: exp as in vector.h, with a polynomial of
// degree 5 (minimax, relative error 9e-8).
template <int W>
LAS_INLINE Float<W> sigmoid_divisor(Float<W> x, float most) {
  const float ROUND = 12582912.0f;  // 1.5 * 2^23
  const Float<W> inside = within<W>(x, most), shifted = inside * -1.44269504f + ROUND, n = shifted - ROUND;
  const Float<W> r = (inside + n * 0.693359375f) - n * 2.12194440e-4f;  // less the remainder of -x
  Float<W> p = broadcast<W>(-8.29030587e-3f);
  p = p * r + 4.18979755e-2f;
  p = p * r - 1.66676366e-1f;
  p = p * r + 4.99991492e-1f;
  p = p * r - 9.99999707e-1f;
  p = p * r + 1.0f;
  return 1.0f + p * bits_as<Float<W>>((bits_as<Bits<W>>(shifted) << 23) + 0x3F800000u);
}

// 1 / (1 + exp(-x))
template <int W>
LAS_INLINE Float<W> sigmoid(Float<W> x) {
  return 1.0f / sigmoid_divisor<W>(x, 87.0f);
}

template <int W>
struct Ratio {
  Float<W> above, below;
};

// x P(x^2) / Q(x^2) for x within `most`; coefficients from the highest power on.
template <int W, int N>
LAS_INLINE Ratio<W> odd_ratio(Float<W> x, float most, const float (&above)[N], const float (&below)[N]) {
  const Float<W> inside = within<W>(x, most), square = inside * inside;
  Float<W> p = broadcast<W>(above[0]), q = broadcast<W>(below[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) {
    p = p * square + above[i];
    q = q * square + below[i];
  }
  return {p * inside, q};
}

// tanh (minimax, relative error 2e-8 up to 9, where it is 1) but for rounding, which may lead past 1; `below` is from 1
// to 417.
template <int W>
LAS_INLINE Ratio<W> tanh_ratio(Float<W> x) {
  constexpr float above[] = {1.33549214e-8f, 2.06093097e-5f, 3.49560378e-3f, 1.33810395e-1f, 1.0f};
  constexpr float below[] = {7.77667626e-7f, 3.28565910e-4f, 2.58770437e-2f, 4.67143551e-1f, 1.0f};
  return odd_ratio<W>(x, 9.0f, above, below);
}

template <int W>
LAS_INLINE Float<W> tanh(Float<W> x) {
  const Ratio<W> found = tanh_ratio<W>(x);
  return within<W>(found.above / found.below, 1.0f);
}

// To a relative error of 2e-8 (minimax) up to 3.92, where it is 1: exactly, since GELU multiplies the rest by x.
template <int W>
LAS_INLINE Float<W> erf(Float<W> x) {
  constexpr float above[] = {2.05001585e-6f, 2.84864273e-4f, 3.76524015e-3f, 5.27475436e-2f, 1.90399056e-1f, 1.12837915f};
  constexpr float below[] = {3.80900053e-5f, 1.16242518e-3f, 1.49684761e-2f, 1.14105866e-1f, 5.02069514e-1f, 1.0f};
  constexpr float MOST = 3.92f;
  const Ratio<W> found = odd_ratio<W>(x, MOST, above, below);
  const Float<W> inner = within<W>(found.above / found.below, 1.0f), positive = x >= MOST ? broadcast<W>(1.0f) : inner;
  return x <= -MOST ? broadcast<W>(-1.0f) : positive;
}

template <int W>
LAS_INLINE Float<W> gelu(Float<W> x) {
  return 0.5f * x * (1.0f + erf<W>(0.707106781f * x));
}

// The derivative of gelu: the normal distribution function, and x times its density.
template <int W>
LAS_INLINE Float<W> gelu_slope(Float<W> x) {
  const Float<W> density = 0.398942280f * las::exp<W>(-0.5f * x * x);
  return 0.5f * (1.0f + erf<W>(0.707106781f * x)) + x * density;
}

}  // namespace las
