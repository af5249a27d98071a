// The activations of the LSTM cells and of the readout: sigmoid, tanh and GELU, accurate to a few ulp.

#pragma once

#include <cstdint>

#include "softmax.h"
#include "vector.h"

namespace las {

// x clamped to [-limit, limit]. NaN stays NaN.
template <int W>
LAS_INLINE Float<W> clamp(Float<W> x, float limit) {
  const Float<W> upper = x > limit ? broadcast<W>(limit) : x;
  return upper < -limit ? broadcast<W>(-limit) : upper;
}

// 1 + exp(-x), the denominator of a sigmoid, with x clamped to [-limit, limit]; limit is at most 87. exp is computed as
// in vector.h, with a polynomial of degree 5 (minimax, relative error 9e-8).
template <int W>
LAS_INLINE Float<W> sigmoid_denominator(Float<W> x, float limit) {
  const float ROUND = 12582912.0f;  // 1.5 * 2^23
  const Float<W> clamped = clamp<W>(x, limit), shifted = clamped * -1.44269504f + ROUND, n = shifted - ROUND;
  const Float<W> r = (clamped + n * 0.693359375f) - n * 2.12194440e-4f;  // minus the remainder of -x
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
  return 1.0f / sigmoid_denominator<W>(x, 87.0f);
}

template <int W>
struct Ratio {
  Float<W> numerator, denominator;
};

// x P(x^2) / Q(x^2) with x clamped to [-limit, limit]. The coefficients of P and Q begin with the highest power.
template <int W, int N>
LAS_INLINE Ratio<W> odd_ratio(Float<W> x, float limit, const float (&numerator)[N], const float (&denominator)[N]) {
  const Float<W> clamped = clamp<W>(x, limit), square = clamped * clamped;
  Float<W> p = broadcast<W>(numerator[0]), q = broadcast<W>(denominator[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) {
    p = p * square + numerator[i];
    q = q * square + denominator[i];
  }
  return {p * clamped, q};
}

// tanh(x) as a ratio (minimax, relative error 2e-8 up to 9, beyond which it is 1). Rounding may make it exceed 1. The
// denominator is between 1 and 417.
template <int W>
LAS_INLINE Ratio<W> tanh_ratio(Float<W> x) {
  constexpr float P[] = {1.33549214e-8f, 2.06093097e-5f, 3.49560378e-3f, 1.33810395e-1f, 1.0f};
  constexpr float Q[] = {7.77667626e-7f, 3.28565910e-4f, 2.58770437e-2f, 4.67143551e-1f, 1.0f};
  return odd_ratio<W>(x, 9.0f, P, Q);
}

template <int W>
LAS_INLINE Float<W> tanh(Float<W> x) {
  const Ratio<W> ratio = tanh_ratio<W>(x);
  return clamp<W>(ratio.numerator / ratio.denominator, 1.0f);
}

// erf(x) as a ratio (minimax, relative error 2e-8 up to 3.92). From there on it is exactly 1, because GELU multiplies
// the difference by x.
template <int W>
LAS_INLINE Float<W> erf(Float<W> x) {
  constexpr float P[] = {2.05001585e-6f, 2.84864273e-4f, 3.76524015e-3f, 5.27475436e-2f, 1.90399056e-1f, 1.12837915f};
  constexpr float Q[] = {3.80900053e-5f, 1.16242518e-3f, 1.49684761e-2f, 1.14105866e-1f, 5.02069514e-1f, 1.0f};
  constexpr float LIMIT = 3.92f;
  const Ratio<W> ratio = odd_ratio<W>(x, LIMIT, P, Q);
  const Float<W> inside = clamp<W>(ratio.numerator / ratio.denominator, 1.0f);
  const Float<W> upper = x >= LIMIT ? broadcast<W>(1.0f) : inside;
  return x <= -LIMIT ? broadcast<W>(-1.0f) : upper;
}

template <int W>
LAS_INLINE Float<W> gelu(Float<W> x) {
  return 0.5f * x * (1.0f + erf<W>(0.707106781f * x));
}

// The derivative of gelu: the cumulative distribution function of the standard normal, plus x times its density.
template <int W>
LAS_INLINE Float<W> gelu_derivative(Float<W> x) {
  const Float<W> density = 0.398942280f * las::exp<W>(-0.5f * x * x);
  return 0.5f * (1.0f + erf<W>(0.707106781f * x)) + x * density;
}

}  // namespace las
