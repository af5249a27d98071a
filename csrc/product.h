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
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "softmax.h"
#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define LAS_BF16_DOTS
#endif

namespace las {

constexpr int64_t COLUMNS = 32;  // of a panel

inline int64_t padded(int64_t n, int64_t multiple = COLUMNS) { return (n + multiple - 1) / multiple * multiple; }

// Neighbours in k that lie side by side, and so the multiple that the depth of rows and panels is padded to.
template <class T>
constexpr int64_t NEIGHBOURS = std::is_same_v<T, float> ? 1 : 2;

// Memory that begins at a cache line and is not filled. Where it is large the system is asked for large pages: they are
// had at once instead of one small one after another, and fewer addresses need looking up.
template <class T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t count) {
    const size_t large = 1 << 21, bytes = std::max<size_t>(count * sizeof(T), 1), align = bytes < large ? 64 : large;
    const size_t whole = (bytes + align - 1) / align * align;
    data_.reset(static_cast<T*>(std::aligned_alloc(align, whole)));
    if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (align == large) madvise(data_.get(), whole, MADV_HUGEPAGE);
#endif
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

// Weights (columns, depth) as [panel][k / NEIGHBOURS][column][k % NEIGHBOURS]; zeros where they have been padded.
template <class T>
struct Panels {
  const T* data;
  int64_t columns, depth;

  const T* at(int64_t column) const { return data + column * depth; }
};

// `count` rows, `stride` apart.
template <class T>
struct Matrix {
  T* data;
  int64_t stride, count;

  T* at(int64_t row, int64_t k = 0) const { return data + row * stride + k; }
  operator Matrix<const T>() const { return {data, stride, count}; }
};

// Memory of rows with room for whole panels. Rows are an odd number of pairs of cache lines apart: at a power of two what
// a tile reads and writes of its rows would all claim the same few places in the caches.
template <class T = float>
struct Buffer {
  static constexpr int64_t PAIR = 128 / sizeof(T);

  Buffer() = default;
  Buffer(int64_t rows, int64_t size)
      : count(rows), stride((padded(size, PAIR) / PAIR | 1) * PAIR), memory(rows * stride) {}

  T* at(int64_t row) const { return memory.data() + row * stride; }
  Matrix<T> rows(int64_t count, int64_t from = 0) const { return {at(from), stride, count}; }
  void clear() const { std::fill_n(memory.data(), count * stride, T(0.0f)); }

  int64_t count = 0, stride = 0;
  Memory<T> memory;
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

template <int W, class S, class T>
LAS_INLINE void convert(const S* from, int64_t n, T* to, float factor = 1.0f) {
  each_vector<W>(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    put<W>(to + i, get<W>(from + i, lanes, 0.0f) * factor, lanes);
  });
}

// COLUMNS of one row and of the next, side by side.
template <int W>
LAS_INLINE void beside(const c10::BFloat16* row, const c10::BFloat16* next, c10::BFloat16* to) {
  for (int64_t i = 0; i < COLUMNS; i += W) {
    Short<W> low, high;
    std::memcpy(&low, row + i, sizeof low);
    std::memcpy(&high, next + i, sizeof high);
    const Bits<W> both = __builtin_convertvector(low, Bits<W>) | __builtin_convertvector(high, Bits<W>) << 16;
    std::memcpy(to + 2 * i, &both, sizeof both);
  }
}

// The lanes of a and b by turns: of their first halves (PART 0), or of their second.
template <int W, int PART, int... i>
LAS_INLINE Float<W> zip(Float<W> a, Float<W> b, std::integer_sequence<int, i...>) {
  return pick<W>(a, b, std::integer_sequence<int, (i / 2 + PART * W / 2 + i % 2 * W)...>{});
}

// Lane i of vector k becomes lane k of vector i. Each round rotates the bits of (k, i) by one.
template <int W>
LAS_INLINE void transpose(Float<W> (&x)[W]) {
  constexpr auto all = std::make_integer_sequence<int, W>{};
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Float<W> y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = zip<W, 0>(x[i], x[i + W / 2], all);
      y[2 * i + 1] = zip<W, 1>(x[i], x[i + W / 2], all);
    }
    std::memcpy(x, y, sizeof x);
  }
}

template <int W>
LAS_INLINE void put_neighbours(float* to, const Float<W>* rows) {
  store<W>(to, rows[0]);
}

template <int W>
LAS_INLINE void put_neighbours(c10::BFloat16* to, const Float<W>* rows) {  // each pair of them is one 32-bit lane
  const Bits<W> first = rounded_to_upper_half<W>(rows[0]) >> 16;
  const Bits<W> pairs = first | (rounded_to_upper_half<W>(rows[1]) & 0xFFFF0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}

// One panel of `factor` times the values source[column * column_stride + k * k_stride], one of whose strides is 1.
template <int W, class S, class T>
LAS_INLINE void pack_panel(const S* source, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth,
                           float factor, T* to) {
  constexpr int64_t N = NEIGHBOURS<T>;
  const bool turned = k_stride == 1;
  const int64_t stride = turned ? column_stride : k_stride;
  int64_t k = 0;
  if constexpr (std::is_same_v<S, T> && N == 2)
    if (!turned && columns == COLUMNS && factor == 1.0f)
      for (; k + 1 < depth; k += 2) beside<W>(source + k * stride, source + (k + 1) * stride, to + k * COLUMNS);
  for (; k < depth; k += W)
    for (int64_t i = 0; i < COLUMNS; i += W) {
      Float<W> rows[W];  // of W columns and W values of k
      const int64_t wide = std::clamp<int64_t>(columns - i, 0, W), deep = std::min<int64_t>(depth - k, W);
      const S* from = source + i * column_stride + k * k_stride;
      if (wide == W && deep == W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
          fetch(from + j * stride + COLUMNS * column_stride);  // the next panel: its rows are far apart
          rows[j] = load<W>(from + j * stride) * factor;
        }
      } else {
        for (int64_t j = 0; j < W; ++j) {
          const bool there = j < (turned ? wide : deep);
          rows[j] = there ? load_part<W>(from + j * stride, turned ? deep : wide) * factor : Float<W>{};
        }
      }
      if (turned) transpose<W>(rows);
#pragma GCC unroll 16
      for (int j = 0; j < W; j += N)
        if (j < deep) put_neighbours<W>(to + (k + j) * COLUMNS + i * N, rows + j);
    }
}

#ifdef LAS_BF16_DOTS
// Two vectors rounded by the processor, which makes zeros of the tiniest numbers, as its dot product does.
LAS_AVX512_BF16 inline __m512i rounded(const float* low, const float* high, __m512 factor) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high) * factor, _mm512_loadu_ps(low) * factor);
}

// Round n values, a multiple of 32.
LAS_AVX512_BF16 inline void round_natively(const float* from, int64_t n, c10::BFloat16* to) {
  for (int64_t i = 0; i < n; i += 32)
    _mm512_storeu_si512(to + i, rounded(from + i, from + i + 16, _mm512_set1_ps(1.0f)));
}

// Whole panels of columns that lie one after another in memory, for k to `depth`, a multiple of 32. Memory is read in
// its order, which decides the time: so rounded rows wait in the first-level cache to be turned.
LAS_AVX512_BF16 inline void pack_columns(const float* source, int64_t stride, int64_t columns, int64_t depth,
                                         int64_t deep, float factor, c10::BFloat16* to) {
  constexpr int64_t CHUNK = 512, STRIDE = CHUNK + 32;
  alignas(64) c10::BFloat16 rows[COLUMNS * STRIDE];
  for (int64_t panel = 0; panel + COLUMNS <= columns; panel += COLUMNS)
    for (int64_t begin = 0; begin < depth; begin += CHUNK) {
      const int64_t count = std::min(CHUNK, depth - begin);
      for (int64_t i = 0; i < COLUMNS; ++i)
        for (int64_t k = 0; k < count; k += 32) {
          const float* from = source + (panel + i) * stride + begin + k;
          _mm512_store_si512(rows + i * STRIDE + k, rounded(from, from + 16, _mm512_set1_ps(factor)));
        }
      for (int64_t k = 0; k < count; k += 32)
        for (int64_t i = 0; i < COLUMNS; i += 16) {
          Float<16> pairs[16];
          for (int64_t j = 0; j < 16; ++j) std::memcpy(&pairs[j], rows + (i + j) * STRIDE + k, sizeof pairs[j]);
          transpose<16>(pairs);
          c10::BFloat16* out = to + panel * deep + (begin + k) * COLUMNS + 2 * i;
          for (int64_t j = 0; j < 16; ++j) std::memcpy(out + 2 * j * COLUMNS, &pairs[j], sizeof pairs[j]);
        }
    }
}

// The same where the columns of one k lie beside each other, for k to `depth`, a multiple of 2: some k of all panels at
// a time.
LAS_AVX512_BF16 inline void pack_beside(const float* source, int64_t stride, int64_t columns, int64_t depth,
                                        int64_t deep, float factor, c10::BFloat16* to) {
  constexpr int64_t CHUNK = 16;
  alignas(64) uint16_t turns[32];  // halves of the lower and the upper 16, by turns
  for (int i = 0; i < 32; ++i) turns[i] = uint16_t(i / 2 + i % 2 * 16);
  for (int64_t begin = 0; begin < depth; begin += CHUNK)
    for (int64_t panel = 0; panel + COLUMNS <= columns; panel += COLUMNS)
      for (int64_t k = begin; k < std::min(begin + CHUNK, depth); k += 2)
        for (int64_t i = 0; i < COLUMNS; i += 16) {
          const float* from = source + panel + i + k * stride;
          const __m512i both = rounded(from, from + stride, _mm512_set1_ps(factor));
          _mm512_storeu_si512(to + panel * deep + k * COLUMNS + 2 * i,
                              _mm512_permutexvar_epi16(_mm512_load_si512(turns), both));
        }
}

// Pack what of whole panels can be had so, and return up to which k; the rest is for pack_panel.
inline int64_t pack_natively(const float* source, int64_t column_stride, int64_t k_stride, int64_t columns,
                             int64_t depth, int64_t deep, float factor, c10::BFloat16* to) {
  if (!has_bf16_dots()) return 0;
  const bool turned = k_stride == 1;
  const int64_t done = turned ? depth / 32 * 32 : depth / 2 * 2;
  (turned ? pack_columns : pack_beside)(source, turned ? column_stride : k_stride, columns, done, deep, factor, to);
  return done;
}
#endif

// One panel of columns `column` to column + columns of `count` rows, which lie anywhere.
template <int W, class T>
LAS_INLINE void pack_rows(const T* const* rows, int64_t count, int64_t column, int64_t columns, T* to) {
  constexpr int64_t N = NEIGHBOURS<T>;
  if (columns < COLUMNS || count % N) std::fill_n(to, padded(count, N) * COLUMNS, T(0.0f));
  for (int64_t k = 0; k < count; k += N, to += N * COLUMNS) {
    if (columns < COLUMNS || k + N > count) {
      for (int64_t n = 0; n < N && k + n < count; ++n)
        for (int64_t i = 0; i < columns; ++i) to[i * N + n] = rows[k + n][column + i];
    } else if constexpr (N == 1) {
      std::copy_n(rows[k] + column, COLUMNS, to);
    } else {
      beside<W>(rows[k] + column, rows[k + 1] + column, to);
    }
  }
}

template <class T>
int64_t packed_size(int64_t columns, int64_t depth) {
  return padded(columns) * padded(depth, NEIGHBOURS<T>);
}

// Panels of such values in the packed_size of memory at `to`.
template <class S, class T>
Panels<T> pack(const S* source, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth, T* to,
               float factor = 1.0f) {
  const int64_t deep = padded(depth, NEIGHBOURS<T>);
  int64_t done = 0;
#ifdef LAS_BF16_DOTS
  if constexpr (std::is_same_v<S, float> && !std::is_same_v<T, float>)
    done = pack_natively(source, column_stride, k_stride, columns, depth, deep, factor, to);
#endif
  widest([&](auto width) __attribute__((always_inline)) {
    for (int64_t panel = 0; panel < columns; panel += COLUMNS) {
      const int64_t here = std::min(COLUMNS, columns - panel);
      const int64_t k = here == COLUMNS ? done : 0;
      pack_panel<width>(source + panel * column_stride + k * k_stride, column_stride, k_stride, here, depth - k, factor,
                        to + panel * deep + k * COLUMNS);
    }
  });
  return {to, columns, deep};
}

// Panels with memory of their own, which becomes `memory`.
template <class T>
Panels<T> pack(const float* source, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth,
               Memory<T>& memory, float factor = 1.0f) {
  memory = Memory<T>(packed_size<T>(columns, depth));
  return pack(source, column_stride, k_stride, columns, depth, memory.data(), factor);
}

}  // namespace las
