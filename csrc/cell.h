// What an LSTM cell and the output layer do with the sums of their products: sigmoid, tanh and GELU, to some ulp.

#pragma once

#include <cstdint>

#include "softmax.h"
#include "vector.h"

namespace las {

template <int W>
LAS_INLINE Float<W> magnitude(Float<W> x) {
  return bits_as<Float<W>>(bits_as<Bits<W>>(x) & 0x7FFFFFFFu);
}

template <int W>
LAS_INLINE Float<W> with_sign_of(Float<W> size, Float<W> x) {
  return bits_as<Float<W>>(bits_as<Bits<W>>(size) | (bits_as<Bits<W>>(x) & 0x80000000u));
}

// 1 / (1 + exp(-x))
template <int W>
LAS_INLINE Float<W> sigmoid(Float<W> x) {
  const Float<W> power = las::exp<W>(-magnitude<W>(x));  // exp takes no positive number
  return (x < 0.0f ? power : broadcast<W>(1.0f)) / (1.0f + power);
}

template <int W>
LAS_INLINE Float<W> tanh(Float<W> x) {
  const Float<W> size = magnitude<W>(x), power = las::exp<W>(-2.0f * size);
  const Float<W> large = with_sign_of<W>((1.0f - power) / (1.0f + power), x);
  const Float<W> square = x * x;  // below 5/8 the difference above would lose digits: a polynomial (Cephes)
  Float<W> p = broadcast<W>(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return size > 0.625f ? large : p * square * x + x;
}

// By two polynomials, the outer one in an exponent (N. Juffa).
template <int W>
LAS_INLINE Float<W> erf(Float<W> x) {
  const Float<W> size = magnitude<W>(x), square = x * x;
  Float<W> outer = -1.72853470e-5f * size + 3.83197126e-4f;
  outer = outer * square + (-3.88396438e-3f * size + 2.42546219e-2f);
  outer = outer * size - 1.06777877e-1f;
  outer = outer * size - 6.34846687e-1f;
  outer = outer * size - 1.28717512e-1f;
  outer = with_sign_of<W>(1.0f - las::exp<W>(outer * size - size), x);
  Float<W> inner = broadcast<W>(-5.96761703e-4f);
  inner = inner * square + 4.99119423e-3f;
  inner = inner * square - 2.67681349e-2f;
  inner = inner * square + 1.12819925e-1f;
  inner = inner * square - 3.76125336e-1f;
  inner = inner * square + 1.28379166e-1f;
  return size > 0.927734375f ? outer : inner * x + x;
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

// The state of a cell after a step, of `size` values each. gate(i, j, lanes) gives `lanes` values from j on of gate i:
// input, forget, cell or output.
template <int W, class Gate>
LAS_INLINE void lstm(int64_t size, const float* cell_before, float* cell, float* hidden, Gate gate) {
  each_vector<W>(size, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> kept = sigmoid<W>(gate(1, j, lanes)) * get<W>(cell_before + j, lanes, 0.0f);
    const Float<W> now = kept + sigmoid<W>(gate(0, j, lanes)) * tanh<W>(gate(2, j, lanes));
    put<W>(cell + j, now, lanes);
    put<W>(hidden + j, sigmoid<W>(gate(3, j, lanes)) * tanh<W>(now), lanes);
  });
}

}  // namespace las
