// The speller's weights, as ops/speller_search.py lists them, and their layers packed for products.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "int8.h"
#include "matmul.h"
#include "memory.h"
#include "packing.h"

namespace las {

// A buffer that begins as zeros.
template <class T = float>
struct Zeros : Buffer<T> {
  Zeros() = default;
  Zeros(int64_t rows, int64_t size) : Buffer<T>(rows, size) { this->clear(); }
};

template <class T>
void convert(const float* from, int64_t n, T* to) {
  int64_t done = 0;
#ifdef LAS_BF16_DOTS
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    if (has_bf16_dots()) las::round_natively(from, done = n / 32 * 32, to);
#endif
  las::widest([&](auto width) __attribute__((always_inline)) { las::convert<width>(from + done, n - done, to + done); });
}

inline void convert(const c10::BFloat16* from, int64_t n, c10::BFloat16* to) { std::copy_n(from, n, to); }

// A layer, or a part of one, packed.
template <class T>
struct Layer {
  std::conditional_t<std::is_same_v<T, int8_t>, Int8Panels, Panels<T>> weights;
  std::vector<float> bias;  // padded to whole panels
};

// Memory for packed layers, one after another. Without `data` it only counts what they take; where it is `full` they
// are there already.
struct Shelf {
  uint8_t* take(int64_t bytes) {
    uint8_t* place = data ? data + used : nullptr;
    used += padded(bytes, 64);
    return place;
  }

  uint8_t* data = nullptr;
  bool full = false;
  int64_t used = 0;
};

// In the order of las_fast/ops/speller_search.py: SpellerWeights.
struct Weights {
  at::Tensor embedding, query, query_bias, project, project_bias, bias;
  std::vector<at::Tensor> gates, gate_biases;

  explicit Weights(at::TensorList list) {
    TORCH_CHECK(list.size() >= 8 && list.size() % 2 == 0,
                "weights must be 6 tensors and 2 more for each cell; got ", list.size());
    for (const at::Tensor& x : list)
      TORCH_CHECK(x.scalar_type() == at::kFloat, "weights must be float32; got ", x.scalar_type());
    embedding = list[0].contiguous(), query = list[1].contiguous(), query_bias = list[2].contiguous();
    project = list[3].contiguous(), project_bias = list[4].contiguous(), bias = list[5].contiguous();
    for (size_t i = 6; i < list.size(); i += 2) {
      gates.push_back(list[i].contiguous());
      gate_biases.push_back(list[i + 1].contiguous());
    }
  }
};

inline void check_shape(const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(x.sizes() == shape, "weights: ", name, " must be ", shape, "; got ", x.sizes());
}

inline void check_weights(const Weights& w, int64_t D, int64_t E) {
  TORCH_CHECK(w.embedding.dim() == 2 && w.embedding.numel() > 0, "weights: embedding must be (V, M); got ",
              w.embedding.sizes());
  const int64_t V = w.embedding.size(0), M = w.embedding.size(1);
  int64_t below = M + E;
  for (size_t i = 0; i < w.gates.size(); ++i) {
    const int64_t size = w.gate_biases[i].numel() / 4;
    TORCH_CHECK(size > 0, "weights: gate_biases must be (4 * H,); got ", w.gate_biases[i].sizes());
    check_shape("gate_biases", w.gate_biases[i], {4 * size});
    check_shape("gates", w.gates[i], {4 * size, below + size});
    below = size;
  }
  check_shape("query", w.query, {D, below});
  check_shape("query_bias", w.query_bias, {D});
  check_shape("project", w.project, {M, below + E});
  check_shape("project_bias", w.project_bias, {M});
  check_shape("bias", w.bias, {V});
}

// What is read of the utterances: keys, values and the lengths of both.
inline void check_memory(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths) {
  TORCH_CHECK(keys.dim() == 3 && keys.scalar_type() == at::kFloat, "keys must be (B, T, D) float32; got ",
              keys.sizes(), " ", keys.scalar_type());
  const int64_t B = keys.size(0);
  TORCH_CHECK(values.dim() == 3 && values.size(0) == B && values.size(1) == keys.size(1) &&
                  values.scalar_type() == at::kFloat,
              "values must be (B, T, E) float32 with B=", B, ", T=", keys.size(1), " like keys; got ", values.sizes(),
              " ", values.scalar_type());
  TORCH_CHECK(keys.size(2) > 0 && values.size(2) > 0, "keys and values must have at least 1 number a frame; got ",
              keys.sizes(), " and ", values.sizes());
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == B && lengths.scalar_type() == at::kLong, "lengths must be (", B,
              ",) int64; got ", lengths.sizes(), " ", lengths.scalar_type());
}

// Columns from to from + depth of a matrix of weights (N, .), in the next place of the shelf.
template <class T>
Layer<T> layer(const at::Tensor& weights, int64_t from, int64_t depth, const at::Tensor& bias, Shelf& shelf,
               float factor = 1.0f) {
  const int64_t n = weights.size(0), stride = weights.size(1);
  const float* source = weights.const_data_ptr<float>() + from;
  Layer<T> made{{}, std::vector<float>(padded(n), 0.0f)};
  for (int64_t i = 0; bias.defined() && i < n; ++i) made.bias[i] = bias.const_data_ptr<float>()[i] * factor;
  if constexpr (std::is_same_v<T, int8_t>) {
    uint8_t* to = shelf.take(int8_bytes(n, depth));
    if (!to) return made;
    if (!shelf.full) las::pack(source, stride, n, depth, to);
    made.weights = int8_panels(to, n, depth);
  } else {
    T* to = reinterpret_cast<T*>(shelf.take(packed_size<T>(n, depth) * sizeof(T)));
    if (!to) return made;
    if (!shelf.full) las::pack(source, stride, 1, n, depth, to, factor);
    made.weights = {to, n, padded(depth, NEIGHBOURS<T>)};
  }
  return made;
}

// What make(shelf) makes of layers, packed into `memory`, which is made for it.
template <class Make>
auto shelved(Memory<uint8_t>& memory, const Make& make) {
  Shelf shelf;
  make(shelf);
  memory = Memory<uint8_t>(shelf.used);
  shelf = {memory.data()};
  return make(shelf);
}

}  // namespace las
