// Matrix products of some rows with weights that were packed beforehand:
//
//   out[m, n] = initial[m][n] + sum over k of rows[m, k] * weights[n, k]
//
// Weights lie in panels of 32 columns n. A tile of rows keeps its sums in registers and reads a panel from front to
// end. Each sum is made in the order of k, whatever the other rows are: a row has one result, alone and in any batch.
//
// Weights and rows are float32 or bfloat16, sums float32. Panels of bfloat16 interleave pairs in k, as the processor's
// dot product takes them. A processor without that instruction widens them in registers, and still reads half as much.

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

// How many values of k lie side by side in a panel. The depth of rows and panels is padded to a multiple of it.
template <class T>
constexpr int64_t DEPTH_INTERLEAVE = std::is_same_v<T, float> ? 1 : 2;

// Weights (columns, depth), padded with zeros, as [panel][k / DEPTH_INTERLEAVE][column][k % DEPTH_INTERLEAVE].
template <class T>
struct Panels {
  const T* data;
  int64_t columns, depth;

  const T* at(int64_t column) const { return data + column * depth; }
};

// The columns of one panel, taken as rows: two packed matrices give A^T B, as the gradient of a weight needs it.
template <class T>
struct PanelRows {
  const T* data;
  int64_t count;

  const T* at(int64_t row, int64_t k) const { return data + k * COLUMNS + row * DEPTH_INTERLEAVE<T>; }
};

// A cursor over the rows of a tile, at depth k. One pointer serves three rows through the processor's addressing modes:
// one per row, or one and multiples of the stride, takes too many registers, and every load waits for sums of addresses
// (up to 5% of a tile's time). The empty asm hides the pointers, or GCC undoes this.
template <int M, class T>
struct RowCursor {
  static constexpr int EACH = 3, COUNT = (M + EACH - 1) / EACH;

  LAS_INLINE RowCursor(const T* rows, int64_t stride) : stride(stride) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) at[i] = rows + i * EACH * stride;
  }
  LAS_INLINE const T* operator[](int m) const { return at[m / EACH] + m % EACH * stride; }
  LAS_INLINE void advance(int64_t n) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      at[i] += n;
      asm("" : "+r"(at[i]));
    }
  }

  int64_t stride;
  const T* at[COUNT];
};

// The same over columns of a panel, whose distances are constants.
template <int M, class T>
struct PanelCursor {
  LAS_INLINE const T* operator[](int m) const { return at + m * DEPTH_INTERLEAVE<T>; }
  LAS_INLINE void advance(int64_t n) { at += n * COLUMNS; }

  const T* at;
};

template <int M, class T>
LAS_INLINE RowCursor<M, T> cursor(const Matrix<T>& rows, int64_t row) {
  return {rows.at(row), rows.stride};
}

template <int M, class T>
LAS_INLINE PanelCursor<M, T> cursor(const PanelRows<T>& rows, int64_t row) {
  return {rows.at(row, 0)};
}

// What the sums of each row begin with: (padded columns,) per row; null: 0.
using InitialSums = const float* const*;

// Rows of a tile: their sums, of two vectors each, fit in the registers.
template <int W>
constexpr int TILE = W == 16 ? 12 : 6;

template <int M, class Tile>
LAS_INLINE void of_size(int64_t size, int64_t row, const Tile& tile) {
  if (size == M) return tile(row, Width<M>{});
  if constexpr (M > 1) of_size<M - 1>(size, row, tile);
}

// Call tile(row, Width<M>{}) for tiles of M rows, at most MAX_ROWS. Their sizes differ by 1 at most: a small tile would
// wait for its own sums. The bigger ones come first.
template <int MAX_ROWS, class Tile>
LAS_INLINE void each_tile(int64_t rows, const Tile& tile) {
  const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, size = tiles ? rows / tiles : 0, bigger = rows - tiles * size;
  int64_t row = 0;
  for (int64_t i = 0; i < bigger; ++i, row += size + 1) of_size<MAX_ROWS>(size + 1, row, tile);
  for (; row < rows; row += size) of_size<MAX_ROWS>(size, row, tile);
}

// Prefetch a cache line. Any address is allowed.
LAS_INLINE void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Prefetch bytes of the next panel while this one is used: it comes from memory, and its first tile would wait.
template <int M>
LAS_INLINE void fetch_ahead(const void* next, int64_t bytes) {
  if constexpr (M >= 4)
    for (int64_t i = 0; i < bytes; i += 64) fetch(static_cast<const char*>(next) + i);
}

// Set the sums of a tile, (M, 2 * W) from `column` on.
template <int W, int M>
LAS_INLINE void load_initial(InitialSums initial, int64_t row, int64_t column, Float<W> (&sum)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sum[m][i] = initial ? load<W>(initial[row + m] + column + i * W) : Float<W>{};
}

// Write the sums of a tile to out (rows, columns).
template <int W, int M>
LAS_INLINE void store_sums(const Matrix<float>& out, int64_t row, int64_t column, const Float<W> (&sum)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) store<W>(out.at(row + m) + column + i * W, sum[m][i]);
}

// Add the product of M rows and 2 * W columns of a panel to the sums.
template <int W, int M, class RowSource>
LAS_INLINE void add(const RowSource& rows, int64_t row, const float* panel, int64_t depth, Float<W> (&sum)[M][2]) {
  auto position = cursor<M>(rows, row);
  for (int64_t k = 0; k < depth; ++k, position.advance(1)) {
    fetch_ahead<M>(panel + (k + depth) * COLUMNS, 8 * W);
    const Float<W> first = load<W>(panel + k * COLUMNS), second = load<W>(panel + k * COLUMNS + W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float x = *position[m];
      sum[m][0] += x * first;
      sum[m][1] += x * second;
    }
  }
}

template <int W, int M, class RowSource>
LAS_INLINE void add(const RowSource& rows, int64_t row, const c10::BFloat16* panel, int64_t depth,
                    Float<W> (&sum)[M][2]) {
  auto position = cursor<M>(rows, row);
  for (int64_t k = 0; k < depth; k += 2, position.advance(2)) {
    Bits<W> pair[2];
    std::memcpy(pair, panel + k * COLUMNS, sizeof pair);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const Float<W> first = bits_as<Float<W>>(odd ? pair[0] & 0xFFFF0000u : pair[0] << 16);
      const Float<W> second = bits_as<Float<W>>(odd ? pair[1] & 0xFFFF0000u : pair[1] << 16);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float x = position[m][odd];
        sum[m][0] += x * first;
        sum[m][1] += x * second;
      }
    }
  }
}

// One tile: M rows from `row`, and the COLUMNS of one panel.
template <int W, int M, class RowSource, class T>
LAS_INLINE void tile(const RowSource& rows, int64_t row, const Panels<T>& weights, int64_t panel, InitialSums initial,
                     const Matrix<float>& out) {
  for (int64_t i = 0; i < COLUMNS; i += 2 * W) {
    Float<W> sum[M][2];
    load_initial<W, M>(initial, row, panel + i, sum);
    add<W, M>(rows, row, weights.at(panel) + i * DEPTH_INTERLEAVE<T>, weights.depth, sum);
    store_sums<W, M>(out, row, panel + i, sum);
  }
}

#ifdef LAS_BF16_DOTS
#define LAS_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

inline bool has_bf16_dots() { return max_lanes >= 16 && __builtin_cpu_supports("avx512bf16"); }

template <int M, class RowSource>
LAS_AVX512_BF16 void bf16_tile(const RowSource& rows, int64_t row, const c10::BFloat16* panel, int64_t depth,
                               InitialSums initial, int64_t column, const Matrix<float>& out) {
  __m512 sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sum[m][i] = initial ? _mm512_loadu_ps(initial[row + m] + column + 16 * i) : _mm512_setzero_ps();
  auto position = cursor<M>(rows, row);
  for (int64_t k = 0; k < depth; k += 2, position.advance(2)) {
    fetch_ahead<M>(panel + (k + depth) * COLUMNS, 128);
    const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + k * COLUMNS);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + k * COLUMNS + 32);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, position[m], sizeof pair);
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

// The matmul without dot-product instructions: for float32, and for other types on a processor that lacks them.
template <class RowSource, class Weights>
void portable_matmul(const RowSource& rows, const Weights& weights, InitialSums initial, const Matrix<float>& out) {
  widest([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
      each_tile<TILE<W>>(rows.count, [&](int64_t row, auto size) __attribute__((always_inline)) {
        tile<W, size>(rows, row, weights, panel, initial, out);
      });
  });
}

// rows: a Matrix or PanelRows (M, depth of the panels). initial: null, or (padded columns,) per row. out: (M, padded
// columns), which may be what `initial` points to.
template <class RowSource, class T>
void matmul(const RowSource& rows, const Panels<T>& weights, InitialSums initial, const Matrix<float>& out) {
#ifdef LAS_BF16_DOTS
  if constexpr (!std::is_same_v<T, float>) {
    if (has_bf16_dots()) {
      for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
        each_tile<TILE<16>>(rows.count, [&](int64_t row, auto size) {
          bf16_tile<size>(rows, row, weights.at(panel), weights.depth, initial, panel, out);
        });
      return;
    }
  }
#endif
  portable_matmul(rows, weights, initial, out);
}

// Some rows of the gradient of a weight: out (outputs, inputs) = outputs^T inputs, added to `out` if `accumulate`.
template <class T>
void transposed_matmul(const PanelRows<T>& outputs, const Panels<T>& inputs, bool accumulate,
                       const Matrix<float>& out) {
  const float* initial[COLUMNS];
  for (int64_t i = 0; i < outputs.count; ++i) initial[i] = out.at(i);
  matmul(outputs, inputs, accumulate ? initial : nullptr, out);
}

}  // namespace las
