// Products of some rows with weights that were packed beforehand.
//
//   out[m, n] = start[m][n] + sum over k of rows[m, k] * weights[n, k]
//
// Weights lie in panels of 32 columns n, which a tile of rows, its sums in registers, reads from front to end. A sum is
// made in the order of k, whatever rows stand beside it: a row has one result alone and in any company.
//
// Weights and rows are float32 or bfloat16, sums float32. Panels of bfloat16 hold two neighbours in k side by side, as
// the processor's dot product takes them; where it has none, they are widened in registers: that still reads half.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memory.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define LAS_BF16_DOTS
#endif

namespace las {

// Neighbours in k that lie side by side, and so the multiple that the depth of rows and panels is padded to.
template <class T>
constexpr int64_t NEIGHBOURS = std::is_same_v<T, float> ? 1 : 2;

// Weights (columns, depth) as [panel][k / NEIGHBOURS][column][k % NEIGHBOURS]; zeros where they have been padded.
template <class T>
struct Panels {
  const T* data;
  int64_t columns, depth;

  const T* at(int64_t column) const { return data + column * depth; }
};

// The columns of one panel as rows: so two packed matrices make the product A^T B, as a weight's gradient is.
template <class T>
struct PanelRows {
  const T* data;
  int64_t count;

  const T* at(int64_t row, int64_t k) const { return data + k * COLUMNS + row * NEIGHBOURS<T>; }
};

// The rows of a tile at the k that is their turn. One pointer serves three rows, by the processor's own addressing: with
// one for each, or one and its multiples of the stride, there are too few registers and every load waits for sums of
// addresses (up to 5% of a tile's time). GCC makes them so again where it sees what the pointers are.
template <int M, class T>
struct Turn {
  static constexpr int EACH = 3, COUNT = (M + EACH - 1) / EACH;

  LAS_INLINE Turn(const T* rows, int64_t stride) : stride(stride) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) at[i] = rows + i * EACH * stride;
  }
  LAS_INLINE const T* operator[](int m) const { return at[m / EACH] + m % EACH * stride; }
  LAS_INLINE void pass(int64_t n) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      at[i] += n;
      asm("" : "+r"(at[i]));
    }
  }

  int64_t stride;
  const T* at[COUNT];
};

// The same of a panel's columns, whose distances are known.
template <int M, class T>
struct PanelTurn {
  LAS_INLINE const T* operator[](int m) const { return at + m * NEIGHBOURS<T>; }
  LAS_INLINE void pass(int64_t n) { at += n * COLUMNS; }

  const T* at;
};

template <int M, class T>
LAS_INLINE Turn<M, T> turn(const Matrix<T>& rows, int64_t row) {
  return {rows.at(row), rows.stride};
}

template <int M, class T>
LAS_INLINE PanelTurn<M, T> turn(const PanelRows<T>& rows, int64_t row) {
  return {rows.at(row, 0)};
}

// Where the sums of each row start: as many values as there are columns, padded to whole panels; null: at 0.
using Starts = const float* const*;

// Rows whose sums, of two vectors each, fit in the registers.
template <int W>
constexpr int TILE = W == 16 ? 12 : 6;

template <int M, class Tile>
LAS_INLINE void of_size(int64_t size, int64_t row, const Tile& tile) {
  if (size == M) return tile(row, Width<M>{});
  if constexpr (M > 1) of_size<M - 1>(size, row, tile);
}

// Call tile(row, Width<M>{}) for tiles of M rows, at most MOST, that are as equal as can be: a small one would wait for
// its own sums. The larger ones come first.
template <int MOST, class Tile>
LAS_INLINE void each_tile(int64_t rows, const Tile& tile) {
  const int64_t tiles = (rows + MOST - 1) / MOST, size = tiles ? rows / tiles : 0, larger = rows - tiles * size;
  int64_t row = 0;
  for (int64_t i = 0; i < larger; ++i, row += size + 1) of_size<MOST>(size + 1, row, tile);
  for (; row < rows; row += size) of_size<MOST>(size, row, tile);
}

// Bring the cache line near that will be read soon; any address will do.
LAS_INLINE void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Bytes of the next panel, while this one is at work: it comes from afar, and the first tile would wait.
template <int M>
LAS_INLINE void fetch_ahead(const void* next, int64_t bytes) {
  if constexpr (M >= 4)
    for (int64_t i = 0; i < bytes; i += 64) fetch(static_cast<const char*>(next) + i);
}

template <int W, int M>
LAS_INLINE void start(Starts starts, int64_t row, int64_t column, Float<W> (&sum)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sum[m][i] = starts ? load<W>(starts[row + m] + column + i * W) : Float<W>{};
}

template <int W, int M>
LAS_INLINE void finish(const Matrix<float>& out, int64_t row, int64_t column, const Float<W> (&sum)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) store<W>(out.at(row + m) + column + i * W, sum[m][i]);
}

template <int W, int M, class Rows>
LAS_INLINE void add(const Rows& rows, int64_t row, const float* panel, int64_t depth,
                    Float<W> (&sum)[M][2]) {
  auto here = turn<M>(rows, row);
  for (int64_t k = 0; k < depth; ++k, here.pass(1)) {
    fetch_ahead<M>(panel + (k + depth) * COLUMNS, 8 * W);
    const Float<W> first = load<W>(panel + k * COLUMNS), second = load<W>(panel + k * COLUMNS + W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float x = *here[m];
      sum[m][0] += x * first;
      sum[m][1] += x * second;
    }
  }
}

template <int W, int M, class Rows>
LAS_INLINE void add(const Rows& rows, int64_t row, const c10::BFloat16* panel, int64_t depth,
                    Float<W> (&sum)[M][2]) {
  auto here = turn<M>(rows, row);
  for (int64_t k = 0; k < depth; k += 2, here.pass(2)) {
    Bits<W> pair[2];
    std::memcpy(pair, panel + k * COLUMNS, sizeof pair);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const Float<W> first = bits_as<Float<W>>(odd ? pair[0] & 0xFFFF0000u : pair[0] << 16);
      const Float<W> second = bits_as<Float<W>>(odd ? pair[1] & 0xFFFF0000u : pair[1] << 16);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float x = here[m][odd];
        sum[m][0] += x * first;
        sum[m][1] += x * second;
      }
    }
  }
}

template <int W, int M, class Rows, class T>
LAS_INLINE void tile(const Rows& rows, int64_t row, const Panels<T>& weights, int64_t panel, Starts starts,
                     const Matrix<float>& out) {
  for (int64_t i = 0; i < COLUMNS; i += 2 * W) {
    Float<W> sum[M][2];
    start<W, M>(starts, row, panel + i, sum);
    add<W, M>(rows, row, weights.at(panel) + i * NEIGHBOURS<T>, weights.depth, sum);
    finish<W, M>(out, row, panel + i, sum);
  }
}

#ifdef LAS_BF16_DOTS
#define LAS_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

inline bool has_bf16_dots() { return most_lanes >= 16 && __builtin_cpu_supports("avx512bf16"); }

template <int M, class Rows>
LAS_AVX512_BF16 void bf16_tile(const Rows& rows, int64_t row, const c10::BFloat16* panel,
                               int64_t depth, Starts starts, int64_t column, const Matrix<float>& out) {
  __m512 sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sum[m][i] = starts ? _mm512_loadu_ps(starts[row + m] + column + 16 * i) : _mm512_setzero_ps();
  auto here = turn<M>(rows, row);
  for (int64_t k = 0; k < depth; k += 2, here.pass(2)) {
    fetch_ahead<M>(panel + (k + depth) * COLUMNS, 128);
    const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + k * COLUMNS);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + k * COLUMNS + 32);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, here[m], sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, first);
      sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, second);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) _mm512_storeu_ps(out.at(row + m) + column + 16 * i, sum[m][i]);
}
#endif

// out must have room for whole panels in each row; rows, a Matrix or PanelRows, are as deep as the panels.
template <class Rows, class T>
void product(const Rows& rows, const Panels<T>& weights, Starts starts, const Matrix<float>& out) {
#ifdef LAS_BF16_DOTS
  if constexpr (!std::is_same_v<T, float>) {
    if (has_bf16_dots()) {
      for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
        each_tile<TILE<16>>(rows.count, [&](int64_t row, auto size) {
          bf16_tile<size>(rows, row, weights.at(panel), weights.depth, starts, panel, out);
        });
      return;
    }
  }
#endif
  widest([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
      each_tile<TILE<W>>(rows.count, [&](int64_t row, auto size) __attribute__((always_inline)) {
        tile<W, size>(rows, row, weights, panel, starts, out);
      });
  });
}

// Rows of a weight's gradient: out = outputs^T inputs, added to what is there if there is `more`.
template <class T>
void transposed_product(const PanelRows<T>& outputs, const Panels<T>& inputs, bool more, const Matrix<float>& out) {
  const float* starts[COLUMNS];
  for (int64_t i = 0; i < outputs.count; ++i) starts[i] = out.at(i);
  product(outputs, inputs, more ? starts : nullptr, out);
}

}  // namespace las
