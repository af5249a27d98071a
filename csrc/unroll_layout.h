// The memory layout of the decoder pass of training: what the forward pass saves and the backward pass reads.

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

// The sizes of one call: M of the embedding, the others as in las_fast/ops/speller_unroll.py.
struct UnrollShape {
  int64_t B, U, T, D, E, V, M;
  std::vector<int64_t> H;  // of each cell

  UnrollShape(const SpellerWeights& w, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& tokens)
      : B(keys.size(0)), U(tokens.size(1)), T(keys.size(1)), D(keys.size(2)), E(values.size(2)),
        V(w.embedding.size(0)), M(w.embedding.size(1)) {
    for (const at::Tensor& bias : w.gate_biases) H.push_back(bias.numel() / 4);
  }
  int64_t cells() const { return int64_t(H.size()); }
  int64_t input_size(int64_t i) const { return i == 0 ? E : H[i - 1]; }  // of cell i, without its state and the token
  int64_t readout() const { return H.back() + E; }                       // [hidden_last, context], the output's input
};

// Where each part of a row begins; a row is one step of one utterance. There are three kinds of rows:
//   operands:  of each cell its input [context or the hidden state below, its own hidden state before] and its gates;
//              the readout [hidden_last, context] and the features, after GELU
//   states:    of each cell its cell state; the query, and project's outputs, before GELU
//   gradients: of the gates of each cell, the query, project's outputs and the logits
struct RowLayout {
  std::vector<int64_t> input, gates, cell, gate_gradients;
  int64_t readout, features, query, projected, query_gradient, projected_gradient, logits_gradient;
  int64_t operands = 0, states = 0, gradients = 0;  // values in a row

  explicit RowLayout(const UnrollShape& s) {
    const auto take = [](int64_t& end, int64_t size) { return std::exchange(end, end + padded(size)); };
    for (int64_t i = 0; i < s.cells(); ++i) input.push_back(take(operands, s.input_size(i) + s.H[i]));
    readout = take(operands, s.readout());
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

// What the forward pass saves: operands (steps, B, operand_row) and states (steps, B, state_row). It is all steps where
// there will be gradients, else the last two. The methods give `count` rows from utterance b on, from `place` in a row.
template <class Operand, class State>
struct SavedActivations {
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

// An empty tensor on large pages. On small ones the page faults would take longer than the values written.
template <class T>
at::Tensor on_large_pages(at::IntArrayRef shape) {
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
  auto memory = std::make_shared<AlignedArray<T>>(count);
  return at::from_blob(memory->data(), shape, [memory](void*) {}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

// The first `count` frames of utterance b of x (B, T, size).
template <class T>
EncoderFrames<const T> encoder_frames(const at::Tensor& x, int64_t b, int64_t count) {
  return {x.const_data_ptr<T>() + b * x.size(1) * x.size(2), x.size(2), count, x.size(2)};
}

template <class T>
const T* data(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

struct EncoderMemory {
  at::Tensor keys, values, lengths;  // (B, T, D), (B, T, E), (B,)

  int64_t valid_frames(int64_t b) const {
    return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, keys.size(1));
  }
};

inline float scale_of(const UnrollShape& shape) { return 1.0f / std::sqrt(float(shape.D)); }

}  // namespace las::unroll
