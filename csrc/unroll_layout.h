// The memory layout of the decoder pass of training: the activations that the forward pass saves for the backward pass.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "memory.h"
#include "speller.h"

namespace las::unroll {

// The sizes of one call. M is the size of the embedding; the others are as in las_fast/ops/speller_unroll.py.
struct UnrollShape {
  int64_t B, U, T, D, E, V, M;
  std::vector<int64_t> H;  // per cell

  UnrollShape(const SpellerWeights& w, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& tokens)
      : B(keys.size(0)), U(tokens.size(1)), T(keys.size(1)), D(keys.size(2)), E(values.size(2)),
        V(w.embedding.size(0)), M(w.embedding.size(1)) {
    for (const at::Tensor& bias : w.gate_biases) H.push_back(bias.numel() / 4);
  }
  int64_t cells() const { return int64_t(H.size()); }
  int64_t input_size(int64_t i) const { return i == 0 ? E : H[i - 1]; }  // without the hidden state and the token
  int64_t readout() const { return H.back() + E; }                       // size of [hidden_last, context]
};

// The offset of each part in a row. A row is one step of one utterance. There are three kinds of rows:
//   operands:  per cell, the input [context or hidden state of the cell below, previous hidden state] and the gates;
//              the readout [hidden_last, context] and the features (project's outputs after GELU)
//   states:    per cell, the cell state; the query and project's outputs before GELU
//   gradients: those of the gates of each cell, the query, project's outputs and the logits
struct RowLayout {
  std::vector<int64_t> input, gates, cell, gate_gradients;
  int64_t readout, features, query, projected, query_gradient, projected_gradient, logits_gradient;
  int64_t operands = 0, states = 0, gradients = 0;  // values per row

  explicit RowLayout(const UnrollShape& s) {
    const auto append = [](int64_t& end, int64_t size) { return std::exchange(end, end + padded(size)); };
    for (int64_t i = 0; i < s.cells(); ++i) input.push_back(append(operands, s.input_size(i) + s.H[i]));
    readout = append(operands, s.readout());
    features = append(operands, s.M);
    for (int64_t size : s.H) {
      gates.push_back(append(operands, 4 * size));
      cell.push_back(append(states, size));
      gate_gradients.push_back(append(gradients, 4 * size));
    }
    query = append(states, s.D);
    projected = append(states, s.M);
    query_gradient = append(gradients, s.D);
    projected_gradient = append(gradients, s.M);
    logits_gradient = append(gradients, s.V);
  }
};

// The saved rows: operands (steps, B, operand_row) and states (steps, B, state_row). All steps are saved for a backward
// pass, otherwise only the last two. The methods return `count` rows from utterance b on, each from `offset` on.
template <class Operand, class State>
struct SavedActivations {
  Operand* operands;
  State* states;
  int64_t operand_row, state_row, B, steps;

  Matrix<Operand> operand(int64_t offset, int64_t step, int64_t b, int64_t count) const {
    return {operands + (step % steps * B + b) * operand_row + offset, operand_row, count};
  }
  Matrix<State> state(int64_t offset, int64_t step, int64_t b, int64_t count) const {
    return {states + (step % steps * B + b) * state_row + offset, state_row, count};
  }
};

// An uninitialised tensor on huge pages. On small pages the page faults would take longer than writing the values.
template <class T>
at::Tensor empty_on_huge_pages(at::IntArrayRef shape) {
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
  auto memory = std::make_shared<AlignedArray<T>>(count);
  const at::TensorOptions options(c10::CppTypeToScalarType<T>::value);
  return at::from_blob(memory->data(), shape, [memory](void*) {}, options);
}

// The first `count` frames of utterance b of x (B, T, size).
template <class T>
EncoderFrames<const T> encoder_frames(const at::Tensor& x, int64_t b, int64_t count) {
  return {x.const_data_ptr<T>() + b * x.size(1) * x.size(2), x.size(2), count, x.size(2)};
}

struct EncoderMemory {
  at::Tensor keys, values, lengths;  // (B, T, D), (B, T, E), (B,)

  int64_t valid_frames(int64_t b) const {
    return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, keys.size(1));
  }
};

inline float attention_scale(const UnrollShape& shape) { return 1.0f / std::sqrt(float(shape.D)); }

}  // namespace las::unroll
