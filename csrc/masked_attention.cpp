// Dot-product attention over valid frames: the C++ backend of las_fast/ops/masked_attention.py, which defines it.
//
// The sums of a query do not depend on the other queries, and padding is never read: an utterance gets the same result
// alone and in any batch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "attention.h"
#include "memory.h"
#include "softmax.h"
#include "vector.h"

namespace {

using las::average;
using las::dots;
using las::EncoderFrames;
using las::QueryRows;
using las::softmax;
using las::spread;
using las::SoftmaxSummary;

constexpr int64_t GRAIN = 1 << 16;  // multiplications per thread, at least

// A buffer (count, stride) for rows of `size` values, padded with zeros to whole vectors.
struct PaddedRows {
  PaddedRows(int64_t count, int64_t size) : stride(las::padded(size, 16)), memory(count * stride) {}

  QueryRows rows(int64_t count) { return {memory.data(), stride, count}; }
  QueryRows zeros(int64_t count) {
    std::fill(memory.begin(), memory.end(), 0.0f);
    return rows(count);
  }
  template <class T>
  QueryRows fill(const T* source, int64_t source_stride, int64_t count, int64_t size, float factor) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < size; ++i) memory[k * stride + i] = float(source[k * source_stride + i]) * factor;
    return rows(count);
  }

  int64_t stride;
  std::vector<float> memory;
};

template <class T>
void copy(const QueryRows& rows, int64_t size, T* out) {
  for (int64_t k = 0; k < rows.count; ++k)
    for (int64_t i = 0; i < size; ++i) out[k * size + i] = T(rows.at(k)[i]);
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
  las::check_lengths("lengths", lengths, B);
  TORCH_CHECK(keys.size(1) <= std::numeric_limits<int32_t>::max(), "keys must have fewer than 2^31 frames; got ",
              keys.sizes());
}

at::Tensor with_dense_rows(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

template <class T>
EncoderFrames<const T> encoder_frames(const at::Tensor& x, int64_t b, int64_t count) {
  return {x.const_data_ptr<T>() + b * x.stride(0), x.stride(1), count, x.size(2)};
}

template <class T>
EncoderFrames<T> writable(at::Tensor& x, int64_t b, int64_t count) {
  return {x.mutable_data_ptr<T>() + b * x.stride(0), x.stride(1), count, x.size(2)};
}

template <class T>
void clear_padding(const EncoderFrames<T>& frames, int64_t T_) {
  // The tensor is contiguous. Its stride is not used, because that of an axis of size 1 may be anything.
  std::fill_n(frames.at(frames.count), (T_ - frames.count) * frames.size, T(0.0f));
}

struct AttentionShape {
  int64_t B, K, T, D, E;

  AttentionShape(const at::Tensor& query, const at::Tensor& values)
      : B(query.size(0)), K(query.size(1)), T(values.size(1)), D(query.size(2)), E(values.size(2)) {}
  int64_t grain(int64_t queries) const {
    return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, queries * T * (D + E)));
  }
};

struct AttentionForward {
  at::Tensor query, keys, values, lengths;
  float scale;
  at::Tensor context, weights, peaks, logsumexp;
  AttentionShape shape;

  // Queries [first, first + count) of utterance b.
  template <class T>
  void attend(int64_t b, int64_t first, int64_t count, PaddedRows& queries, PaddedRows& scores, PaddedRows& contexts) {
    const int64_t n = std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, shape.T);
    const int64_t row = b * shape.K + first;
    const T* source = query.const_data_ptr<T>() + b * query.stride(0) + first * query.stride(1);
    const QueryRows q = queries.fill(source, query.stride(1), count, shape.D, scale);
    const bool keep_weights = weights.numel() > 0;
    const QueryRows w = keep_weights ? QueryRows{weights.mutable_data_ptr<float>() + row * shape.T, shape.T, count}
                                     : scores.rows(count);
    const QueryRows c = contexts.zeros(count);
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      dots<W>(q, encoder_frames<T>(keys, b, n), w);
      for (int64_t k = 0; k < count; ++k) {
        const SoftmaxSummary summary = softmax<W>(w.at(k), n);
        peaks.mutable_data_ptr<int64_t>()[row + k] = summary.peak;
        logsumexp.mutable_data_ptr<float>()[row + k] = summary.logsumexp();
      }
      average<W>(w, encoder_frames<T>(values, b, n), c);
    });
    for (int64_t k = 0; k < count; ++k) std::fill(w.at(k) + n, w.at(k) + shape.T, 0.0f);
    copy(c, shape.E, context.mutable_data_ptr<T>() + row * shape.E);
  }

  // Threads share the queries of all utterances.
  template <class T>
  void run() {
    const int64_t K = shape.K;
    at::parallel_for(0, shape.B * K, shape.grain(1), [&](int64_t begin, int64_t end) {
      PaddedRows queries(K, shape.D), scores(weights.numel() ? 0 : K, shape.T), contexts(K, shape.E);
      for (int64_t row = begin, count; row < end; row += count) {
        count = std::min(K - row % K, end - row);
        attend<T>(row / K, row % K, count, queries, scores, contexts);
      }
    });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& keys,
                                                                   const at::Tensor& values, const at::Tensor& lengths,
                                                                   double scale, bool weights) {
  check_inputs(query, keys, values, lengths);
  const AttentionShape shape(query, values);
  const auto [B, K, T, D, E] = std::tuple(shape.B, shape.K, shape.T, shape.D, shape.E);
  const auto float32 = query.options().dtype(at::kFloat);
  AttentionForward job{with_dense_rows(query),
                       with_dense_rows(keys),
                       with_dense_rows(values),
                       lengths.contiguous(),
                       float(scale),
                       at::empty({B, K, E}, values.options()),
                       weights ? at::empty({B, K, T}, float32) : at::empty({0, 0, 0}, float32),
                       at::empty({B, K}, lengths.options()),
                       at::empty({B, K}, float32),
                       shape};
  if (query.scalar_type() == at::kFloat) job.run<float>();
  else job.run<at::BFloat16>();
  return {job.context, job.weights, job.peaks, job.logsumexp};
}

// With W the weights, S the scores, C the context and dX the gradient of X:
//   dV = W^T dC;   dW' = dW + dC V^T;   dS = W * (dW' - rowsum(W * dW'));   dQ = scale dS K;   dK = scale dS^T Q
struct AttentionBackward {
  at::Tensor context_gradient, weights_gradient;  // each may be undefined
  at::Tensor query, keys, values, lengths, weights;
  float scale;
  bool memory;  // whether to compute the gradients of keys and values
  at::Tensor query_gradient, keys_gradient, values_gradient;
  AttentionShape shape;

  template <class T>
  QueryRows rows_of(const at::Tensor& x, int64_t b, PaddedRows& buffer, float factor = 1.0f) const {
    return buffer.fill(x.const_data_ptr<T>() + b * x.stride(0), x.stride(1), shape.K, x.size(2), factor);
  }

  struct Scratch {
    explicit Scratch(const AttentionShape& s)
        : query(s.K, s.D), query_gradient(s.K, s.D), context(s.K, s.E), weights(s.K, s.T), scores(s.K, s.T) {}
    PaddedRows query, query_gradient, context, weights, scores;
  };

  template <class T>
  void utterance(int64_t b, Scratch& scratch) {
    const int64_t K = shape.K, n = std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, shape.T);
    const EncoderFrames<const T> key = encoder_frames<T>(keys, b, n), value = encoder_frames<T>(values, b, n);
    const bool through_context = context_gradient.defined(), saved = weights.numel() > 0;
    const QueryRows w = saved ? rows_of<float>(weights, b, scratch.weights) : scratch.weights.rows(K);
    const QueryRows q = rows_of<T>(query, b, scratch.query, scale);
    const QueryRows dq = scratch.query_gradient.zeros(K);
    const QueryRows dc = through_context ? rows_of<T>(context_gradient, b, scratch.context) : scratch.context.zeros(K);
    const QueryRows dw = scratch.scores.zeros(K);
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      if (!saved) {
        dots<W>(q, key, w);
        for (int64_t k = 0; k < K; ++k) softmax<W>(w.at(k), n);
      }
      if (through_context) dots<W>(dc, value, dw);
      for (int64_t k = 0; k < K; ++k) {
        if (weights_gradient.defined()) add_weights_gradient(b, k, n, dw.at(k));
        las::softmax_backward<W>(w.at(k), dw.at(k), n, scale);
      }
      average<W>(dw, key, dq);
    });
    copy(dq, shape.D, query_gradient.mutable_data_ptr<T>() + b * K * shape.D);
    if (!memory) return;
    const EncoderFrames<T> dk = writable<T>(keys_gradient, b, n), dv = writable<T>(values_gradient, b, n);
    const QueryRows unscaled = rows_of<T>(query, b, scratch.query);
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      spread<W>(dw, unscaled, dk);
      spread<W>(w, dc, dv);
    });
    clear_padding(dk, shape.T);
    clear_padding(dv, shape.T);
  }

  LAS_INLINE void add_weights_gradient(int64_t b, int64_t k, int64_t n, float* gradient) const {
    const float* source = weights_gradient.const_data_ptr<float>() + b * weights_gradient.stride(0) +
                        k * weights_gradient.stride(1);
    for (int64_t t = 0; t < n; ++t) gradient[t] += source[t];
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
  const AttentionShape shape(query, values);
  const auto [B, K, T, D, E] = std::tuple(shape.B, shape.K, shape.T, shape.D, shape.E);
  las::check_tensor("context_gradient", context_gradient, {B, K, E}, values.scalar_type());
  las::check_tensor("weights_gradient", weights_gradient, {B, K, T}, at::kFloat);
  if (weights.numel()) las::check_tensor("weights", weights, {B, K, T}, at::kFloat);
  const auto dense = [](const std::optional<at::Tensor>& x) { return x ? with_dense_rows(*x) : at::Tensor(); };
  const auto memory_shape = [&](int64_t size) {
    return memory ? std::vector<int64_t>{B, T, size} : std::vector<int64_t>(3);
  };
  AttentionBackward job{dense(context_gradient),
                        dense(weights_gradient),
                        with_dense_rows(query),
                        with_dense_rows(keys),
                        with_dense_rows(values),
                        lengths.contiguous(),
                        with_dense_rows(weights),
                        float(scale),
                        memory,
                        at::empty({B, K, D}, query.options()),
                        at::empty(memory_shape(D), keys.options()),
                        at::empty(memory_shape(E), values.options()),
                        shape};
  if (query.scalar_type() == at::kFloat) job.run<float>();
  else job.run<at::BFloat16>();
  return {job.query_gradient, job.keys_gradient, job.values_gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("masked_attention_cpp", &forward);
  m.impl("masked_attention_backward_cpp", &backward);
}
