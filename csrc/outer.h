// Sums of outer products, as the gradient of weights is one over frames:
//
//   out[m, n] += sum over k of a[k, m] * b[k, n]
//
// Both sides are packed into the panels of product.h, so that nothing is transposed. A sum is made in the order of k,
// whatever part of `out` a thread takes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "product.h"
#include "vector.h"

namespace las {

template <int W, class T>
LAS_INLINE Float<W> take(const T* p, int64_t lanes) {
  return lanes == W ? load<W>(p) : load_part<W>(p, lanes);
}

// One panel of columns `column` to column + columns of `count` rows; zeros where it has been padded.
template <int W, class T>
LAS_INLINE void pack_rows(const T* const* rows, int64_t count, int64_t column, int64_t columns, T* to) {
  constexpr int64_t N = NEIGHBOURS<T>;
  if (columns < COLUMNS || count % N) std::fill_n(to, padded(count, N) * COLUMNS, T(0.0f));
  for (int64_t k = 0; k < count; k += N, to += N * COLUMNS) {
    if (columns < COLUMNS || k + N > count) {
      for (int64_t n = 0; n < N && k + n < count; ++n)
        for (int64_t i = 0; i < columns; ++i) to[i * N + n] = rows[k + n][column + i];
      continue;
    }
    for (int64_t i = 0; i < COLUMNS; i += W) {
      if constexpr (N == 1) {
        store<W>(to + i, load<W>(rows[k] + column + i));
      } else {
        Short<W> even, odd;
        std::memcpy(&even, rows[k] + column + i, sizeof even);
        std::memcpy(&odd, rows[k + 1] + column + i, sizeof odd);
        const Bits<W> pairs = __builtin_convertvector(even, Bits<W>) | __builtin_convertvector(odd, Bits<W>) << 16;
        std::memcpy(to + 2 * i, &pairs, sizeof pairs);
      }
    }
  }
}

template <int W, int M>
LAS_INLINE void add_outer(const float* a, const float* b, int64_t depth, Float<W> (&sum)[M][2]) {
  for (int64_t k = 0; k < depth; ++k, a += COLUMNS, b += COLUMNS) {
    const Float<W> first = load<W>(b), second = load<W>(b + W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      sum[m][0] += a[m] * first;
      sum[m][1] += a[m] * second;
    }
  }
}

template <int W, int M>
LAS_INLINE void add_outer(const c10::BFloat16* a, const c10::BFloat16* b, int64_t depth, Float<W> (&sum)[M][2]) {
  for (int64_t k = 0; k < depth; k += 2, a += 2 * COLUMNS, b += 2 * COLUMNS) {
    Bits<W> pair[2];
    std::memcpy(pair, b, sizeof pair);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const Float<W> first = bits_as<Float<W>>(odd ? pair[0] & 0xFFFF0000u : pair[0] << 16);
      const Float<W> second = bits_as<Float<W>>(odd ? pair[1] & 0xFFFF0000u : pair[1] << 16);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float x = a[2 * m + odd];
        sum[m][0] += x * first;
        sum[m][1] += x * second;
      }
    }
  }
}

template <int W, int M, class T>
LAS_INLINE void outer_tile(const T* a, const T* b, int64_t depth, const Matrix<float>& out) {
  for (int64_t i = 0; i < COLUMNS; i += 2 * W) {
    Float<W> sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) sum[m][j] = load<W>(out.at(m) + i + j * W);
    add_outer<W, M>(a, b + i * NEIGHBOURS<T>, depth, sum);
    finish<W, M>(out, 0, i, sum);
  }
}

#ifdef LAS_BF16_DOTS
template <int M>
LAS_AVX512_BF16 void bf16_outer_tile(const c10::BFloat16* a, const c10::BFloat16* b, int64_t depth,
                                     const Matrix<float>& out) {
  __m512 sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sum[m][i] = _mm512_loadu_ps(out.at(m) + 16 * i);
  for (int64_t k = 0; k < depth; k += 2, a += 2 * COLUMNS, b += 2 * COLUMNS) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(b), second = (__m512bh)_mm512_loadu_si512(b + COLUMNS);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + 2 * m, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, first);
      sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, second);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) _mm512_storeu_ps(out.at(m) + 16 * i, sum[m][i]);
}
#endif

// Call tile(out, room) where `out` has whole panels of columns; else by way of a copy that has.
template <class Tile>
LAS_INLINE void with_whole_panels(const Matrix<float>& out, int64_t columns, const Tile& tile) {
  if (columns == COLUMNS) return tile(out);
  float copy[COLUMNS * COLUMNS] = {};
  const Matrix<float> whole{copy, COLUMNS, out.count};
  for (int64_t m = 0; m < out.count; ++m) std::copy_n(out.at(m), columns, whole.at(m));
  tile(whole);
  for (int64_t m = 0; m < out.count; ++m) std::copy_n(whole.at(m), columns, out.at(m));
}

// Add to `out`, which is as many rows as the panel `a` has columns, the products of that panel with all of b.
template <class T>
void add_outer_products(const T* a, const Panels<T>& b, const Matrix<float>& out) {
  const auto each = [&](auto most, auto tile) __attribute__((always_inline)) {
    for (int64_t panel = 0; panel < b.columns; panel += COLUMNS) {
      const Matrix<float> here{out.data + panel, out.stride, out.count};
      with_whole_panels(here, std::min(COLUMNS, b.columns - panel),
                        [&](const Matrix<float>& to) __attribute__((always_inline)) {
        each_tile<most>(to.count, [&](int64_t m, auto size) __attribute__((always_inline)) {
          tile(a + m * NEIGHBOURS<T>, b.at(panel), Matrix<float>{to.at(m), to.stride, size}, size);
        });
      });
    }
  };
#ifdef LAS_BF16_DOTS
  if constexpr (!std::is_same_v<T, float>) {
    if (has_bf16_dots()) {
      each(Width<TILE<16>>{}, [&](const T* from, const T* panel, const Matrix<float>& to, auto size) {
        bf16_outer_tile<size>(from, panel, b.depth, to);
      });
      return;
    }
  }
#endif
  widest([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    each(Width<TILE<W>>{}, [&](const T* from, const T* panel, const Matrix<float>& to, auto size)
                               __attribute__((always_inline)) { outer_tile<W, size>(from, panel, b.depth, to); });
  });
}

}  // namespace las
