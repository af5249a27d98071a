// Loops over the vectors of a row of any length, and the softmax of a row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace las {

// Call step(t, lanes) for each vector of a row of n values: `lanes` values from t on, W or fewer at the end.
template <int W, class Step>
LAS_INLINE void for_each_vector(int64_t n, Step step) {
  int64_t t = 0;
  for (; t + W <= n; t += W) step(t, W);
  if (t < n) step(t, n - t);
}

// The sum of value(t, lanes) over the vectors of a row of n values. Blocks are summed first: shorter sums lose less
// precision.
template <int W, class Value>
LAS_INLINE float sum_row(int64_t n, Value value) {
  constexpr int64_t BLOCK = 32 * W;
  Float<W> sum = {};
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    Float<W> block = {};
    for_each_vector<W>(std::min(BLOCK, n - begin), [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
      block += value(begin + t, lanes);
    });
    sum += block;
  }
  return las::sum<W>(sum);
}

struct SoftmaxSummary {
  int64_t peak = 0;                           // index of the largest weight; of equal ones, the first
  float maximum = -INFINITE, log_sum = 0.0f;  // largest score; log of the sum of exp(score - maximum)

  float logsumexp() const { return maximum + log_sum; }
};

// Replace n scores by their softmax.
template <int W>
LAS_INLINE SoftmaxSummary softmax(float* x, int64_t n) {
  if (n == 0) return {};
  Float<W> maxima = broadcast<W>(-INFINITE);
  for_each_vector<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    maxima = max<W>(maxima, load<W>(x + t, lanes, -INFINITE));
  });
  const float maximum = largest<W>(maxima);
  const float denominator = sum_row<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> numerator = exp<W>(load<W>(x + t, lanes, -INFINITE) - maximum);
    store<W>(x + t, numerator, lanes);
    return numerator;
  });
  // Find the peak of the weights, not of the scores: scores that differ in the last bit can have equal weights.
  const float factor = 1.0f / denominator;
  Float<W> peaks = broadcast<W>(-1.0f);
  Int<W> indices = {};
  for_each_vector<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> weight = load<W>(x + t, lanes) * factor;
    indices = weight > peaks ? lane_numbers<W>() + int32_t(t) : indices;
    peaks = max<W>(peaks, weight);
    store<W>(x + t, weight, lanes);
  });
  int top = 0;  // the lane with the largest weight; of equal ones, the first in the row
  for (int i = 1; i < W; ++i)
    if (peaks[i] > peaks[top] || (peaks[i] == peaks[top] && indices[i] < indices[top])) top = i;
  return {indices[top], maximum, std::log(denominator)};
}

}  // namespace las
