// The matmul of rows with packed weights, both quantised to 8 bits; matmul.h has that of float32 and bfloat16:
//
//   out[m, n] = initial[m][n] + scale[m] * scale[n] * sum over k of rows[m, k] * weights[n, k]
//
// Each row and each column has its own scale, which maps its largest magnitude to 127. The sums are exact: a row has
// the same result alone and in any batch. The processor's dot product takes unsigned rows, so rows have a zero point of
// 128. The initial sum of each column subtracts what the zero point adds. The scale of a row or column that holds
// infinity or NaN is NaN.

#pragma once

#include <cstdint>

#include "matmul.h"
#include "memory.h"
#include "softmax.h"
#include "vector.h"

namespace las {

template <>
inline constexpr int64_t DEPTH_INTERLEAVE<int8_t> = 4;

constexpr int32_t ZERO_POINT = 128;  // the value of a quantised row that represents 0

// Quantised weights (columns, depth) as [panel][k / 4][column][k % 4], with a scale and an initial sum per column.
struct Int8Panels {
  const int8_t* data;
  int64_t columns, depth;
  const float* scales;  // (padded columns,)
  const int32_t* sums;  // (padded columns,): -ZERO_POINT times the sum of the column

  const int8_t* at(int64_t column) const { return data + column * depth; }
};

// Quantised rows (count, depth).
struct Int8Rows {
  const uint8_t* data;
  int64_t stride, count;
  const float* scales;  // (count,)
};

template <int M>
LAS_INLINE RowCursor<M, uint8_t> cursor_at(const Int8Rows& rows, int64_t row) {
  return {rows.data + row * rows.stride, rows.stride};
}

// The largest magnitude of n values; NaN if one is not finite.
template <int W>
LAS_INLINE float largest_magnitude(const float* x, int64_t n) {
  Float<W> magnitudes{}, zero_or_nan{};
  for_each_vector<W>(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> value = load<W>(x + i, lanes);
    magnitudes = max<W>(magnitudes, bits_as<Float<W>>(bits_as<Bits<W>>(value) & 0x7FFFFFFFu));
    zero_or_nan += value * 0.0f;
  });
  return largest<W>(magnitudes) + sum<W>(zero_or_nan);
}

// Integers whose lowest byte is x * factor, rounded to the nearest integer.
template <int W>
LAS_INLINE Int<W> round_to_byte(Float<W> x, float factor) {
  const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  return bits_as<Int<W>>(x * factor + ROUND);
}

// A row or column of smaller magnitudes is quantised to zeros: 127 / largest must be finite.
constexpr float MIN_MAGNITUDE = 1e-30f;

inline float quantisation_factor(float largest) { return largest > MIN_MAGNITUDE ? 127.0f / largest : 0.0f; }

// Quantise a row of n values and pad it with zeros to `depth`; return its scale.
template <int W>
LAS_INLINE float quantise(const float* from, int64_t n, int64_t depth, uint8_t* to) {
  const float largest = largest_magnitude<W>(from, n), factor = quantisation_factor(largest);
  for_each_vector<W>(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    const Int<W> numbers = round_to_byte<W>(load<W>(from + i, lanes), factor) + ZERO_POINT;
    const Bytes<W> bytes = __builtin_convertvector(numbers, Bytes<W>);
    std::memcpy(to + i, &bytes, lanes);
  });
  std::fill(to + n, to + depth, uint8_t(ZERO_POINT));
  return largest / 127.0f;
}

// multiply_tile of matmul.h, for int8.
template <int W, int M>
LAS_INLINE void multiply_tile(const Int8Rows& rows, int64_t row, const Int8Panels& weights, int64_t panel,
                              InitialSums initial, const Matrix<float>& out) {
  for (int64_t i = 0; i < COLUMNS; i += W) {
    Int<W> sum[M];
    const int8_t* from = weights.at(panel) + i * DEPTH_INTERLEAVE<int8_t>;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) std::memcpy(&sum[m], weights.sums + panel + i, sizeof sum[m]);
    auto position = cursor_at<M>(rows, row);
    for (int64_t k = 0; k < weights.depth; k += 4, position.advance(4)) {
      Bits<W> four;
      std::memcpy(&four, from + k * COLUMNS, sizeof four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Int<W> weight = bits_as<Int<W>>(four << (24 - 8 * j)) >> 24;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] += int32_t(position[m][j]) * weight;
      }
    }
    const Float<W> scale = load<W>(weights.scales + panel + i);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Float<W> first = initial ? load<W>(initial[row + m] + panel + i) : Float<W>{};
      const Float<W> quantised_sum = __builtin_convertvector(sum[m], Float<W>);
      store<W>(out.at(row + m) + panel + i, first + quantised_sum * (scale * rows.scales[row + m]));
    }
  }
}

#ifdef LAS_X86_INTRINSICS
#define LAS_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

inline bool has_int8_dots() { return max_lanes >= 16 && __builtin_cpu_supports("avx512vnni"); }

template <int M>
LAS_AVX512_VNNI void multiply_tile_int8(const Int8Rows& rows, int64_t row, const Int8Panels& weights, int64_t panel,
                                        InitialSums initial, const Matrix<float>& out) {
  __m512i sum[M][2];
  const int8_t* from = weights.at(panel);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sum[m][i] = _mm512_loadu_si512(weights.sums + panel + 16 * i);
  auto position = cursor_at<M>(rows, row);
  for (int64_t k = 0; k < weights.depth; k += 4, position.advance(4)) {
    prefetch_ahead<M>(from + (k + weights.depth) * COLUMNS, 128);
    const __m512i first = _mm512_loadu_si512(from + k * COLUMNS);
    const __m512i second = _mm512_loadu_si512(from + k * COLUMNS + 64);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t four;
      std::memcpy(&four, position[m], sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      // asm, because with the intrinsic GCC 12 copies and spills the sums, which takes 2.5 times as long.
      asm("vpdpbusd %2, %1, %0" : "+v"(sum[m][0]) : "v"(x), "v"(first));
      asm("vpdpbusd %2, %1, %0" : "+v"(sum[m][1]) : "v"(x), "v"(second));
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int64_t column = panel + 16 * i;
    const __m512 column_scales = _mm512_loadu_ps(weights.scales + column);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512 scale = _mm512_mul_ps(column_scales, _mm512_set1_ps(rows.scales[row + m]));
      const __m512 first = initial ? _mm512_loadu_ps(initial[row + m] + column) : _mm512_setzero_ps();
      _mm512_storeu_ps(out.at(row + m) + column, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][i]), scale, first));
    }
  }
}
#endif

#ifdef LAS_AMX
// Turn a row's sums of integers for the columns of a panel into its results.
LAS_AMX inline void scale_sums(const int32_t* sums, const Int8Panels& weights, int64_t panel, float row_scale,
                               const float* initial, float* out) {
  for (int i = 0; i < COLUMNS; i += 16) {
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(weights.scales + panel + i), _mm512_set1_ps(row_scale));
    const __m512 first = initial ? _mm512_loadu_ps(initial + i) : _mm512_setzero_ps();
    const __m512i all = _mm512_add_epi32(_mm512_load_si512(sums + i), _mm512_loadu_si512(weights.sums + panel + i));
    _mm512_storeu_ps(out + i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, first));
  }
}

LAS_AMX inline void matmul_amx(const Int8Rows& rows, const Int8Panels& weights, InitialSums initial,
                               const Matrix<float>& out) {
  const ByteRows bytes(rows.data, rows.stride, rows.count, weights.depth);
  alignas(CACHE_LINE) int32_t sums[AMX_BLOCK][COLUMNS];
  for_each_block<int8_t>(
      bytes, weights.data, weights.columns,
      [&](int64_t column, int64_t row, int64_t count, bool, const auto& multiply) {
        multiply(sums, sizeof sums[0], false);
        for (int64_t i = 0; i < count; ++i)
          scale_sums(sums[i], weights, column, rows.scales[row + i], initial ? initial[row + i] + column : nullptr,
                     out.at(row + i, column));
      });
}
#endif

// rows: (M, depth of the panels). initial and out as in matmul.h.
inline void matmul(const Int8Rows& rows, const Int8Panels& weights, InitialSums initial, const Matrix<float>& out) {
#ifdef LAS_AMX
  if (has_tiles()) return matmul_amx(rows, weights, initial, out);
#endif
#ifdef LAS_X86_INTRINSICS
  if (has_int8_dots()) {
    for (int64_t panel = 0; panel < weights.columns; panel += COLUMNS)
      for_each_tile<TILE_ROWS<16>>(rows.count, [&](int64_t row, auto size) {
        multiply_tile_int8<size>(rows, row, weights, panel, initial, out);
      });
    return;
  }
#endif
  portable_matmul(rows, weights, initial, out);
}

// Quantise one column and write it at `to`, in groups of 4 that are COLUMNS * 4 apart; return its sum.
template <int W>
LAS_INLINE int32_t pack_column(const float* from, int64_t depth, float factor, int8_t* to) {
  int32_t sum = 0;
  for_each_vector<W>(depth, [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
    const Int<W> numbers = round_to_byte<W>(load<W>(from + k, lanes), factor);
    int8_t bytes[W];
    for (int j = 0; j < W; ++j) bytes[j] = int8_t(numbers[j]), sum += bytes[j];
    for (int j = 0; j < lanes; j += 4) std::memcpy(to + (k + j) * COLUMNS, bytes + j, 4);
  });
  return sum;
}

// Bytes of Int8Panels in one block: the quantised weights, then the scales and the initial sums.
inline int64_t int8_bytes(int64_t columns, int64_t depth) {
  return padded(columns) * (padded(depth, DEPTH_INTERLEAVE<int8_t>) + int64_t(sizeof(float) + sizeof(int32_t)));
}

// The panels in the int8_bytes at `from`, which `pack` wrote.
inline Int8Panels int8_panels(const uint8_t* from, int64_t columns, int64_t depth) {
  const int64_t padded_depth = padded(depth, DEPTH_INTERLEAVE<int8_t>), padded_columns = padded(columns);
  const float* scales = reinterpret_cast<const float*>(from + padded_columns * padded_depth);
  const int32_t* sums = reinterpret_cast<const int32_t*>(scales + padded_columns);
  return {reinterpret_cast<const int8_t*>(from), columns, padded_depth, scales, sums};
}

// Quantise and pack the columns source[column * stride + k] into the int8_bytes at `to`.
inline void pack(const float* source, int64_t stride, int64_t columns, int64_t depth, uint8_t* to) {
  const int64_t padded_depth = padded(depth, DEPTH_INTERLEAVE<int8_t>), padded_columns = padded(columns);
  // Zero the last panel, which may have fewer columns, and the scales and sums.
  std::fill(to + (padded_columns - COLUMNS) * padded_depth, to + int8_bytes(columns, depth), uint8_t(0));
  int8_t* numbers = reinterpret_cast<int8_t*>(to);
  float* scales = reinterpret_cast<float*>(to + padded_columns * padded_depth);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + padded_columns);
  dispatch_width([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t n = 0; n < columns; ++n) {
      const float* from = source + n * stride;
      const float largest = largest_magnitude<W>(from, depth);
      int8_t* column = numbers + n / COLUMNS * COLUMNS * padded_depth + n % COLUMNS * DEPTH_INTERLEAVE<int8_t>;
      sums[n] = -ZERO_POINT * pack_column<W>(from, depth, quantisation_factor(largest), column);
      scales[n] = largest / 127.0f;
    }
  });
}

}  // namespace las
