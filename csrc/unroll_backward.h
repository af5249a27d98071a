// The backward pass of speller_unroll.cpp, in blocks of steps from the last to the first.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
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

constexpr int64_t BLOCK_ROWS = 1024;  // approximate rows of gradients per block: 12 MB for 3000 gates

// The layers, transposed and packed: they map the gradient of a layer's output to that of its input.
template <class T>
struct TransposedLayers {
  struct PackedMatrix {
    AlignedArray<T> memory;
    Panels<T> panels;
  };
  std::vector<PackedMatrix> cells;
  PackedMatrix token, query, project, output;

  TransposedLayers(const SpellerWeights& w, const UnrollShape& s)
      : token(pack(w.gates[0], 0, s.M)), query(pack(w.query, 0, s.H.back())), project(pack(w.project, 0, s.readout())),
        output(pack(w.embedding, 0, s.M)) {
    for (int64_t i = 0; i < s.cells(); ++i)
      cells.push_back(pack(w.gates[i], i == 0 ? s.M : 0, s.input_size(i) + s.H[i]));
  }

  // Pack columns [from, from + count) of `weights` (outputs, inputs).
  static PackedMatrix pack(const at::Tensor& weights, int64_t from, int64_t count) {
    PackedMatrix packed;
    packed.panels = las::pack<T>(weights.const_data_ptr<float>() + from, 1, weights.size(1), count, weights.size(0),
                                 packed.memory);
    return packed;
  }
};

// Compute the rows of some panels, from number `panel` on, of out (count, inputs.columns) = outputs (rows, count)^T
// inputs; add to `out` if `accumulate`. The number of panels is that of `transposed`.
template <class T>
void weight_gradient_rows(TransposedRows<T>& transposed, const Matrix<T>& outputs, int64_t count, int64_t panel,
                          const Panels<T>& inputs, int64_t rows, bool accumulate, const Matrix<float>& out) {
  const int64_t from = panel * COLUMNS, end = std::min(from + transposed.panels * COLUMNS, count);
  transposed.assign(from, end, [&](int64_t column, int64_t columns, T* to) {
    las::pack(static_cast<const T*>(outputs.at(0, column)), 1, outputs.stride, columns, rows, to);
  });
  transposed.multiply(inputs, accumulate, {out.at(from), out.stride, end - from});
}

// The gradient of a layer's weights: its output gradients (rows, output_size)^T times its inputs (rows, input_size).
struct WeightGradient {
  int64_t output_offset, output_size;  // in a row of gradients
  int64_t input_offset, input_size;    // in a row of operands
  Matrix<float> out;                   // (output_size, input_size)
};

// The inputs of the backward pass, besides the saved activations.
struct BackwardInputs {
  const float* attention;           // (B, U, T)
  const float* logits_gradient;     // (B, U, V), or null
  const float* attention_gradient;  // (B, U, T), or null
  const int64_t* tokens_read;       // (B, U)
};

template <class T>
struct UnrollBackward {
  const UnrollShape& shape;
  const RowLayout& layout;
  const TransposedLayers<T>& layers;
  const EncoderMemory& memory;
  const std::vector<at::Tensor>& masks;
  SavedActivations<const T, const float> saved;
  BackwardInputs in;

  int64_t steps;                                 // per block
  std::vector<ZeroedBuffer<>> inputs_gradient;   // (B, input_size(i) + H_i) per cell, of the following step
  std::vector<ZeroedBuffer<>> cell_gradient;     // (B, H_i) per cell, of the following step
  ZeroedBuffer<> readout_gradient;               // (B, H_last + E)
  AlignedArray<T> gradients;                     // (steps, B, layout.gradients)
  AlignedArray<float> score_gradients;           // (B, U, T)
  AlignedArray<float> context_gradients;         // (B, U, context_row)
  int64_t context_row;                           // E, padded
  ZeroedBuffer<> token_sums;                     // (V, 4 * H_1): gradients of the first cell's gates, summed per token
  std::vector<float> sums;                       // (layout.gradients,): gradients, summed over all rows

  UnrollBackward(const UnrollShape& s, const RowLayout& layout, const TransposedLayers<T>& layers,
                 const EncoderMemory& memory, const std::vector<at::Tensor>& masks,
                 const SavedActivations<const T, const float>& saved, const BackwardInputs& in)
      : shape(s), layout(layout), layers(layers), memory(memory), masks(masks), saved(saved), in(in),
        steps(std::clamp<int64_t>(BLOCK_ROWS / std::max<int64_t>(1, s.B), 1, s.U)),
        readout_gradient(s.B, s.readout()), gradients(steps * s.B * layout.gradients), score_gradients(s.B * s.U * s.T),
        context_gradients(s.B * s.U * padded(s.E)), context_row(padded(s.E)), token_sums(s.V, 4 * s.H[0]),
        sums(layout.gradients) {
    for (int64_t i = 0; i < s.cells(); ++i) {
      inputs_gradient.emplace_back(s.B, s.input_size(i) + s.H[i]);
      cell_gradient.emplace_back(s.B, s.H[i]);
    }
    std::fill_n(gradients.data(), steps * s.B * layout.gradients, T(0.0f));  // operands are padded with zeros
  }

  Matrix<T> gradient(int64_t offset, int64_t u, int64_t b, int64_t count) const {
    return {gradients.data() + (u % steps * shape.B + b) * layout.gradients + offset, layout.gradients, count};
  }

  // A task of a block: to pack a panel of a weight gradient's inputs, or to compute the rows of some panels of a weight
  // gradient. Threads take the tasks from a common queue, first those of packing.
  struct Task {
    size_t index;   // of the weight gradient
    int64_t panel;  // the first
  };

  // Panels per task of computing, so few that each thread has about four tasks.
  static int64_t panels_per_task(const std::vector<WeightGradient>& weight_gradients) {
    int64_t panels = 0;
    for (const WeightGradient& weights : weight_gradients) panels += padded(weights.output_size) / COLUMNS;
    return std::clamp<int64_t>(panels / (4 * at::get_num_threads()), 1, TransposedRows<T>::max_panels());
  }

  void run(const std::vector<WeightGradient>& weight_gradients) {
    std::vector<AlignedArray<T>> packed;
    std::vector<Task> packing, multiplying;
    const int64_t panels = panels_per_task(weight_gradients);
    for (size_t index = 0; index < weight_gradients.size(); ++index) {
      const WeightGradient& weights = weight_gradients[index];
      packed.emplace_back(packed_size<T>(weights.input_size, steps * shape.B));
      for (int64_t i = 0; i < padded(weights.input_size) / COLUMNS; ++i) packing.push_back({index, i});
      for (int64_t i = 0; i < padded(weights.output_size) / COLUMNS; i += panels) multiplying.push_back({index, i});
    }
    for (int64_t end = shape.U, begin; end > 0; end = begin) {
      begin = (end - 1) / steps * steps;
      const int64_t rows = (end - begin) * shape.B, depth = padded(rows, DEPTH_INTERLEAVE<T>);
      std::atomic<size_t> next{0};
      run_team(shape.B, widest_input(), [&](const TeamMember& member) {
        Scratch scratch(shape, member.count());
        for (int64_t u = end - 1; u >= begin; --u) step(scratch, member, u);
        for (size_t i; (i = next++) < packing.size();) {
          const auto [index, panel] = packing[i];
          const WeightGradient& weights = weight_gradients[index];
          const int64_t from = panel * COLUMNS;
          las::pack(saved.operand(weights.input_offset + from, begin, 0, rows).data, 1, saved.operand_row,
                    std::min(COLUMNS, weights.input_size - from), rows, packed[index].data() + from * depth);
        }
      });
      next = 0;
      at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
        TransposedRows<T> transposed(depth, panels);
        for (size_t i; (i = next++) < multiplying.size();) {
          const auto [index, panel] = multiplying[i];
          const WeightGradient& weights = weight_gradients[index];
          const Panels<T> inputs{packed[index].data(), weights.input_size, depth};
          weight_gradient_rows(transposed, gradient(weights.output_offset, begin, 0, rows), weights.output_size, panel,
                               inputs, rows, end < shape.U, weights.out);
        }
      });
      sum_gradients(begin, end);
    }
  }

  struct Scratch {
    ZeroedBuffer<> projected;           // (rows, M)
    ZeroedBuffer<> query;               // (1, D)
    std::vector<const float*> initial;  // (rows,)

    Scratch(const UnrollShape& s, int64_t rows) : projected(rows, s.M), query(1, s.D), initial(rows) {}
  };

  static Matrix<float> rows_of(ZeroedBuffer<>& buffer, int64_t b, int64_t count) {
    return {buffer.at(b), buffer.stride, count};
  }

  int64_t widest_input() const {
    int64_t widest = 0;
    for (int64_t i = 0; i < shape.cells(); ++i) widest = std::max(widest, shape.input_size(i) + shape.H[i]);
    return widest;
  }

  // Step u of a thread's utterances.
  void step(Scratch& scratch, const TeamMember& member, int64_t u) {
    const int64_t b = member.begin(), n = member.count(), first = member.first_row(), rows = member.row_count();
    output_backward(scratch, u, b, n);
    attention_backward(scratch, u, b, n);
    for (int64_t i = shape.cells() - 1; i >= 0; --i) {
      const bool last = i + 1 == shape.cells();
      cell_backward(i, u, b, n, rows_of(last ? readout_gradient : inputs_gradient[i + 1], b, n));
      member.wait();
      member.multiply(gradient(layout.gate_gradients[i], u, first, rows), layers.cells[i].panels, nullptr,
                      rows_of(inputs_gradient[i], first, rows));
      member.wait();
    }
  }

  void output_backward(Scratch& scratch, int64_t u, int64_t b, int64_t n) {
    const Matrix<T> logits_gradient = gradient(layout.logits_gradient, u, b, n);
    const Matrix<T> projected_gradient = gradient(layout.projected_gradient, u, b, n);
    const Matrix<const float> projected = saved.state(layout.projected, u, b, n);
    for (int64_t r = 0; r < n; ++r)
      if (in.logits_gradient)
        convert(in.logits_gradient + ((b + r) * shape.U + u) * shape.V, shape.V, logits_gradient.at(r));
    matmul(logits_gradient, layers.output.panels, nullptr, scratch.projected.rows(n));
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r)
        for_each_vector<W>(shape.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> slope = gelu_derivative<W>(load<W>(projected.at(r, j), lanes));
          store<W>(projected_gradient.at(r, j), slope * load<W>(scratch.projected.at(r) + j, lanes), lanes);
        });
    });
    matmul(projected_gradient, layers.project.panels, nullptr, rows_of(readout_gradient, b, n));
  }

  // Compute the gradients of scores, contexts and queries, and add the query's share to that of the last hidden state.
  void attention_backward(Scratch& scratch, int64_t u, int64_t first, int64_t n) {
    const float scale = attention_scale(shape);
    const int64_t H = shape.H.back(), E = shape.E;
    const Matrix<T> queries = gradient(layout.query_gradient, u, first, n);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t b = first + r, at = b * shape.U + u, frames = memory.valid_frames(b);
        float *scores = score_gradients.data() + at * shape.T, *context = context_gradients.data() + at * context_row;
        float* query = scratch.query.at(0);
        for (int64_t e = 0; e < E; ++e) context[e] = readout_gradient.at(b)[H + e] + inputs_gradient[0].at(b)[e];
        std::fill(context + E, context + context_row, 0.0f);
        const auto keys = encoder_frames<float>(memory.keys, b, frames);
        const auto values = encoder_frames<float>(memory.values, b, frames);
        dots<W>(one_row(context), values, one_row(scores));
        if (in.attention_gradient)
          for (int64_t t = 0; t < frames; ++t) scores[t] += in.attention_gradient[at * shape.T + t];
        softmax_backward<W>(in.attention + at * shape.T, scores, frames, 1.0f);
        std::fill_n(query, shape.D, 0.0f);
        average<W>(one_row(scores), keys, one_row(query));
        convert<W>(query, shape.D, queries.at(r), scale);
      }
    });
    // This may overwrite the context's columns, which follow those of the hidden state and have been read above.
    const Matrix<float> readout = rows_of(readout_gradient, first, n);
    for (int64_t r = 0; r < n; ++r) scratch.initial[r] = readout.at(r);
    matmul(queries, layers.query.panels, scratch.initial.data(), readout);
  }

  // Compute the gradients of the gates of cell i and of its previous cell state from `output`, the gradient of its
  // hidden state after dropout.
  void cell_backward(int64_t i, int64_t u, int64_t b, int64_t n, const Matrix<float>& output) {
    const int64_t size = shape.H[i], input_size = shape.input_size(i);
    const Matrix<const T> gates = saved.operand(layout.gates[i], u, b, n);
    const Matrix<const float> cell = saved.state(layout.cell[i], u, b, n);
    const Matrix<const float> cell_before = saved.state(layout.cell[i], std::max<int64_t>(u - 1, 0), b, n);
    const Matrix<T> out = gradient(layout.gate_gradients[i], u, b, n);
    const Matrix<float> hidden = rows_of(inputs_gradient[i], b, n), carried = rows_of(cell_gradient[i], b, n);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const float* mask = masks.empty() ? nullptr : masks[i].const_data_ptr<float>() + (b + r) * size;
        for_each_vector<W>(size, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const LstmGates<W> activated = load_gates<W>(gates.at(r, j), size, lanes);
          const Float<W> tanh_cell = tanh<W>(load<W>(cell.at(r, j), lanes));
          const Float<W> before = u > 0 ? load<W>(cell_before.at(r, j), lanes) : Float<W>{};
          Float<W> dh = load<W>(output.at(r, j), lanes);
          if (mask) dh *= load<W>(mask + j, lanes);
          dh += load<W>(hidden.at(r, input_size + j), lanes);
          const Float<W> dc = load<W>(carried.at(r, j), lanes) + lstm_cell_gradient<W>(activated, tanh_cell, dh);
          store_gates<W>(out.at(r, j), size, lstm_gate_gradients<W>(activated, tanh_cell, before, dh, dc), lanes);
          store<W>(carried.at(r, j), dc * activated.forget, lanes);
        });
      }
    });
  }

  // Add the rows of gradients of steps [begin, end) to `sums`, and those of the first cell's gates to `token_sums`.
  void sum_gradients(int64_t begin, int64_t end) {
    at::parallel_for(0, layout.gradients / COLUMNS, 16, [&](int64_t first, int64_t last) {
      const int64_t begin_column = first * COLUMNS, end_column = last * COLUMNS;
      const int64_t end_gate = std::min(end_column, 4 * shape.H[0]);
      dispatch_width([&](auto width) __attribute__((always_inline)) {
        constexpr int W = width;
        const auto add = [](const T* row, int64_t n, float* sum) __attribute__((always_inline)) {
          for_each_vector<W>(n, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
            store<W>(sum + j, load<W>(sum + j, lanes) + load<W>(row + j, lanes), lanes);
          });
        };
        for (int64_t u = begin; u < end; ++u)
          for (int64_t b = 0; b < shape.B; ++b) {
            const T* row = gradient(0, u, b, 1).data;
            add(row + begin_column, end_column - begin_column, sums.data() + begin_column);
            if (begin_column < end_gate)
              add(row + begin_column, end_gate - begin_column,
                  token_sums.at(in.tokens_read[b * shape.U + u]) + begin_column);
          }
      });
    });
  }

  // The backward pass of compute_token_gates. Set the token columns of `gates`, the gradient of the first cell's
  // weights. Add to the gradient of the embedding, which already has that of the output layer: both use the same
  // weights.
  void token_gates_backward(const SpellerWeights& w, const Matrix<float>& gates, const Matrix<float>& embedding) {
    const int64_t V = shape.V, M = shape.M, size = 4 * shape.H[0];
    ZeroedBuffer<T> summed(V, size), embedded(V, M);
    std::vector<const float*> initial(V);
    for (int64_t v = 0; v < V; ++v) {
      convert(token_sums.at(v), size, summed.at(v));
      convert(w.embedding.const_data_ptr<float>() + v * M, M, embedded.at(v));
      initial[v] = embedding.at(v);
    }
    matmul(summed.rows(V), layers.token.panels, initial.data(), embedding);
    AlignedArray<T> packed(packed_size<T>(M, V));
    const Panels<T> inputs = las::pack(static_cast<const T*>(embedded.at(0)), 1, embedded.stride, M, V, packed.data());
    ZeroedBuffer<> token_columns(size, M);
    TransposedRows<T> transposed(inputs.depth, TransposedRows<T>::max_panels());
    for (int64_t i = 0; i < padded(size) / COLUMNS; i += transposed.panels)
      weight_gradient_rows(transposed, summed.rows(V), size, i, inputs, V, false, token_columns.rows(size));
    for (int64_t i = 0; i < size; ++i) std::copy_n(token_columns.at(i), M, gates.at(i));
  }

  // The gradients of keys (B, T, D) and values (B, T, E), zero past the lengths.
  void memory_gradients(float* keys, float* values) const {
    at::parallel_for(0, shape.B, 1, [&](int64_t begin, int64_t end) {
      ZeroedBuffer<> queries_of_b(shape.U, shape.D);  // contiguous; the saved queries are a step apart
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = memory.valid_frames(b), U = shape.U, T_ = shape.T;
        for (int64_t u = 0; u < U; ++u)
          std::copy_n(saved.state(layout.query, u, b, 1).data, shape.D, queries_of_b.at(u));
        const EncoderFrames<float> dk{keys + b * T_ * shape.D, shape.D, n, shape.D};
        const EncoderFrames<float> dv{values + b * T_ * shape.E, shape.E, n, shape.E};
        const QueryRows scores{score_gradients.data() + b * U * T_, T_, U};
        const QueryRows weights{const_cast<float*>(in.attention) + b * U * T_, T_, U};  // only read
        const QueryRows contexts{context_gradients.data() + b * U * context_row, context_row, U};
        const QueryRows queries{queries_of_b.at(0), queries_of_b.stride, U};
        dispatch_width([&](auto width) __attribute__((always_inline)) {
          spread<width>(scores, queries, dk);
          spread<width>(weights, contexts, dv);
        });
        std::fill(dk.at(n), dk.at(T_), 0.0f);
        std::fill(dv.at(n), dv.at(T_), 0.0f);
      }
    });
  }
};

}  // namespace las::unroll
