// Dot-product attention over valid frames: the C++ twin of las_fast/ops/masked_attention.py, which says what it means.
//
// Three products make up both directions, with A of one row a query and one column a frame:
//   dots     A = rows . frames^T      scores from queries and keys; the gradient of weights from values
//   average  rows = A . frames        context from values; the gradient of queries from keys
//   spread   frames = A^T . rows      the gradients of keys and values
// Frames are taken in tiles, and each tile meets all queries of its utterance while it is in the cache. A row of A is
// added up in the same order whatever stands beside it, and padding is never read: an utterance has one answer, alone
// or in any batch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "softmax.h"
#include "vector.h"

namespace {

using las::Float;
using las::each_vector;
using las::get;
using las::put;
using las::softmax;
using las::Summary;
using las::total;

constexpr int64_t GRAIN = 1 << 16;  // multiplications that make a thread worth starting
constexpr int64_t DOT_TILE = 32, AVERAGE_TILE = 64;  // frames

// Accumulators that fit beside what they are made of: AVX-512 has 32 registers, the others 16.
template <int W>
constexpr int REGISTERS = W == 16 ? 16 : 8;
template <int W>
constexpr int QUERIES = W == 16 ? 8 : 4;  // taken together at most

// The frames of one utterance: `count` rows of `size` values, `stride` apart.
template <class T>
struct Frames {
  T* data;
  int64_t stride, count, size;

  T* at(int64_t t) const { return data + t * stride; }
};

// `count` rows of float32, one a query, `stride` apart.
struct Rows {
  float* data;
  int64_t stride, count;

  float* at(int64_t k) const { return data + k * stride; }
};

// Memory for up to `most` rows of up to `size` values, each padded with zeros to whole vectors.
struct Buffer {
  Buffer(int64_t most, int64_t size) : stride((size + 15) / 16 * 16), memory(most * stride) {}

  Rows rows(int64_t count) { return {memory.data(), stride, count}; }
  Rows zeros(int64_t count) {
    std::fill(memory.begin(), memory.end(), 0.0f);
    return rows(count);
  }
  template <class T>
  Rows fill(const T* source, int64_t source_stride, int64_t count, int64_t size, float factor) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < size; ++i) memory[k * stride + i] = float(source[k * source_stride + i]) * factor;
    return rows(count);
  }

  int64_t stride;
  std::vector<float> memory;
};

template <class T>
void copy(const Rows& rows, int64_t size, T* out) {
  for (int64_t k = 0; k < rows.count; ++k)
    for (int64_t i = 0; i < size; ++i) out[k * size + i] = T(rows.at(k)[i]);
}

// out[k, t] = rows[k] . frames[t] for M rows from k and R frames from t.
template <int W, int M, int R, class T>
LAS_INLINE void dot_block(const Rows& rows, int64_t k, const Frames<const T>& frames, int64_t t, const Rows& out) {
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
    add(whole, [&](const T* p) __attribute__((always_inline)) { return las::load_part<W>(p, frames.size - whole); });
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 4) {
    const Float<4> four = las::sums<W>(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    for (int j = i; j < i + 4 && j < M * R; ++j) out.at(k + j % M)[t + j / M] = four[j - i];
  }
}

template <int W, int M, class T>
LAS_INLINE void dot_tile(const Rows& rows, int64_t k, const Frames<const T>& frames, int64_t begin, int64_t end,
                         const Rows& out) {
  constexpr int R = std::min(8, REGISTERS<W> / M);
  for (; k + M <= rows.count; k += M) {
    int64_t t = begin;
    for (; t + R <= end; t += R) dot_block<W, M, R>(rows, k, frames, t, out);
    for (; t < end; ++t) dot_block<W, M, 1>(rows, k, frames, t, out);
  }
  if constexpr (M > 1) dot_tile<W, M / 2>(rows, k, frames, begin, end, out);
}

template <int W, class T>
LAS_INLINE void dots(const Rows& rows, const Frames<const T>& frames, const Rows& out) {
  for (int64_t t = 0; t < frames.count; t += DOT_TILE)
    dot_tile<W, QUERIES<W>>(rows, 0, frames, t, std::min(t + DOT_TILE, frames.count), out);
}

// out[k, i] += sum over frames from begin to end of weights[k, t] * frames[t, i], for M rows and C vectors of columns.
template <int W, int M, int C, class Read, class T>
LAS_INLINE void average_block(const Rows& weights, int64_t k, const Frames<const T>& frames, int64_t begin, int64_t end,
                              int64_t column, const Rows& out, Read read) {
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
LAS_INLINE void average_tile(const Rows& weights, int64_t k, const Frames<const T>& frames, int64_t begin, int64_t end,
                             const Rows& out) {
  constexpr int C = std::min(8, REGISTERS<W> / M);
  const auto whole = [](const T* p) __attribute__((always_inline)) { return las::load<W>(p); };
  for (; k + M <= weights.count; k += M) {
    int64_t i = 0;
    for (; i + C * W <= frames.size; i += C * W) average_block<W, M, C>(weights, k, frames, begin, end, i, out, whole);
    for (; i + W <= frames.size; i += W) average_block<W, M, 1>(weights, k, frames, begin, end, i, out, whole);
    const auto part = [&](const T* p) __attribute__((always_inline)) { return las::load_part<W>(p, frames.size - i); };
    if (i < frames.size) average_block<W, M, 1>(weights, k, frames, begin, end, i, out, part);
  }
  if constexpr (M > 1) average_tile<W, M / 2>(weights, k, frames, begin, end, out);
}

// out must be zeros. A tile is added up by itself first: shorter sums lose less.
template <int W, class T>
LAS_INLINE void average(const Rows& weights, const Frames<const T>& frames, const Rows& out) {
  for (int64_t t = 0; t < frames.count; t += AVERAGE_TILE)
    average_tile<W, QUERIES<W>>(weights, 0, frames, t, std::min(t + AVERAGE_TILE, frames.count), out);
}

// frames[t, i] = sum over k of weights[k, t] * rows[k, i] for R frames and C vectors of columns, or `lanes` of one.
template <int W, int R, int C, class T>
LAS_INLINE void spread_block(const Rows& weights, const Rows& rows, int64_t t, int64_t column, int64_t lanes,
                             const Frames<T>& frames) {
  Float<W> sum[R][C] = {};
  for (int64_t k = 0; k < rows.count; ++k) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const Float<W> row = las::load<W>(rows.at(k) + column + c * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][c] += las::broadcast<W>(weights.at(k)[t + r]) * row;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      T* to = frames.at(t + r) + column + c * W;
      if (lanes == W) las::store<W>(to, sum[r][c]);
      else las::store_part<W>(to, sum[r][c], lanes);
    }
}

template <int W, int R, class T>
LAS_INLINE void spread_tile(const Rows& weights, const Rows& rows, int64_t t, const Frames<T>& frames) {
  int64_t i = 0;
  for (; i + 2 * W <= frames.size; i += 2 * W) spread_block<W, R, 2>(weights, rows, t, i, W, frames);
  for (; i < frames.size; i += W)
    spread_block<W, R, 1>(weights, rows, t, i, std::min<int64_t>(W, frames.size - i), frames);
}

template <int W, class T>
LAS_INLINE void spread(const Rows& weights, const Rows& rows, const Frames<T>& frames) {
  constexpr int R = REGISTERS<W> / 2;
  int64_t t = 0;
  for (; t + R <= frames.count; t += R) spread_tile<W, R>(weights, rows, t, frames);
  for (; t < frames.count; ++t) spread_tile<W, 1>(weights, rows, t, frames);
}

void check_inputs(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& lengths) {
  TORCH_CHECK(query.dim() == 3 && (query.scalar_type() == at::kFloat || query.scalar_type() == at::kBFloat16),
              "query must be (B, K, D) float32 or bfloat16; got ", query.sizes(), " ", query.scalar_type());
  const int64_t B = query.size(0), D = query.size(2);
  TORCH_CHECK(keys.dim() == 3 && keys.size(0) == B && keys.size(2) == D && keys.scalar_type() == query.scalar_type(),
              "keys must be (B, T, D) with B=", B, ", D=", D, " and the dtype of query; got ", keys.sizes(), " ",
              keys.scalar_type());
  TORCH_CHECK(values.dim() == 3 && values.size(0) == B && values.size(1) == keys.size(1) &&
                  values.scalar_type() == query.scalar_type(),
              "values must be (B, T, E) with B=", B, ", T=", keys.size(1), " and the dtype of query; got ",
              values.sizes(), " ", values.scalar_type());
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == B && lengths.scalar_type() == at::kLong, "lengths must be (", B,
              ",) int64; got ", lengths.sizes(), " ", lengths.scalar_type());
  TORCH_CHECK(keys.size(1) <= std::numeric_limits<int32_t>::max(), "keys must have fewer than 2^31 frames; got ",
              keys.sizes());
}

void check_like(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(!x || (x->sizes() == shape && x->scalar_type() == dtype), name, " must be ", shape, " ", dtype, "; got ",
              x->sizes(), " ", x->scalar_type());
}

at::Tensor with_whole_rows(const at::Tensor& x) { return x.stride(2) == 1 || x.size(2) < 2 ? x : x.contiguous(); }

template <class T>
Frames<const T> frames_of(const at::Tensor& x, int64_t b, int64_t count) {
  return {x.const_data_ptr<T>() + b * x.stride(0), x.stride(1), count, x.size(2)};
}

template <class T>
Frames<T> writable(at::Tensor& x, int64_t b, int64_t count) {
  return {x.mutable_data_ptr<T>() + b * x.stride(0), x.stride(1), count, x.size(2)};
}

template <class T>
void clear_after(const Frames<T>& frames, int64_t all) {  // those past the length
  std::fill_n(frames.at(frames.count), (all - frames.count) * frames.size, T(0.0f));  // whole rows: strides may lie
}

struct Shape {
  int64_t B, K, T, D, E;

  Shape(const at::Tensor& query, const at::Tensor& values)
      : B(query.size(0)), K(query.size(1)), T(values.size(1)), D(query.size(2)), E(values.size(2)) {}
  int64_t grain(int64_t queries) const {
    return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, queries * T * (D + E)));
  }
};

struct Forward {
  at::Tensor query, keys, values, lengths;
  float scale;
  at::Tensor context, weights, peaks, logsumexp;
  Shape shape;

  // Queries first to first + count of utterance b.
  template <class T>
  void attend(int64_t b, int64_t first, int64_t count, Buffer& queries, Buffer& scores, Buffer& contexts) {
    const int64_t n = std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, shape.T);
    const int64_t row = b * shape.K + first;
    const T* source = query.const_data_ptr<T>() + b * query.stride(0) + first * query.stride(1);
    const Rows q = queries.fill(source, query.stride(1), count, shape.D, scale);
    const bool kept = weights.numel() > 0;
    const Rows w = kept ? Rows{weights.mutable_data_ptr<float>() + row * shape.T, shape.T, count} : scores.rows(count);
    const Rows c = contexts.zeros(count);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      dots<W>(q, frames_of<T>(keys, b, n), w);
      for (int64_t k = 0; k < count; ++k) {
        const Summary found = softmax<W>(w.at(k), n);
        peaks.mutable_data_ptr<int64_t>()[row + k] = found.peak;
        logsumexp.mutable_data_ptr<float>()[row + k] = found.logsumexp;
      }
      average<W>(w, frames_of<T>(values, b, n), c);
    });
    for (int64_t k = 0; kept && k < count; ++k) std::fill(w.at(k) + n, w.at(k) + shape.T, 0.0f);
    copy(c, shape.E, context.mutable_data_ptr<T>() + row * shape.E);
  }

  // Where there are fewer utterances than threads, the queries of one are shared out too.
  template <class T>
  void run() {
    const int64_t parts = shape.B < at::get_num_threads() ? std::max<int64_t>(1, shape.K / 8) : 1;
    const int64_t each = (shape.K + parts - 1) / parts;
    at::parallel_for(0, shape.B * parts, shape.grain(each), [&](int64_t begin, int64_t end) {
      Buffer queries(each, shape.D), scores(weights.numel() ? 0 : each, shape.T), contexts(each, shape.E);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = std::min(task % parts * each, shape.K);
        attend<T>(task / parts, first, std::min(each, shape.K - first), queries, scores, contexts);
      }
    });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& keys,
                                                                   const at::Tensor& values, const at::Tensor& lengths,
                                                                   double scale, bool weights) {
  check_inputs(query, keys, values, lengths);
  const Shape shape(query, values);
  const auto [B, K, T, D, E] = std::tuple(shape.B, shape.K, shape.T, shape.D, shape.E);
  const auto wide = query.options().dtype(at::kFloat);
  Forward job{with_whole_rows(query),
              with_whole_rows(keys),
              with_whole_rows(values),
              lengths.contiguous(),
              float(scale),
              at::empty({B, K, E}, values.options()),
              weights ? at::empty({B, K, T}, wide) : at::empty({0, 0, 0}, wide),
              at::empty({B, K}, lengths.options()),
              at::empty({B, K}, wide),
              shape};
  if (query.scalar_type() == at::kFloat) job.run<float>();
  else job.run<at::BFloat16>();
  return {job.context, job.weights, job.peaks, job.logsumexp};
}

// With W the weights, S the scores and dX the gradient of X:
//   dV = W^T dC;   dW' = dW + dC V^T;   dS = W * (dW' - rowsum(W * dW'));   dQ = scale dS K;   dK = scale dS^T Q
struct Backward {
  at::Tensor context_gradient, weights_gradient;  // undefined: none
  at::Tensor query, keys, values, lengths, weights;
  float scale;
  bool memory;
  at::Tensor query_gradient, keys_gradient, values_gradient;
  Shape shape;

  template <class T>
  Rows rows_of(const at::Tensor& x, int64_t b, Buffer& buffer, float factor = 1.0f) const {
    return buffer.fill(x.const_data_ptr<T>() + b * x.stride(0), x.stride(1), shape.K, x.size(2), factor);
  }

  // Turn the gradients of the n weights of a query into those of its scores before the scale.
  template <int W>
  LAS_INLINE void through_softmax(const float* weight, float* gradient, int64_t n) const {
    const float mean = total<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
      return get<W>(weight + t, lanes, 0.0f) * get<W>(gradient + t, lanes, 0.0f);
    });
    each_vector<W>(n, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
      const Float<W> centred = get<W>(gradient + t, lanes, 0.0f) - mean;
      put<W>(gradient + t, get<W>(weight + t, lanes, 0.0f) * centred * scale, lanes);
    });
  }

  struct Scratch {
    explicit Scratch(const Shape& s) : query(s.K, s.D), summed(s.K, s.D), context(s.K, s.E), weights(s.K, s.T),
                                       scores(s.K, s.T) {}
    Buffer query, summed, context, weights, scores;
  };

  template <class T>
  void utterance(int64_t b, Scratch& scratch) {
    const int64_t K = shape.K, n = std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, shape.T);
    const Frames<const T> key = frames_of<T>(keys, b, n), value = frames_of<T>(values, b, n);
    const bool through_context = context_gradient.defined(), kept = weights.numel() > 0;
    const Rows w = kept ? rows_of<float>(weights, b, scratch.weights) : scratch.weights.rows(K);
    const Rows q = rows_of<T>(query, b, scratch.query, kept ? 1.0f : scale), dq = scratch.summed.zeros(K);
    const Rows dc = through_context ? rows_of<T>(context_gradient, b, scratch.context) : scratch.context.zeros(K);
    const Rows dw = scratch.scores.zeros(K);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      if (!kept) {
        dots<W>(q, key, w);
        for (int64_t k = 0; k < K; ++k) softmax<W>(w.at(k), n);
      }
      if (through_context) dots<W>(dc, value, dw);
      for (int64_t k = 0; k < K; ++k) {
        if (weights_gradient.defined()) add_weights_gradient(b, k, n, dw.at(k));
        through_softmax<W>(w.at(k), dw.at(k), n);
      }
      average<W>(dw, key, dq);
    });
    copy(dq, shape.D, query_gradient.mutable_data_ptr<T>() + b * K * shape.D);
    if (!memory) return;
    const Frames<T> dk = writable<T>(keys_gradient, b, n), dv = writable<T>(values_gradient, b, n);
    const Rows unscaled = rows_of<T>(query, b, scratch.query);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      spread<W>(dw, unscaled, dk);
      spread<W>(w, dc, dv);
    });
    clear_after(dk, shape.T);
    clear_after(dv, shape.T);
  }

  LAS_INLINE void add_weights_gradient(int64_t b, int64_t k, int64_t n, float* gradient) const {
    const float* more = weights_gradient.const_data_ptr<float>() + b * weights_gradient.stride(0) +
                        k * weights_gradient.stride(1);
    for (int64_t t = 0; t < n; ++t) gradient[t] += more[t];
  }

  template <class T>
  void run() {
    at::parallel_for(0, shape.B, shape.grain(3 * shape.K), [&](int64_t begin, int64_t end) {
      Scratch scratch(shape);
      for (int64_t b = begin; b < end; ++b) utterance<T>(b, scratch);
    });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const std::optional<at::Tensor>& context_gradient, const std::optional<at::Tensor>& weights_gradient,
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
    const at::Tensor& context, const at::Tensor& weights, const at::Tensor& logsumexp, double scale, bool memory) {
  check_inputs(query, keys, values, lengths);
  const Shape shape(query, values);
  const auto [B, K, T, D, E] = std::tuple(shape.B, shape.K, shape.T, shape.D, shape.E);
  check_like("context_gradient", context_gradient, {B, K, E}, values.scalar_type());
  check_like("weights_gradient", weights_gradient, {B, K, T}, at::kFloat);
  if (weights.numel()) check_like("weights", weights, {B, K, T}, at::kFloat);
  const auto given = [](const std::optional<at::Tensor>& x) { return x ? with_whole_rows(*x) : at::Tensor(); };
  const auto frames = [&](int64_t size) { return memory ? std::vector<int64_t>{B, T, size} : std::vector<int64_t>(3); };
  Backward job{given(context_gradient),
               given(weights_gradient),
               with_whole_rows(query),
               with_whole_rows(keys),
               with_whole_rows(values),
               lengths.contiguous(),
               with_whole_rows(weights),
               float(scale),
               memory,
               at::empty({B, K, D}, query.options()),
               at::empty(frames(D), keys.options()),
               at::empty(frames(E), values.options()),
               shape};
  if (query.scalar_type() == at::kFloat) job.run<float>();
  else job.run<at::BFloat16>();
  return {job.query_gradient, job.keys_gradient, job.values_gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) {
  m.def("masked_attention_cpp(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scale, bool weights)"
        " -> (Tensor context, Tensor weights, Tensor peaks, Tensor logsumexp)");
  m.def("masked_attention_backward_cpp(Tensor? context_gradient, Tensor? weights_gradient, Tensor query, Tensor keys,"
        " Tensor values, Tensor lengths, Tensor context, Tensor weights, Tensor logsumexp, float scale, bool memory)"
        " -> (Tensor query_gradient, Tensor keys_gradient, Tensor values_gradient)");
}

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("masked_attention_cpp", &forward);
  m.impl("masked_attention_backward_cpp", &backward);
}
