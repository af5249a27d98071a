// The backward pass of speller_unroll.cpp.

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
#include "unroll_layout.h"
#include "vector.h"

namespace las::unroll {

constexpr int64_t BLOCK = 1024;  // rows of gradients that are kept at a time, about: 12 MB at 3000 gates

// The layers the other way, from the gradient of outputs to that of inputs.
template <class T>
struct Transposed {
  struct Packed {
    las::Memory<T> memory;
    Panels<T> panels;
  };
  std::vector<Packed> cells;
  Packed token, query, project, output;

  Transposed(const Weights& w, const Shape& s)
      : token(pack(w.gates[0], 0, s.M)), query(pack(w.query, 0, s.H.back())), project(pack(w.project, 0, s.spoken())),
        output(pack(w.embedding, 0, s.M)) {
    for (int64_t i = 0; i < s.cells(); ++i)
      cells.push_back(pack(w.gates[i], i == 0 ? s.M : 0, s.below(i) + s.H[i]));
  }

  // Columns from to from + count of the weights (N, .).
  static Packed pack(const at::Tensor& weights, int64_t from, int64_t count) {
    Packed made;
    made.panels = las::pack<T>(weights.const_data_ptr<float>() + from, 1, weights.size(1), count, weights.size(0),
                               made.memory);
    return made;
  }
};

// Panel `panel` of the rows of out = outputs^T inputs, added to what is there if there is `more`. `room` is for a panel.
template <class T>
void multiply(const Matrix<T>& outputs, int64_t count, int64_t panel, const Panels<T>& inputs, int64_t rows, bool more,
              T* room, const Matrix<float>& out) {
  const int64_t from = panel * COLUMNS, here = std::min(COLUMNS, count - from);
  las::pack(static_cast<const T*>(outputs.at(0, from)), 1, outputs.stride, here, rows, room);
  las::transposed_product({room, here}, inputs, more, Matrix<float>{out.at(from), out.stride, here});
}

// The gradient of a layer's weights: outputs (rows, count)^T times inputs (rows, size), to be found in `out`.
struct Gradient {
  int64_t outputs, count;  // place in a row of gradients
  int64_t inputs, size;    // place in a row of operands
  Matrix<float> out;
};

// What the backward pass is given, beside what the forward pass kept.
struct Given {
  const float *attention, *logits_gradient, *weights_gradient;  // the gradients may be null: none
  const int64_t* read;
};

template <class T>
struct Backward {
  const Shape& shape;
  const Places& places;
  const Transposed<T>& layers;
  const EncoderMemory& memory;
  const std::vector<at::Tensor>& masks;
  Kept<const T, const float> kept;
  Given given;

  int64_t steps;                                         // of a block
  std::vector<Zeros<>> inputs_gradient, cell_gradient;   // (B, .) of each cell, at the step after
  Zeros<> spoken_gradient;                               // (B, .)
  las::Memory<T> gradients;                              // rows of a block
  las::Memory<float> score_gradients, context_gradients;  // (B, U, T), (B, U, context_row)
  int64_t context_row;
  Zeros<> token_sums;      // (V, 4 * H_1): of the first cell's gates' gradients
  std::vector<float> sums;  // of all rows of gradients

  Backward(const Shape& s, const Places& p, const Transposed<T>& layers, const EncoderMemory& memory,
           const std::vector<at::Tensor>& masks, const Kept<const T, const float>& kept, const Given& given)
      : shape(s), places(p), layers(layers), memory(memory), masks(masks), kept(kept), given(given),
        steps(std::clamp<int64_t>(BLOCK / std::max<int64_t>(1, s.B), 1, s.U)),
        spoken_gradient(s.B, s.spoken()), gradients(steps * s.B * p.gradients), score_gradients(s.B * s.U * s.T),
        context_gradients(s.B * s.U * padded(s.E)), context_row(padded(s.E)), token_sums(s.V, 4 * s.H[0]),
        sums(p.gradients) {
    for (int64_t i = 0; i < s.cells(); ++i) {
      inputs_gradient.emplace_back(s.B, s.below(i) + s.H[i]);
      cell_gradient.emplace_back(s.B, s.H[i]);
    }
    std::fill_n(gradients.data(), steps * s.B * p.gradients, T(0.0f));  // operands are padded with zeros
  }

  Matrix<T> gradient(int64_t place, int64_t u, int64_t b, int64_t count) const {
    return {gradients.data() + (u % steps * shape.B + b) * places.gradients + place, places.gradients, count};
  }

  // Tasks of a block for the threads to take from a common queue: panels of inputs to pack, then of outputs to multiply.
  struct Task {
    size_t of;
    int64_t panel;
  };

  void run(const std::vector<Gradient>& wanted) {
    std::vector<las::Memory<T>> packed;
    std::vector<Task> packing, multiplying;
    for (size_t of = 0; of < wanted.size(); ++of) {
      packed.emplace_back(las::packed_size<T>(wanted[of].size, steps * shape.B));
      for (int64_t i = 0; i < padded(wanted[of].size) / COLUMNS; ++i) packing.push_back({of, i});
      for (int64_t i = 0; i < padded(wanted[of].count) / COLUMNS; ++i) multiplying.push_back({of, i});
    }
    for (int64_t end = shape.U, begin; end > 0; end = begin) {
      begin = (end - 1) / steps * steps;
      const int64_t rows = (end - begin) * shape.B, depth = padded(rows, las::NEIGHBOURS<T>);
      std::atomic<size_t> next{0};
      at::parallel_for(0, shape.B, 1, [&](int64_t first, int64_t last) {
        Scratch scratch(shape, last - first);
        for (int64_t u = end - 1; u >= begin; --u) step(scratch, u, first, last - first);
        for (size_t i; (i = next++) < packing.size();) {
          const Gradient& one = wanted[packing[i].of];
          const int64_t from = packing[i].panel * COLUMNS;
          las::pack(kept.operand(one.inputs + from, begin, 0, rows).data, 1, kept.operand_row,
                    std::min(COLUMNS, one.size - from), rows, packed[packing[i].of].data() + from * depth);
        }
      });
      next = 0;
      at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
        las::Memory<T> room(las::packed_size<T>(COLUMNS, rows));
        for (size_t i; (i = next++) < multiplying.size();) {
          const auto [of, panel] = multiplying[i];
          const Gradient& one = wanted[of];
          multiply(gradient(one.outputs, begin, 0, rows), one.count, panel, {packed[of].data(), one.size, depth}, rows,
                   end < shape.U, room.data(), one.out);
        }
      });
      add_up(begin, end);
    }
  }

  struct Scratch {
    Zeros<> projected, query;
    std::vector<const float*> starts;

    Scratch(const Shape& s, int64_t rows) : projected(rows, s.M), query(1, s.D), starts(rows) {}
  };

  static Matrix<float> of(Zeros<>& buffer, int64_t b, int64_t count) { return {buffer.at(b), buffer.stride, count}; }

  void step(Scratch& scratch, int64_t u, int64_t b, int64_t n) {
    through_output(scratch, u, b, n);
    through_attention(scratch, u, b, n);
    for (int64_t i = shape.cells() - 1; i >= 0; --i) {
      const bool last = i + 1 == shape.cells();
      through_cell(i, u, b, n, of(last ? spoken_gradient : inputs_gradient[i + 1], b, n));
      las::product(gradient(places.gate_gradients[i], u, b, n), layers.cells[i].panels, nullptr,
                   of(inputs_gradient[i], b, n));
    }
  }

  void through_output(Scratch& scratch, int64_t u, int64_t b, int64_t n) {
    const Matrix<T> logits = gradient(places.logits_gradient, u, b, n);
    const Matrix<T> project = gradient(places.projected_gradient, u, b, n);
    const Matrix<const float> projected = kept.state(places.projected, u, b, n);
    for (int64_t r = 0; r < n; ++r)
      if (given.logits_gradient)
        las::convert(given.logits_gradient + ((b + r) * shape.U + u) * shape.V, shape.V, logits.at(r));
    las::product(logits, layers.output.panels, nullptr, scratch.projected.rows(n));
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r)
        each_vector<W>(shape.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> slope = las::gelu_slope<W>(get<W>(projected.at(r, j), lanes, 0.0f));
          put<W>(project.at(r, j), slope * get<W>(scratch.projected.at(r) + j, lanes, 0.0f), lanes);
        });
    });
    las::product(project, layers.project.panels, nullptr, of(spoken_gradient, b, n));
  }

  // Leave the gradients of scores, contexts and queries, and add the last hidden state's to spoken_gradient.
  void through_attention(Scratch& scratch, int64_t u, int64_t first, int64_t n) {
    const float scale = scale_of(shape);
    const int64_t H = shape.H.back(), E = shape.E;
    const Matrix<T> queries = gradient(places.query_gradient, u, first, n);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t b = first + r, at = b * shape.U + u, frames = memory.frames(b);
        float *scores = score_gradients.data() + at * shape.T, *context = context_gradients.data() + at * context_row;
        for (int64_t e = 0; e < E; ++e) context[e] = spoken_gradient.at(b)[H + e] + inputs_gradient[0].at(b)[e];
        std::fill(context + E, context + context_row, 0.0f);
        las::dots<W>(Rows{context, 0, 1}, frames_of<float>(memory.values, b, frames), Rows{scores, 0, 1});
        if (given.weights_gradient)
          for (int64_t t = 0; t < frames; ++t) scores[t] += given.weights_gradient[at * shape.T + t];
        las::through_softmax<W>(given.attention + at * shape.T, scores, frames, 1.0f);
        std::fill_n(scratch.query.at(0), shape.D, 0.0f);
        las::average<W>(Rows{scores, 0, 1}, frames_of<float>(memory.keys, b, frames), Rows{scratch.query.at(0), 0, 1});
        las::convert<W>(scratch.query.at(0), shape.D, queries.at(r), scale);
      }
    });
    // The context's part has been read: columns past the hidden state's may be anything.
    const Matrix<float> spoken = of(spoken_gradient, first, n);
    for (int64_t r = 0; r < n; ++r) scratch.starts[r] = spoken.at(r);
    las::product(queries, layers.query.panels, scratch.starts.data(), spoken);
  }

  // From the gradient of what cell i shows to that of its gates and of its state before.
  void through_cell(int64_t i, int64_t u, int64_t b, int64_t n, const Matrix<float>& shown) {
    const int64_t size = shape.H[i], below = shape.below(i);
    const Matrix<const T> gates = kept.operand(places.gates[i], u, b, n);
    const Matrix<const float> cell = kept.state(places.cell[i], u, b, n);
    const Matrix<const float> cell_before = kept.state(places.cell[i], std::max<int64_t>(u - 1, 0), b, n);
    const Matrix<T> out = gradient(places.gate_gradients[i], u, b, n);
    const Matrix<float> hidden = of(inputs_gradient[i], b, n), carried = of(cell_gradient[i], b, n);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const float* mask = masks.empty() ? nullptr : masks[i].const_data_ptr<float>() + (b + r) * size;
        each_vector<W>(size, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const las::LstmGates<W> activated = las::get_gates<W>(gates.at(r, j), size, lanes);
          const Float<W> tanh_cell = las::tanh<W>(get<W>(cell.at(r, j), lanes, 0.0f));
          const Float<W> before = u > 0 ? get<W>(cell_before.at(r, j), lanes, 0.0f) : Float<W>{};
          Float<W> dh = get<W>(shown.at(r, j), lanes, 0.0f);
          if (mask) dh *= get<W>(mask + j, lanes, 0.0f);
          dh += get<W>(hidden.at(r, below + j), lanes, 0.0f);
          const Float<W> dc =
              get<W>(carried.at(r, j), lanes, 0.0f) + las::lstm_cell_gradient<W>(activated, tanh_cell, dh);
          const auto found = las::lstm_gate_gradients<W>(activated, tanh_cell, before, dh, dc);
          las::put_gates<W>(out.at(r, j), size, found, lanes);
          put<W>(carried.at(r, j), dc * activated.forget, lanes);
        });
      }
    });
  }

  // Add rows of gradients to their sums, and those of the first cell to the sums of the tokens read.
  void add_up(int64_t begin, int64_t end) {
    at::parallel_for(0, places.gradients / COLUMNS, 16, [&](int64_t first, int64_t last) {
      const int64_t from = first * COLUMNS, to = last * COLUMNS, gates = std::min(to, 4 * shape.H[0]);
      las::widest([&](auto width) __attribute__((always_inline)) {
        constexpr int W = width;
        const auto add = [](const T* row, int64_t n, float* sum) __attribute__((always_inline)) {
          each_vector<W>(n, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
            put<W>(sum + j, get<W>(sum + j, lanes, 0.0f) + get<W>(row + j, lanes, 0.0f), lanes);
          });
        };
        for (int64_t u = begin; u < end; ++u)
          for (int64_t b = 0; b < shape.B; ++b) {
            const T* row = gradient(0, u, b, 1).data;
            add(row + from, to - from, sums.data() + from);
            if (from < gates) add(row + from, gates - from, token_sums.at(given.read[b * shape.U + u]) + from);
          }
      });
    });
  }

  // The table of tokens: its part in the weights of the first cell, and the embedding as an input.
  void through_tokens(const Weights& w, const Matrix<float>& gates, const Matrix<float>& embedding) {
    const int64_t V = shape.V, M = shape.M, size = 4 * shape.H[0];
    Zeros<T> summed(V, size), embedded(V, M);
    std::vector<const float*> starts(V);
    for (int64_t v = 0; v < V; ++v) {
      las::convert(token_sums.at(v), size, summed.at(v));
      las::convert(w.embedding.const_data_ptr<float>() + v * M, M, embedded.at(v));
      starts[v] = embedding.at(v);
    }
    las::product(summed.rows(V), layers.token.panels, starts.data(), embedding);
    las::Memory<T> packed(las::packed_size<T>(M, V)), room(las::packed_size<T>(COLUMNS, V));
    const Panels<T> inputs = las::pack(static_cast<const T*>(embedded.at(0)), 1, embedded.stride, M, V, packed.data());
    Zeros<> found(size, M);
    for (int64_t i = 0; i < padded(size) / COLUMNS; ++i)
      multiply(summed.rows(V), size, i, inputs, V, false, room.data(), found.rows(size));
    for (int64_t i = 0; i < size; ++i) std::copy_n(found.at(i), M, gates.at(i));
  }

  void memory_gradients(float* keys, float* values) const {
    at::parallel_for(0, shape.B, 1, [&](int64_t begin, int64_t end) {
      Zeros<> asked(shape.U, shape.D);  // the queries of one utterance, side by side: those kept are a step apart
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = memory.frames(b), U = shape.U, T_ = shape.T;
        for (int64_t u = 0; u < U; ++u) std::copy_n(kept.state(places.query, u, b, 1).data, shape.D, asked.at(u));
        const Frames<float> dk{keys + b * T_ * shape.D, shape.D, n, shape.D};
        const Frames<float> dv{values + b * T_ * shape.E, shape.E, n, shape.E};
        const Rows scores{score_gradients.data() + b * U * T_, T_, U};
        const Rows weights{const_cast<float*>(given.attention) + b * U * T_, T_, U};  // only read
        const Rows contexts{context_gradients.data() + b * U * context_row, context_row, U};
        const Rows queries{asked.at(0), asked.stride, U};
        las::widest([&](auto width) __attribute__((always_inline)) {
          las::spread<width>(scores, queries, dk);
          las::spread<width>(weights, contexts, dv);
        });
        std::fill(dk.at(n), dk.at(T_), 0.0f);
        std::fill(dv.at(n), dv.at(T_), 0.0f);
      }
    });
  }
};

}  // namespace las::unroll
