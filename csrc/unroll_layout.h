// Where the decoder pass of training keeps what its gradients read.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "memory.h"
#include "speller.h"

namespace las::unroll {

struct Shape {
  int64_t B, U, T, D, E, V, M;
  std::vector<int64_t> H;  // of each cell

  Shape(const Weights& w, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& tokens)
      : B(keys.size(0)), U(tokens.size(1)), T(keys.size(1)), D(keys.size(2)), E(values.size(2)),
        V(w.embedding.size(0)), M(w.embedding.size(1)) {
    for (const at::Tensor& bias : w.gate_biases) H.push_back(bias.numel() / 4);
  }
  int64_t cells() const { return int64_t(H.size()); }
  int64_t below(int64_t i) const { return i == 0 ? E : H[i - 1]; }  // what cell i reads beside its state and the token
  int64_t spoken() const { return H.back() + E; }                   // what the output reads
};

// Where each part of a row begins. Rows of operands: of cell i, [what is below, hidden_i before]; of the output,
// [hidden_last, context] and the features; the gates. Rows of states: the cells, the query, project's outputs. Rows of
// gradients: of the outputs of each layer.
struct Places {
  std::vector<int64_t> input, gates, cell, gate_gradients;
  int64_t spoken, features, query, projected, query_gradient, projected_gradient, logits_gradient;
  int64_t operands = 0, states = 0, gradients = 0;  // sizes of rows

  explicit Places(const Shape& s) {
    const auto take = [](int64_t& end, int64_t size) { return std::exchange(end, end + padded(size)); };
    for (int64_t i = 0; i < s.cells(); ++i) input.push_back(take(operands, s.below(i) + s.H[i]));
    spoken = take(operands, s.spoken());
    features = take(operands, s.M);
    for (int64_t size : s.H) {
      gates.push_back(take(operands, 4 * size));
      cell.push_back(take(states, size));
      gate_gradients.push_back(take(gradients, 4 * size));
    }
    query = take(states, s.D);
    projected = take(states, s.M);
    query_gradient = take(gradients, s.D);
    projected_gradient = take(gradients, s.M);
    logits_gradient = take(gradients, s.V);
  }
};

// What the forward pass keeps: of all steps where there will be gradients, else of two.
template <class Operand, class State>
struct Kept {
  Operand* operands;
  State* states;
  int64_t operand_row, state_row, B, steps;

  Matrix<Operand> operand(int64_t place, int64_t step, int64_t b, int64_t count) const {
    return {operands + (step % steps * B + b) * operand_row + place, operand_row, count};
  }
  Matrix<State> state(int64_t place, int64_t step, int64_t b, int64_t count) const {
    return {states + (step % steps * B + b) * state_row + place, state_row, count};
  }
};

// A tensor on large pages: a fresh one of small pages costs more than what is computed into it.
template <class T>
at::Tensor large(at::IntArrayRef shape) {
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
  auto memory = std::make_shared<las::Memory<T>>(count);
  return at::from_blob(memory->data(), shape, [memory](void*) {}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

template <class T>
Frames<const T> frames_of(const at::Tensor& x, int64_t b, int64_t count) {
  return {x.const_data_ptr<T>() + b * x.size(1) * x.size(2), x.size(2), count, x.size(2)};
}

template <class T>
const T* data(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

struct EncoderMemory {
  at::Tensor keys, values, lengths;

  int64_t frames(int64_t b) const { return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, keys.size(1)); }
};

inline float scale_of(const Shape& shape) { return 1.0f / std::sqrt(float(shape.D)); }

}  // namespace las::unroll
