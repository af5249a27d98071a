// The matmul of rows with weights that were packed beforehand:
//
//   out[m, n] = initial[m][n] + sum over k of rows[m, k] * weights[n, k]
//
// Weights are stored in panels of 32 columns n. A tile of rows keeps its sums in registers (with AMX, for a part of the
// depth) and reads a panel from front to back. Each sum is added up in the order of k, whatever the other rows are: a
// row has the same result alone and in any batch.
//
// Weights and rows are float32 or bfloat16, sums float32. Panels of bfloat16 interleave pairs of k for the processor's
// dot products: AMX tiles (amx.h) or AVX-512 vectors. Without these they are widened to float32 in registers; reading
// them still takes half the bytes.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "memory.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define LAS_X86_INTRINSICS
#endif

namespace las {

// The number of consecutive k that a panel stores side by side for each column. The depth of rows and panels is padded
// to a multiple of it.
template <class T>
constexpr int64_t DEPTH_INTERLEAVE = std::is_same_v<T, float> ? 1 : 2;

// Weights (columns, depth), padded with zeros, as [panel][k / DEPTH_INTERLEAVE][column][k % DEPTH_INTERLEAVE].
template <class T>
struct Panels {
  const T* data;
  int64_t columns, depth;

  const T* at(int64_t column) const { return data + column * depth; }
};

// The columns of a packed panel (depth, count) as the rows of a matmul without AMX.
template <class T>
struct PanelRows {
  const T* at(int64_t row, int64_t k) const { return data + k * COLUMNS + row * DEPTH_INTERLEAVE<T>; }

  const T* data;
  int64_t count;
};

// The position in the rows of a tile at depth k. One pointer serves three rows: the processor's addressing modes add
// the stride once or twice. A pointer per row, or one pointer and multiples of the stride, would take too many
// registers and make every load wait for an address to be computed (up to 5% of a tile's time). The empty asm hides the
// pointers from GCC, which would undo this.
template <int M, class T>
struct RowCursor {
  static constexpr int ROWS_PER_POINTER = 3, POINTERS = (M + ROWS_PER_POINTER - 1) / ROWS_PER_POINTER;

  LAS_INLINE RowCursor(const T* rows, int64_t stride) : stride(stride) {
#pragma GCC unroll 16
    for (int i = 0; i < POINTERS; ++i) pointers[i] = rows + i * ROWS_PER_POINTER * stride;
  }
  LAS_INLINE const T* operator[](int m) const {
    return pointers[m / ROWS_PER_POINTER] + m % ROWS_PER_POINTER * stride;
  }
  LAS_INLINE void advance(int64_t n) {
#pragma GCC unroll 16
    for (int i = 0; i < POINTERS; ++i) {
      pointers[i] += n;
      asm("" : "+r"(pointers[i]));
    }
  }

  int64_t stride;
  const T* pointers[POINTERS];
};

// The position in the columns of a panel, which are a constant distance apart.
template <int M, class T>
struct PanelCursor {
  LAS_INLINE const T* operator[](int m) const { return at + m * DEPTH_INTERLEAVE<T>; }
  LAS_INLINE void advance(int64_t n) { at += n * COLUMNS; }

  const T* at;
};

template <int M, class T>
LAS_INLINE RowCursor<M, T> cursor_at(const Matrix<T>& rows, int64_t row) {
  return {rows.at(row), rows.stride};
}

template <int M, class T>
LAS_INLINE PanelCursor<M, T> cursor_at(const PanelRows<T>& rows, int64_t row) {
  return {rows.at(row, 0)};
}

// The initial values of the sums: a pointer to (padded columns,) per row, or null for zeros.
using InitialSums = const float* const*;

// Rows per tile: their sums, two vectors per row, fit in the registers.
template <int W>
constexpr int TILE_ROWS = W == 16 ? 12 : 6;

// Call tile(row, Constant<size>{}), where size is from 1 to M.
template <int M, class Tile>
LAS_INLINE void with_constant_size(int64_t size, int64_t row, const Tile& tile) {
  if (size == M) return tile(row, Constant<M>{});
  if constexpr (M > 1) with_constant_size<M - 1>(size, row, tile);
}

// Split the rows into tiles of at most MAX_ROWS and call tile(row, Constant<M>{}) for each, where `row` is the first of
// its M rows. Tiles differ by at most 1 row, the larger ones first: in a small tile, each addition would wait for the
// previous one.
template <int MAX_ROWS, class Tile>
LAS_INLINE void for_each_tile(int64_t rows, const Tile& tile) {
  if (rows == 0) return;
  const int64_t tiles = padded(rows, MAX_ROWS) / MAX_ROWS, size = rows / tiles;
  const int64_t larger = rows - tiles * size;  // tiles of size + 1
  int64_t row = 0;
  for (int64_t i = 0; i < larger; ++i, row += size + 1) with_constant_size<MAX_ROWS>(size + 1, row, tile);
  for (; row < rows; row += size) with_constant_size<MAX_ROWS>(size, row, tile);
}

// Prefetch a cache line. Any address is allowed.
LAS_INLINE void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Prefetch `bytes` of the next panel while this one is used. It is not in the cache: its first tile would wait.
template <int M>
LAS_INLINE void prefetch_ahead(const void* next, int64_t bytes) {
  if constexpr (M >= 4)
    for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(next) + i);
}

// Set the sums of M rows from `row` and 2 * W columns from `column` to their initial values.
template <int W, int M>
LAS_INLINE void load_initial(InitialSums initial, int64_t row, int64_t column, Float<W> (&sum)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sum[m][i] = initial ? load<W>(initial[row + m] + column + i * W) : Float<W>{};
}

// Write these sums to out (rows, columns).
template <int W, int M>
LAS_INLINE void store_sums(const Matrix<float>& out, int64_t row, int64_t column, const Float<W> (&sum)[M][2]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) store<W>(out.at(row + m) + column + i * W, sum[m][i]);
}

// Add the matmul of M rows and 2 * W columns of a panel to the sums.
template <int W, int M, class RowSource>
LAS_INLINE void accumulate(const RowSource& rows, int64_t row, const float* panel, int64_t depth,
                           Float<W> (&sum)[M][2]) {
  auto position = cursor_at<M>(rows, row);
  for (int64_t k = 0; k < depth; ++k, position.advance(1)) {
    prefetch_ahead<M>(panel + (k + depth) * COLUMNS, 8 * W);
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
LAS_INLINE void accumulate(const RowSource& rows, int64_t row, const c10::BFloat16* panel, int64_t depth,
                           Float<W> (&sum)[M][2]) {
  auto position = cursor_at<M>(rows, row);
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

// The matmul of one tile: M rows from `row`, and the columns of one panel.
template <int W, int M, class RowSource, class T>
LAS_INLINE void multiply_tile(const RowSource& rows, int64_t row, const Panels<T>& weights, int64_t panel,
                              InitialSums initial, const Matrix<float>& out) {
  for (int64_t i = 0; i < COLUMNS; i += 2 * W) {
    Float<W> sum[M][2];
    load_initial<W, M>(initial, row, panel + i, sum);
    accumulate<W, M>(rows, row, weights.at(panel) + i * DEPTH_INTERLEAVE<T>, weights.depth, sum);
    store_sums<W, M>(out, row, panel + i, sum);
  }
}

#ifdef LAS_X86_INTRINSICS
#define LAS_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

inline bool has_bf16_dots() { return max_lanes >= 16 && __builtin_cpu_supports("avx512bf16"); }

template <int M, class RowSource>
LAS_AVX512_BF16 void multiply_tile_bf16(const RowSource& rows, int64_t row, const c10::BFloat16* panel, int64_t depth,
                                        InitialSums initial, int64_t column, const Matrix<float>& out) {
  __m512 sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sum[m][i] = initial ? _mm512_loadu_ps(initial[row + m] + column + 16 * i) : _mm512_setzero_ps();
  auto position = cursor_at<M>(rows, row);
  for (int64_t k = 0; k < depth; k += 2, position.advance(2)) {
    prefetch_ahead<M>(panel + (k + depth) * COLUMNS, 128);
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
  dispatch_width([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
      for_each_tile<TILE_ROWS<W>>(rows.count, [&](int64_t row, auto size) __attribute__((always_inline)) {
        multiply_tile<W, size>(rows, row, weights, panel, initial, out);
      });
  });
}

#ifdef LAS_AMX
LAS_AMX inline void matmul_amx(const Matrix<const c10::BFloat16>& rows, const Panels<c10::BFloat16>& weights,
                               InitialSums initial, const Matrix<float>& out) {
  constexpr int64_t SIZE = sizeof(c10::BFloat16);
  const ByteRows bytes(rows.data, rows.stride * SIZE, rows.count, weights.depth * SIZE);
  for_each_block<c10::BFloat16>(
      bytes, weights.data, weights.columns,
      [&](int64_t column, int64_t row, int64_t count, bool first, const auto& multiply) {
        for (int64_t i = 0; first && initial && i < count; ++i)
          if (initial[row + i] != out.at(row + i))
            std::copy_n(initial[row + i] + column, COLUMNS, out.at(row + i, column));
        multiply(out.at(row, column), out.stride * int64_t(sizeof(float)), initial || !first);
      });
}
#endif

// rows: a Matrix or PanelRows (M, depth of the panels). initial: null, or (padded columns,) per row. out: (M, padded
// columns); `initial` may point into it.
template <class RowSource, class T>
void matmul(const RowSource& rows, const Panels<T>& weights, InitialSums initial, const Matrix<float>& out) {
#ifdef LAS_AMX
  if constexpr (!std::is_same_v<T, float> && !std::is_same_v<RowSource, PanelRows<T>>)
    if (has_tiles()) return matmul_amx(rows, weights, initial, out);
#endif
#ifdef LAS_X86_INTRINSICS
  if constexpr (!std::is_same_v<T, float>) {
    if (has_bf16_dots()) {
      for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
        for_each_tile<TILE_ROWS<16>>(rows.count, [&](int64_t row, auto size) {
          multiply_tile_bf16<size>(rows, row, weights.at(panel), weights.depth, initial, panel, out);
        });
      return;
    }
  }
#endif
  portable_matmul(rows, weights, initial, out);
}

// Unpack a panel of bfloat16 (depth / 2, COLUMNS, 2) to the rows (COLUMNS, depth) from `row` on.
inline void unpack(const c10::BFloat16* panel, int64_t depth, const RowBuffer<c10::BFloat16>& rows, int64_t row) {
  dispatch_width([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;  // pairs of k, and columns, at a time
    for (int64_t k = 0; k < depth; k += 2 * W)
      for (int64_t i = 0; i < COLUMNS; i += W) {
        Float<W> pairs[W]{};
        for (int64_t j = 0; j < W && k + 2 * j < depth; ++j)
          std::memcpy(&pairs[j], panel + (k + 2 * j) * COLUMNS + 2 * i, sizeof pairs[j]);
        transpose<W>(pairs);
        for (int64_t j = 0; j < W; ++j) std::memcpy(rows.at(row + i + j) + k, &pairs[j], sizeof pairs[j]);
      }
  });
}

// Some panels of a matrix A (depth, columns), whose columns serve as the rows of matmuls. With panels of B (depth,
// columns), the product is A^T B, as in the gradient of a weight. With AMX, a matmul takes several panels of A,
// unpacked: for one panel, reading B would take most of the time.
template <class T>
class TransposedRows {
 public:
  // Panels per matmul: without AMX, one.
  static int64_t max_panels() { return uses_tiles() ? 8 : 1; }

  // `panels`: room for so many, at most max_panels().
  TransposedRows(int64_t depth, int64_t panels)
      : panels(panels), depth_(depth), panel_(COLUMNS * depth), unpacked_(uses_tiles() ? panels * COLUMNS : 0, depth) {}

  // Take the columns [begin, end) of A, at most `panels` panels. pack(column, count, to) packs a panel of them.
  template <class Pack>
  void assign(int64_t begin, int64_t end, const Pack& pack) {
    count_ = end - begin;
    for (int64_t i = 0; i < count_; i += COLUMNS) {
      pack(begin + i, std::min(COLUMNS, count_ - i), panel_.data());
      if constexpr (!std::is_same_v<T, float>)
        if (unpacked_.count) unpack(panel_.data(), depth_, unpacked_, i);
    }
  }

  // Compute out (rows, inputs.columns), or add the products to it if `accumulate`.
  void multiply(const Panels<T>& inputs, bool accumulate, const Matrix<float>& out) const {
    std::vector<const float*> initial(accumulate ? count_ : 0);
    for (size_t i = 0; i < initial.size(); ++i) initial[i] = out.at(int64_t(i));
    const InitialSums sums = accumulate ? initial.data() : nullptr;
    if (unpacked_.count) matmul(unpacked_.rows(count_), inputs, sums, out);
    else matmul(PanelRows<T>{panel_.data(), count_}, inputs, sums, out);
  }

  const int64_t panels;

 private:
  static bool uses_tiles() { return !std::is_same_v<T, float> && has_tiles(); }

  int64_t depth_, count_ = 0;
  AlignedArray<T> panel_;
  RowBuffer<T> unpacked_;  // (panels * COLUMNS, depth), empty without AMX
};

}  // namespace las
