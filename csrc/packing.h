// Packing of matrices into the panels of matmul.h, and conversion of rows between float types.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "matmul.h"
#include "memory.h"
#include "softmax.h"
#include "vector.h"

namespace las {

// Convert n values, times `factor`, to another float type.
template <int W, class S, class T>
LAS_INLINE void convert(const S* from, int64_t n, T* to, float factor = 1.0f) {
  for_each_vector<W>(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    store<W>(to + i, load<W>(from + i, lanes) * factor, lanes);
  });
}

// Interleave COLUMNS values of two rows.
template <int W>
LAS_INLINE void interleave_rows(const c10::BFloat16* row, const c10::BFloat16* next, c10::BFloat16* to) {
  for (int64_t i = 0; i < COLUMNS; i += W) {
    Short<W> low, high;
    std::memcpy(&low, row + i, sizeof low);
    std::memcpy(&high, next + i, sizeof high);
    const Bits<W> both = __builtin_convertvector(low, Bits<W>) | __builtin_convertvector(high, Bits<W>) << 16;
    std::memcpy(to + 2 * i, &both, sizeof both);
  }
}

// Interleave DEPTH_INTERLEAVE rows of W columns as in a panel.
template <int W>
LAS_INLINE void store_interleaved(float* to, const Float<W>* rows) {
  store<W>(to, rows[0]);
}

template <int W>
LAS_INLINE void store_interleaved(c10::BFloat16* to, const Float<W>* rows) {  // a pair of k is one 32-bit lane
  const Bits<W> first = round_to_bf16<W>(rows[0]) >> 16;
  const Bits<W> pairs = first | (round_to_bf16<W>(rows[1]) & 0xFFFF0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}

// Pack factor * source[column * column_stride + k * k_stride] as one panel. One of the strides is 1.
template <int W, class S, class T>
LAS_INLINE void pack_panel(const S* source, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth,
                           float factor, T* to) {
  constexpr int64_t N = DEPTH_INTERLEAVE<T>;
  const bool depth_contiguous = k_stride == 1;
  const int64_t stride = depth_contiguous ? column_stride : k_stride;
  int64_t k = 0;
  if constexpr (std::is_same_v<S, T> && N == 2)  // copied: column_stride and factor are 1
    if (columns == COLUMNS)
      for (; k + 1 < depth; k += 2)
        interleave_rows<W>(source + k * stride, source + (k + 1) * stride, to + k * COLUMNS);
  for (; k < depth; k += W)
    for (int64_t i = 0; i < COLUMNS; i += W) {
      Float<W> rows[W];  // (W values of k, W columns); at first transposed if depth_contiguous
      const int64_t column_count = std::clamp<int64_t>(columns - i, 0, W);
      const int64_t depth_count = std::min<int64_t>(depth - k, W);
      const S* from = source + i * column_stride + k * k_stride;
      if (column_count == W && depth_count == W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
          prefetch(from + j * stride + COLUMNS * column_stride);  // the next panel: its rows are far apart
          rows[j] = load<W>(from + j * stride) * factor;
        }
      } else {
        for (int64_t j = 0; j < W; ++j) {
          const bool exists = j < (depth_contiguous ? column_count : depth_count);
          const int64_t count = depth_contiguous ? depth_count : column_count;
          rows[j] = exists ? load_partial<W>(from + j * stride, count) * factor : Float<W>{};
        }
      }
      if (depth_contiguous) transpose<W>(rows);
#pragma GCC unroll 16
      for (int j = 0; j < W; j += N)
        if (j < depth_count) store_interleaved<W>(to + (k + j) * COLUMNS + i * N, rows + j);
    }
}

#ifdef LAS_X86_INTRINSICS
// Round two vectors to bfloat16 with the processor's instruction. Like its dot product, it flushes subnormals to zero.
LAS_AVX512_BF16 inline __m512i round_two_to_bf16(const float* low, const float* high, __m512 factor) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high) * factor, _mm512_loadu_ps(low) * factor);
}

// Convert n values with that instruction; n is a multiple of 32.
LAS_AVX512_BF16 inline void convert_natively(const float* from, int64_t n, c10::BFloat16* to) {
  for (int64_t i = 0; i < n; i += 32)
    _mm512_storeu_si512(to + i, round_two_to_bf16(from + i, from + i + 16, _mm512_set1_ps(1.0f)));
}

// Pack all whole panels, where the values of a column are contiguous and `depth` is a multiple of 32. The source is
// read front to back, because reading it takes most of the time. Rounded rows stay in the first-level cache until they
// are transposed.
LAS_AVX512_BF16 inline void pack_depth_contiguous(const float* source, int64_t stride, int64_t columns, int64_t depth,
                                                  int64_t padded_depth, float factor, c10::BFloat16* to) {
  constexpr int64_t CHUNK = 512, STRIDE = CHUNK + 32;
  alignas(64) c10::BFloat16 rows[COLUMNS * STRIDE];
  for (int64_t panel = 0; panel + COLUMNS <= columns; panel += COLUMNS)
    for (int64_t begin = 0; begin < depth; begin += CHUNK) {
      const int64_t count = std::min(CHUNK, depth - begin);
      for (int64_t i = 0; i < COLUMNS; ++i)
        for (int64_t k = 0; k < count; k += 32) {
          const float* from = source + (panel + i) * stride + begin + k;
          _mm512_store_si512(rows + i * STRIDE + k, round_two_to_bf16(from, from + 16, _mm512_set1_ps(factor)));
        }
      for (int64_t k = 0; k < count; k += 32)
        for (int64_t i = 0; i < COLUMNS; i += 16) {
          Float<16> pairs[16];
          for (int64_t j = 0; j < 16; ++j) std::memcpy(&pairs[j], rows + (i + j) * STRIDE + k, sizeof pairs[j]);
          transpose<16>(pairs);
          c10::BFloat16* out = to + panel * padded_depth + (begin + k) * COLUMNS + 2 * i;
          for (int64_t j = 0; j < 16; ++j) std::memcpy(out + 2 * j * COLUMNS, &pairs[j], sizeof pairs[j]);
        }
    }
}

// The same where the columns of each k are contiguous and `depth` is a multiple of 2. CHUNK values of k are packed at a
// time, for all panels.
LAS_AVX512_BF16 inline void pack_column_contiguous(const float* source, int64_t stride, int64_t columns, int64_t depth,
                                                   int64_t padded_depth, float factor, c10::BFloat16* to) {
  constexpr int64_t CHUNK = 16;
  alignas(64) uint16_t order[32];  // the permutation that interleaves the lower and the upper 16
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
  for (int64_t begin = 0; begin < depth; begin += CHUNK)
    for (int64_t panel = 0; panel + COLUMNS <= columns; panel += COLUMNS)
      for (int64_t k = begin; k < std::min(begin + CHUNK, depth); k += 2)
        for (int64_t i = 0; i < COLUMNS; i += 16) {
          const float* from = source + panel + i + k * stride;
          const __m512i both = round_two_to_bf16(from, from + stride, _mm512_set1_ps(factor));
          _mm512_storeu_si512(to + panel * padded_depth + k * COLUMNS + 2 * i,
                              _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
        }
}

// Pack the whole panels with the functions above, up to the last k that they can. Return the number of k that are
// done; pack_panel packs the rest.
inline int64_t pack_natively(const float* source, int64_t column_stride, int64_t k_stride, int64_t columns,
                             int64_t depth, int64_t padded_depth, float factor, c10::BFloat16* to) {
  if (!has_bf16_dots()) return 0;
  const bool depth_contiguous = k_stride == 1;
  const int64_t done = depth_contiguous ? depth / 32 * 32 : depth / 2 * 2;
  if (depth_contiguous) pack_depth_contiguous(source, column_stride, columns, done, padded_depth, factor, to);
  else pack_column_contiguous(source, k_stride, columns, done, padded_depth, factor, to);
  return done;
}
#endif

// Pack columns [column, column + columns) of `count` rows, at most one panel. rows[k] points to the values of depth k.
template <int W, class T>
LAS_INLINE void pack_rows(const T* const* rows, int64_t count, int64_t column, int64_t columns, T* to) {
  constexpr int64_t N = DEPTH_INTERLEAVE<T>;
  for (int64_t k = 0; k < count; k += N, to += N * COLUMNS) {
    if (columns < COLUMNS || k + N > count) {
      std::fill_n(to, N * COLUMNS, T(0.0f));
      for (int64_t n = 0; n < N && k + n < count; ++n)
        for (int64_t i = 0; i < columns; ++i) to[i * N + n] = rows[k + n][column + i];
    } else if constexpr (N == 1) {
      std::copy_n(rows[k] + column, COLUMNS, to);
    } else {
      interleave_rows<W>(rows[k] + column, rows[k + 1] + column, to);
    }
  }
}

// Number of values in the panels of a matrix (columns, depth), padding included.
template <class T>
int64_t packed_size(int64_t columns, int64_t depth) {
  return padded(columns) * padded(depth, DEPTH_INTERLEAVE<T>);
}

// Pack factor * source[column * column_stride + k * k_stride] into the packed_size values at `to`.
template <class S, class T>
Panels<T> pack(const S* source, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth, T* to,
               float factor = 1.0f) {
  const int64_t padded_depth = padded(depth, DEPTH_INTERLEAVE<T>);
  int64_t done = 0;
#ifdef LAS_X86_INTRINSICS
  if constexpr (std::is_same_v<S, float> && !std::is_same_v<T, float>)
    done = pack_natively(source, column_stride, k_stride, columns, depth, padded_depth, factor, to);
#endif
  dispatch_width([&](auto width) __attribute__((always_inline)) {
    for (int64_t panel = 0; panel < columns; panel += COLUMNS) {
      const int64_t panel_columns = std::min(COLUMNS, columns - panel);
      const int64_t k = panel_columns == COLUMNS ? done : 0;
      pack_panel<width>(source + panel * column_stride + k * k_stride, column_stride, k_stride, panel_columns,
                        depth - k, factor, to + panel * padded_depth + k * COLUMNS);
    }
  });
  return {to, columns, padded_depth};
}

// The same into a new array, which becomes `memory`.
template <class T>
Panels<T> pack(const float* source, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth,
               AlignedArray<T>& memory, float factor = 1.0f) {
  memory = AlignedArray<T>(packed_size<T>(columns, depth));
  return pack(source, column_stride, k_stride, columns, depth, memory.data(), factor);
}

}  // namespace las
