// Loops over rows of any length, and the softmax of a row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace las {

// Call step(t, lanes) for every vector of n values. lanes is W, or less for a last vector that is not whole.
template <int W, class Step>
LAS_INLINE void each_vector(int64_t n, Step step) {
  int64_t t = 0;
  for (; t + W <= n; t += W) step(t, W);
  if (t < n) step(t, n - t);
}

template <int W, class T>
LAS_INLINE Float<W> get(const T* p, int64_t lanes, float fill) {
  return lanes == W ? load<W>(p) : load_part<W>(p, lanes, fill);
}

template <int W, class T>
LAS_INLINE void put(T* p, Float<W> x, int64_t lanes) {
  if (lanes == W) store<W>(p, x);
  else store_part<W>(p, x, lanes);
}

// The sum of value(t, lanes) over every vector of n values, in blocks: shorter sums lose less precision.
template <int W, class Value>
LAS_INLINE float total(int64_t n, Value value) {
  constexpr int64_t BLOCK = 32 * W;
  Float<W> sum = {};
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    Float<W> block = {};
    each_vector<W>(std::min(BLOCK, n - begin), [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
      block += value(begin + t, lanes);
    });
    sum += block;
  }
  return las::sum<W>(sum);
}

struct SoftmaxSummary {
  int64_t peak = 0;
  float maximum = -INFINITE, log_sum = 0.0f;  // log_sum: log of the sum of exp(score - maximum)

  float logsumexp() const { return maximum + log_sum; }
};

// Turn n scores into weights, in place.
template <int W>
LAS_INLINE SoftmaxSummary softmax(float* x, int64_t n) {
  if (n == 0) return {};
  Float<W> most = broadcast<W>(-INFINITE);
  each_vector<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    most = max<W>(most, get<W>(x + t, lanes, -INFINITE));
  });
  const float maximum = largest<W>(most);
  const float denominator = total<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> power = exp<W>(get<W>(x + t, lanes, -INFINITE) - maximum);
    put<W>(x + t, power, lanes);
    return power;
  });
  // Search the peak among the weights: scores that differ in the last bit can have equal weights.
  const float factor = 1.0f / denominator;
  Float<W> best = broadcast<W>(-1.0f);
  Int<W> where = {}, lane = {};
  for (int i = 0; i < W; ++i) lane[i] = i;
  each_vector<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> weight = get<W>(x + t, lanes, 0.0f) * factor;
    where = weight > best ? lane + int32_t(t) : where;
    best = max<W>(best, weight);
    put<W>(x + t, weight, lanes);
  });
  int peak = 0;  // the lane of the largest weight, of equal ones the first
  for (int i = 1; i < W; ++i)
    if (best[i] > best[peak] || (best[i] == best[peak] && where[i] < where[peak])) peak = i;
  return {where[peak], maximum, std::log(denominator)};
}

}  // namespace las
