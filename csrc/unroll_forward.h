// The forward pass of speller_unroll.cpp.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "activations.h"
#include "attention.h"
#include "lstm.h"
#include "matmul.h"
#include "memory.h"
#include "packing.h"
#include "softmax.h"
#include "speller.h"
#include "team.h"
#include "unroll_layout.h"
#include "vector.h"

namespace las::unroll {

// The layers, packed for matmul.
template <class T>
struct PackedLayers {
  std::vector<Layer<T>> cells;
  Layer<T> query, project, output;

  PackedLayers(const SpellerWeights& w, const UnrollShape& s, PackBuffer& buffer)
      : query(pack_layer<T>(w.query, 0, s.H.back(), w.query_bias, buffer, attention_scale(s))),
        project(pack_layer<T>(w.project, 0, s.readout(), w.project_bias, buffer)),
        output(pack_layer<T>(w.embedding, 0, s.M, w.bias, buffer)) {
    for (int64_t i = 0; i < s.cells(); ++i) {
      const at::Tensor bias = i ? w.gate_biases[i] : at::Tensor();  // that of the first cell is in token_gates
      cells.push_back(pack_layer<T>(w.gates[i], i == 0 ? s.M : 0, s.input_size(i) + s.H[i], bias, buffer));
    }
  }
};

// Compute the contribution of each token to the gates of the first cell, bias included: (V, 4 * H_1).
template <class T>
ZeroedBuffer<> compute_token_gates(const SpellerWeights& w, const UnrollShape& s) {
  AlignedArray<uint8_t> memory;
  const Layer<T> token = packed_in(
      memory, [&](PackBuffer& buffer) { return pack_layer<T>(w.gates[0], 0, s.M, w.gate_biases[0], buffer); });
  ZeroedBuffer<> gates(s.V, 4 * s.H[0]);
  ZeroedBuffer<T> embedded(s.V, s.M);
  const std::vector<const float*> bias(s.V, token.bias.data());
  at::parallel_for(0, s.V, 32, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      convert(w.embedding.const_data_ptr<float>() + v * s.M, s.M, embedded.at(v));
    matmul(Matrix<T>{embedded.at(begin), embedded.stride, end - begin}, token.weights, bias.data(),
           Matrix<float>{gates.at(begin), gates.stride, end - begin});
  });
  return gates;
}

template <class T>
struct UnrollForward {
  const UnrollShape& shape;
  const RowLayout& layout;
  const PackedLayers<T>& layers;
  const ZeroedBuffer<>& token_gates;
  const EncoderMemory& memory;
  const std::vector<at::Tensor>& masks;
  SavedActivations<T, float> saved;
  const int64_t* true_tokens;  // (B, U)
  const bool* sampled;         // (B, U)
  float *logits, *attention;   // (B, U, V), (B, U, T)
  int64_t* tokens_read;        // (B, U)

  // The utterances of one thread, [begin, begin + count), and its buffers.
  struct UtteranceGroup {
    const TeamMember& member;
    int64_t begin, count;
    ZeroedBuffer<> sums;               // (count, V)
    ZeroedBuffer<> context;            // (1, E)
    std::vector<const float*> bias;    // (count,)
    std::vector<int64_t> best_tokens;  // (count,): most probable token of the previous step
  };

  // The gates of all utterances, which threads share.
  struct Gates {
    ZeroedBuffer<> sums;                // (B, max of 4 * H_i)
    std::vector<const float*> initial;  // (B,)
  };

  void run() {
    const int64_t most = 4 * *std::max_element(shape.H.begin(), shape.H.end());
    Gates gates{ZeroedBuffer<>(shape.B, most), std::vector<const float*>(shape.B)};
    run_team(shape.B, most, [&](const TeamMember& member) { run_group(member, gates); });
  }

  void run_group(const TeamMember& member, Gates& gates) {
    const int64_t count = member.count();
    UtteranceGroup group{member,
                         member.begin(),
                         count,
                         ZeroedBuffer<>(count, shape.V),
                         ZeroedBuffer<>(1, shape.E),
                         std::vector<const float*>(count),
                         std::vector<int64_t>(count)};
    for (int64_t i = 0; i < shape.cells(); ++i) clear(group, layout.input[i], 0, 0, shape.input_size(i) + shape.H[i]);
    for (int64_t u = 0; u < shape.U; ++u) {
      clear_padding(group, u);
      choose_tokens(group, u);
      for (int64_t i = 0; i < shape.cells(); ++i) step_cell(group, gates, i, u);
      attend(group, u);
      compute_logits(group, u);
    }
  }

  // Zero columns [from, to) of the operands at `offset`.
  void clear(const UtteranceGroup& group, int64_t offset, int64_t u, int64_t from, int64_t to) const {
    const Matrix<T> all = saved.operand(offset, u, group.begin, group.count);
    for (int64_t r = 0; r < group.count; ++r) std::fill(all.at(r, from), all.at(r, to), T(0.0f));
  }

  // Zero the padding between the parts of a row: a matmul of bfloat16 reads one value past an operand of odd size.
  void clear_padding(const UtteranceGroup& group, int64_t u) const {
    const auto after = [&](int64_t offset, int64_t size) { clear(group, offset, u, size, padded(size)); };
    for (int64_t i = 0; i < shape.cells(); ++i) {
      after(layout.input[i], shape.input_size(i) + shape.H[i]);
      after(layout.gates[i], 4 * shape.H[i]);
      const Matrix<float> cell = saved.state(layout.cell[i], u, group.begin, group.count);
      for (int64_t r = 0; r < group.count; ++r)
        std::fill(cell.at(r, shape.H[i]), cell.at(r, padded(shape.H[i])), 0.0f);
    }
    after(layout.features, shape.M);
    after(layout.readout, shape.readout());
    const int64_t H = shape.H.back();  // the query's matmul reads the hidden state alone; the context is written later
    clear(group, layout.readout, u, H, padded(H, DEPTH_INTERLEAVE<T>));
  }

  void choose_tokens(const UtteranceGroup& group, int64_t u) const {
    for (int64_t r = 0; r < group.count; ++r) {
      const int64_t at = (group.begin + r) * shape.U + u;
      tokens_read[at] = u > 0 && sampled[at] ? group.best_tokens[r] : true_tokens[at];
    }
  }

  InitialSums broadcast_bias(UtteranceGroup& group, const std::vector<float>& bias) const {
    std::fill(group.bias.begin(), group.bias.end(), bias.data());
    return group.bias.data();
  }

  // Compute the sums of the gates of cell i at step u: this thread's utterances, or its columns of all.
  void sum_gates(const UtteranceGroup& group, Gates& gates, int64_t i, int64_t u) const {
    const TeamMember& member = group.member;
    for (int64_t b = group.begin; b < group.begin + group.count; ++b)
      gates.initial[b] = i == 0 ? token_gates.at(tokens_read[b * shape.U + u]) : layers.cells[i].bias.data();
    member.wait();
    const int64_t first = member.first_row(), n = member.row_count();
    member.multiply(saved.operand(layout.input[i], u, first, n), layers.cells[i].weights, gates.initial.data() + first,
                    {gates.sums.at(first), gates.sums.stride, n});
    member.wait();
  }

  // Compute the state of cell i after step u.
  void step_cell(const UtteranceGroup& group, Gates& all_gates, int64_t i, int64_t u) const {
    const auto [begin, n] = std::pair(group.begin, group.count);
    sum_gates(group, all_gates, i, u);
    const int64_t size = shape.H[i];
    const bool last = i + 1 == shape.cells();
    const Matrix<T> gates = saved.operand(layout.gates[i], u, begin, n);
    const Matrix<float> cell = saved.state(layout.cell[i], u, begin, n);
    const Matrix<float> cell_before = saved.state(layout.cell[i], u + saved.steps - 1, begin, n);
    const Matrix<T> hidden = saved.operand(layout.input[i] + shape.input_size(i), u + 1, begin, n);
    const Matrix<T> layer_above = saved.operand(last ? layout.readout : layout.input[i + 1], u, begin, n);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const float* sums = all_gates.sums.at(begin + r);
        const float* mask = masks.empty() ? nullptr : masks[i].const_data_ptr<float>() + (begin + r) * size;
        for_each_vector<W>(size, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const LstmGates<W> activated = las::activate_gates<W>(sums + j, size, lanes);
          const Float<W> retained = u > 0 ? activated.forget * load<W>(cell_before.at(r, j), lanes) : Float<W>{};
          const LstmState<W> after = lstm_step<W>(activated, retained);
          store_gates<W>(gates.at(r, j), size, activated, lanes);
          store<W>(cell.at(r, j), after.cell, lanes);
          if (u + 1 < shape.U) store<W>(hidden.at(r, j), after.hidden, lanes);
          const Float<W> output = mask ? after.hidden * load<W>(mask + j, lanes) : after.hidden;
          store<W>(layer_above.at(r, j), output, lanes);
        });
      }
    });
  }

  // Compute the attention and the context of step u.
  void attend(UtteranceGroup& group, int64_t u) const {
    const auto [begin, n] = std::pair(group.begin, group.count);
    const int64_t H = shape.H.back(), E = shape.E;
    const Matrix<float> queries = saved.state(layout.query, u, begin, n);
    const Matrix<T> readout = saved.operand(layout.readout, u, begin, n);
    const Matrix<T> next = saved.operand(layout.input[0], u + 1, begin, n);
    matmul(readout, layers.query.weights, broadcast_bias(group, layers.query.bias), queries);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t b = begin + r, frames = memory.valid_frames(b);
        float *weights = attention + (b * shape.U + u) * shape.T, *context = group.context.at(0);
        std::fill_n(context, E, 0.0f);
        const auto keys = encoder_frames<float>(memory.keys, b, frames);
        const auto values = encoder_frames<float>(memory.values, b, frames);
        dots<W>(one_row(queries.at(r)), keys, one_row(weights));
        softmax<W>(weights, frames);
        std::fill(weights + frames, weights + shape.T, 0.0f);
        average<W>(one_row(weights), values, one_row(context));
        convert<W>(context, E, readout.at(r, H));
        if (u + 1 < shape.U) convert<W>(context, E, next.at(r));
      }
    });
  }

  void compute_logits(UtteranceGroup& group, int64_t u) const {
    const auto [begin, n] = std::pair(group.begin, group.count);
    const Matrix<float> projected = saved.state(layout.projected, u, begin, n);
    const Matrix<T> features = saved.operand(layout.features, u, begin, n);
    matmul(saved.operand(layout.readout, u, begin, n), layers.project.weights,
           broadcast_bias(group, layers.project.bias), projected);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r)
        for_each_vector<W>(shape.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          store<W>(features.at(r, j), gelu<W>(load<W>(projected.at(r, j), lanes)), lanes);
        });
    });
    matmul(features, layers.output.weights, broadcast_bias(group, layers.output.bias), group.sums.rows(n));
    for (int64_t r = 0; r < n; ++r) {
      const float* row = group.sums.at(r);
      std::copy_n(row, shape.V, logits + ((begin + r) * shape.U + u) * shape.V);
      group.best_tokens[r] = std::max_element(row, row + shape.V) - row;
    }
  }
};

}  // namespace las::unroll
