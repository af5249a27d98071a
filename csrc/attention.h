// The three matmuls of attention over the encoder frames of an utterance. A has a row per query, a column per frame:
//
//   dots     A = rows . frames^T      scores from queries and keys; the gradient of weights from values
//   average  rows = A . frames        context from values; the gradient of queries from keys
//   spread   frames = A^T . rows      the gradients of keys and values
//
// Frames are processed in tiles: all queries use a tile while it is in the cache. Rows are padded to whole vectors,
// with zeros for dots and with any values for spread.

#pragma once

#include <algorithm>
#include <cstdint>

#include "softmax.h"
#include "vector.h"

namespace las {

constexpr int64_t DOT_TILE = 32, AVERAGE_TILE = 64;  // frames per tile

// Accumulators that fit in the registers together with their operands: AVX-512 has 32 registers, the others 16.
template <int W>
constexpr int ACCUMULATORS = W == 16 ? 16 : 8;
template <int W>
constexpr int MAX_QUERIES = W == 16 ? 8 : 4;  // per block

// The frames of one utterance, (count, size), `stride` apart: its keys or its values.
template <class T>
struct EncoderFrames {
  T* data;
  int64_t stride, count, size;

  T* at(int64_t t) const { return data + t * stride; }
};

// `count` rows of float32, one per query, `stride` apart.
struct QueryRows {
  float* data;
  int64_t stride, count;

  float* at(int64_t k) const { return data + k * stride; }
};

inline QueryRows one_row(float* row) { return {row, 0, 1}; }

// out[k, t] = rows[k] . frames[t] for M rows from k and R frames from t.
template <int W, int M, int R, class T>
LAS_INLINE void dot_block(const QueryRows& rows, int64_t k, const EncoderFrames<const T>& frames, int64_t t,
                          const QueryRows& out) {
  constexpr int N = (M * R + 3) / 4 * 4;
  Float<W> sum[N] = {};
  const auto add = [&](int64_t d, auto read) __attribute__((always_inline)) {
    Float<W> frame[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) frame[r] = read(frames.at(t + r) + d);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Float<W> row = las::load<W>(rows.at(k + m) + d);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r * M + m] += row * frame[r];
    }
  };
  const int64_t whole = frames.size / W * W;
  for (int64_t d = 0; d < whole; d += W)
    add(d, [](const T* p) __attribute__((always_inline)) { return las::load<W>(p); });
  if (whole < frames.size)
    add(whole, [&](const T* p) __attribute__((always_inline)) { return las::load_partial<W>(p, frames.size - whole); });
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 4) {
    const Float<4> four = las::sums<W>(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    for (int j = i; j < i + 4 && j < M * R; ++j) out.at(k + j % M)[t + j / M] = four[j - i];
  }
}

template <int W, int M, class T>
LAS_INLINE void dot_tile(const QueryRows& rows, int64_t k, const EncoderFrames<const T>& frames, int64_t begin,
                         int64_t end, const QueryRows& out) {
  constexpr int R = std::min(8, ACCUMULATORS<W> / M);
  for (; k + M <= rows.count; k += M) {
    int64_t t = begin;
    for (; t + R <= end; t += R) dot_block<W, M, R>(rows, k, frames, t, out);
    for (; t < end; ++t) dot_block<W, M, 1>(rows, k, frames, t, out);
  }
  if constexpr (M > 1) dot_tile<W, M / 2>(rows, k, frames, begin, end, out);
}

template <int W, class T>
LAS_INLINE void dots(const QueryRows& rows, const EncoderFrames<const T>& frames, const QueryRows& out) {
  for (int64_t t = 0; t < frames.count; t += DOT_TILE)
    dot_tile<W, MAX_QUERIES<W>>(rows, 0, frames, t, std::min(t + DOT_TILE, frames.count), out);
}

// out[k, i] += sum over frames from begin to end of weights[k, t] * frames[t, i], for M rows and C vectors of columns.
template <int W, int M, int C, class Read, class T>
LAS_INLINE void average_block(const QueryRows& weights, int64_t k, const EncoderFrames<const T>& frames, int64_t begin,
                              int64_t end, int64_t column, const QueryRows& out, Read read) {
  Float<W> sum[M][C] = {};
  for (int64_t t = begin; t < end; ++t) {
    Float<W> frame[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) frame[c] = read(frames.at(t) + column + c * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Float<W> weight = las::broadcast<W>(weights.at(k + m)[t]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[m][c] += weight * frame[c];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      float* to = out.at(k + m) + column + c * W;
      las::store<W>(to, las::load<W>(to) + sum[m][c]);
    }
}

template <int W, int M, class T>
LAS_INLINE void average_tile(const QueryRows& weights, int64_t k, const EncoderFrames<const T>& frames, int64_t begin,
                             int64_t end, const QueryRows& out) {
  constexpr int C = std::min(8, ACCUMULATORS<W> / M);
  const auto whole = [](const T* p) __attribute__((always_inline)) { return las::load<W>(p); };
  for (; k + M <= weights.count; k += M) {
    int64_t i = 0;
    for (; i + C * W <= frames.size; i += C * W) average_block<W, M, C>(weights, k, frames, begin, end, i, out, whole);
    for (; i + W <= frames.size; i += W) average_block<W, M, 1>(weights, k, frames, begin, end, i, out, whole);
    const int64_t rest = frames.size - i;
    const auto part = [&](const T* p) __attribute__((always_inline)) { return las::load_partial<W>(p, rest); };
    if (rest > 0) average_block<W, M, 1>(weights, k, frames, begin, end, i, out, part);
  }
  if constexpr (M > 1) average_tile<W, M / 2>(weights, k, frames, begin, end, out);
}

// out (queries, size) must be zeros. Each tile is summed separately first: shorter sums lose less precision.
template <int W, class T>
LAS_INLINE void average(const QueryRows& weights, const EncoderFrames<const T>& frames, const QueryRows& out) {
  for (int64_t t = 0; t < frames.count; t += AVERAGE_TILE)
    average_tile<W, MAX_QUERIES<W>>(weights, 0, frames, t, std::min(t + AVERAGE_TILE, frames.count), out);
}

// frames[t, i] = sum over k of weights[k, t] * rows[k, i] for R frames and C vectors of columns, of `lanes` each.
template <int W, int R, int C, class T>
LAS_INLINE void spread_block(const QueryRows& weights, const QueryRows& rows, int64_t t, int64_t column, int64_t lanes,
                             const EncoderFrames<T>& frames) {
  Float<W> sum[R][C] = {};
  for (int64_t k = 0; k < rows.count; ++k) {
    Float<W> row[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) row[c] = las::load<W>(rows.at(k) + column + c * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float weight = weights.at(k)[t + r];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] += weight * row[c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) las::store<W>(frames.at(t + r) + column + c * W, sum[r][c], lanes);
}

template <int W, int R, class T>
LAS_INLINE void spread_tile(const QueryRows& weights, const QueryRows& rows, int64_t t,
                            const EncoderFrames<T>& frames) {
  int64_t i = 0;
  for (; i + 2 * W <= frames.size; i += 2 * W) spread_block<W, R, 2>(weights, rows, t, i, W, frames);
  for (; i < frames.size; i += W)
    spread_block<W, R, 1>(weights, rows, t, i, std::min<int64_t>(W, frames.size - i), frames);
}

template <int W, class T>
LAS_INLINE void spread(const QueryRows& weights, const QueryRows& rows, const EncoderFrames<T>& frames) {
  constexpr int R = ACCUMULATORS<W> / 2;
  int64_t t = 0;
  for (; t + R <= frames.count; t += R) spread_tile<W, R>(weights, rows, t, frames);
  for (; t < frames.count; ++t) spread_tile<W, 1>(weights, rows, t, frames);
}

// Replace the gradients of a query's n weights by those of its scores, times `scale`.
template <int W>
LAS_INLINE void softmax_backward(const float* weight, float* gradient, int64_t n, float scale) {
  const float mean = sum_row<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    return load<W>(weight + t, lanes) * load<W>(gradient + t, lanes);
  });
  for_each_vector<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> centred = load<W>(gradient + t, lanes) - mean;
    store<W>(gradient + t, load<W>(weight + t, lanes) * centred * scale, lanes);
  });
}

}  // namespace las
