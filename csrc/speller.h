// The weights of the speller (las_fast/ops/speller.py), and layers packed for matmuls.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "int8.h"
#include "matmul.h"
#include "memory.h"
#include "packing.h"

namespace las {

// A RowBuffer filled with zeros.
template <class T = float>
struct ZeroedBuffer : RowBuffer<T> {
  ZeroedBuffer() = default;
  ZeroedBuffer(int64_t rows, int64_t size) : RowBuffer<T>(rows, size) { this->clear(); }
};

// Convert n values to another float type, with the processor's instruction where it has one.
template <class T>
void convert(const float* from, int64_t n, T* to) {
  int64_t done = 0;
#ifdef LAS_X86_INTRINSICS
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    if (has_bf16_dots()) las::convert_natively(from, done = n / 32 * 32, to);
#endif
  las::dispatch_width([&](auto width) __attribute__((always_inline)) {
    las::convert<width>(from + done, n - done, to + done);
  });
}

inline void convert(const c10::BFloat16* from, int64_t n, c10::BFloat16* to) { std::copy_n(from, n, to); }

// A packed layer, or some of its input columns: weights (outputs, inputs).
template <class T>
struct Layer {
  std::conditional_t<std::is_same_v<T, int8_t>, Int8Panels, Panels<T>> weights;
  std::vector<float> bias;  // (padded outputs,)
};

// Memory for packed layers, one after another. While `data` is null, it only counts their bytes. If `already_packed`,
// `data` holds the layers and nothing is written.
struct PackBuffer {
  uint8_t* take(int64_t bytes) {
    uint8_t* place = data ? data + used : nullptr;
    used += padded(bytes, CACHE_LINE);
    return place;
  }

  uint8_t* data = nullptr;
  bool already_packed = false;
  int64_t used = 0;
};

// Shapes and order are those of SpellerWeights in las_fast/ops/speller.py.
struct SpellerWeights {
  at::Tensor embedding, query, query_bias, project, project_bias, bias;
  std::vector<at::Tensor> gates, gate_biases;

  explicit SpellerWeights(at::TensorList list) {
    TORCH_CHECK(list.size() >= 8 && list.size() % 2 == 0,
                "weights must be 6 tensors and 2 per cell; got ", list.size());
    for (size_t i = 0; i < list.size(); ++i)
      TORCH_CHECK(list[i].scalar_type() == at::kFloat, "weights[", i, "] must be float32; got ",
                  list[i].scalar_type());
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

inline void check_weights(const SpellerWeights& w, int64_t D, int64_t E) {
  TORCH_CHECK(w.embedding.dim() == 2 && w.embedding.numel() > 0, "weights: embedding must be (V, M); got ",
              w.embedding.sizes());
  const int64_t V = w.embedding.size(0), M = w.embedding.size(1);
  int64_t input = M + E;
  for (size_t i = 0; i < w.gates.size(); ++i) {
    const int64_t size = w.gate_biases[i].numel() / 4;
    TORCH_CHECK(size > 0, "weights: gate_biases must be (4 * H,); got ", w.gate_biases[i].sizes());
    check_shape("gate_biases", w.gate_biases[i], {4 * size});
    check_shape("gates", w.gates[i], {4 * size, input + size});
    input = size;
  }
  const int64_t H = input;  // of the last cell
  check_shape("query", w.query, {D, H});
  check_shape("query_bias", w.query_bias, {D});
  check_shape("project", w.project, {M, H + E});
  check_shape("project_bias", w.project_bias, {M});
  check_shape("bias", w.bias, {V});
}

// The memory of the utterances: keys, values and lengths.
inline void check_memory(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths) {
  TORCH_CHECK(keys.dim() == 3 && keys.scalar_type() == at::kFloat, "keys must be (B, T, D) float32; got ",
              keys.sizes(), " ", keys.scalar_type());
  const int64_t B = keys.size(0);
  TORCH_CHECK(values.dim() == 3 && values.size(0) == B && values.size(1) == keys.size(1) &&
                  values.scalar_type() == at::kFloat,
              "values must be (B, T, E) float32 with B=", B, ", T=", keys.size(1), " like keys; got ", values.sizes(),
              " ", values.scalar_type());
  TORCH_CHECK(keys.size(2) > 0 && values.size(2) > 0, "keys and values must have at least 1 number per frame; got ",
              keys.sizes(), " and ", values.sizes());
  check_lengths("lengths", lengths, B);
}

// Pack columns [from, from + depth) of `weights` (outputs, inputs) and the bias into the next part of the buffer. Both
// are multiplied by `factor`, which must be 1 for int8.
template <class T>
Layer<T> pack_layer(const at::Tensor& weights, int64_t from, int64_t depth, const at::Tensor& bias, PackBuffer& buffer,
                    float factor = 1.0f) {
  const int64_t n = weights.size(0), stride = weights.size(1);
  const float* source = weights.const_data_ptr<float>() + from;
  Layer<T> packed{{}, std::vector<float>(padded(n))};
  for (int64_t i = 0; bias.defined() && i < n; ++i) packed.bias[i] = bias.const_data_ptr<float>()[i] * factor;
  if constexpr (std::is_same_v<T, int8_t>) {
    uint8_t* to = buffer.take(int8_bytes(n, depth));
    if (!to) return packed;
    if (!buffer.already_packed) las::pack(source, stride, n, depth, to);
    packed.weights = int8_panels(to, n, depth);
  } else {
    T* to = reinterpret_cast<T*>(buffer.take(packed_size<T>(n, depth) * sizeof(T)));
    if (!to) return packed;
    if (!buffer.already_packed) las::pack(source, stride, 1, n, depth, to, factor);
    packed.weights = {to, n, padded(depth, DEPTH_INTERLEAVE<T>)};
  }
  return packed;
}

// Call make(buffer) twice: to count the bytes, and to pack into `memory`, which then has that size. Return the second
// result.
template <class Make>
auto packed_in(AlignedArray<uint8_t>& memory, const Make& make) {
  PackBuffer buffer;
  make(buffer);
  memory = AlignedArray<uint8_t>(buffer.used);
  buffer = {memory.data()};
  return make(buffer);
}

}  // namespace las
