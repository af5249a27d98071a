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
#include "unroll_layout.h"
#include "vector.h"

namespace las::unroll {

template <class T>
struct Layers {
  std::vector<Layer<T>> cells;
  Layer<T> query, project, output;

  Layers(const Weights& w, const Shape& s, las::Shelf& shelf)
      : query(layer<T>(w.query, 0, s.H.back(), w.query_bias, shelf, scale_of(s))),
        project(layer<T>(w.project, 0, s.spoken(), w.project_bias, shelf)),
        output(layer<T>(w.embedding, 0, s.M, w.bias, shelf)) {
    for (int64_t i = 0; i < s.cells(); ++i) {
      const at::Tensor bias = i ? w.gate_biases[i] : at::Tensor();  // that of the first is in token_gates
      cells.push_back(layer<T>(w.gates[i], i == 0 ? s.M : 0, s.below(i) + s.H[i], bias, shelf));
    }
  }
};

// (V, 4 * H_1): what each token adds to the gates of the first cell, the bias included.
template <class T>
Zeros<> token_gates_of(const Weights& w, const Shape& s) {
  las::Memory<uint8_t> memory;
  const Layer<T> token = las::shelved(
      memory, [&](las::Shelf& shelf) { return layer<T>(w.gates[0], 0, s.M, w.gate_biases[0], shelf); });
  Zeros<> found(s.V, 4 * s.H[0]);
  Zeros<T> embedded(s.V, s.M);
  const std::vector<const float*> bias(s.V, token.bias.data());
  at::parallel_for(0, s.V, 32, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      las::convert(w.embedding.const_data_ptr<float>() + v * s.M, s.M, embedded.at(v));
    las::product(Matrix<T>{embedded.at(begin), embedded.stride, end - begin}, token.weights, bias.data(),
                 Matrix<float>{found.at(begin), found.stride, end - begin});
  });
  return found;
}

template <class T>
struct Forward {
  const Shape& shape;
  const Places& places;
  const Layers<T>& layers;
  const Zeros<>& token_gates;
  const EncoderMemory& memory;
  const std::vector<at::Tensor>& masks;
  Kept<T, float> kept;
  const int64_t* before;
  const bool* sampled;
  float *logits, *attention;
  int64_t* read;

  // Utterances begin to begin + count.
  struct Part {
    int64_t begin, count;
    Zeros<> sums, context;
    std::vector<const float*> starts;
    std::vector<int64_t> best;
  };

  void run() {
    at::parallel_for(0, shape.B, 1, [&](int64_t begin, int64_t end) { utterances(begin, end - begin); });
  }

  void utterances(int64_t begin, int64_t count) {
    const int64_t gates = 4 * *std::max_element(shape.H.begin(), shape.H.end());
    Part part{begin, count, Zeros<>(count, std::max(gates, shape.V)), Zeros<>(1, shape.E),
               std::vector<const float*>(count), std::vector<int64_t>(count)};
    for (int64_t i = 0; i < shape.cells(); ++i) clear(part, places.input[i], 0, 0, shape.below(i) + shape.H[i]);
    for (int64_t u = 0; u < shape.U; ++u) {
      pad(part, u);
      choose(part, u);
      for (int64_t i = 0; i < shape.cells(); ++i) advance(part, i, u);
      attend(part, u);
      spell(part, u);
    }
  }

  void clear(const Part& part, int64_t place, int64_t u, int64_t from, int64_t to) const {
    const Matrix<T> all = kept.operand(place, u, part.begin, part.count);
    for (int64_t r = 0; r < part.count; ++r) std::fill(all.at(r, from), all.at(r, to), T(0.0f));
  }

  // Zeros between the parts of a row: products of bfloat16 read a neighbour more of an odd operand.
  void pad(const Part& part, int64_t u) const {
    const auto after = [&](int64_t place, int64_t size) { clear(part, place, u, size, padded(size)); };
    for (int64_t i = 0; i < shape.cells(); ++i) {
      after(places.input[i], shape.below(i) + shape.H[i]);
      after(places.gates[i], 4 * shape.H[i]);
      const Matrix<float> cell = kept.state(places.cell[i], u, part.begin, part.count);
      for (int64_t r = 0; r < part.count; ++r)
        std::fill(cell.at(r, shape.H[i]), cell.at(r, padded(shape.H[i])), 0.0f);
    }
    after(places.features, shape.M);
    after(places.spoken, shape.spoken());
    const int64_t H = shape.H.back();  // the query reads no context, which comes later
    clear(part, places.spoken, u, H, padded(H, las::NEIGHBOURS<T>));
  }

  void choose(const Part& part, int64_t u) const {
    for (int64_t r = 0; r < part.count; ++r) {
      const int64_t at = (part.begin + r) * shape.U + u;
      read[at] = u > 0 && sampled[at] ? part.best[r] : before[at];
    }
  }

  las::Starts same(Part& part, const std::vector<float>& bias) const {
    std::fill(part.starts.begin(), part.starts.end(), bias.data());
    return part.starts.data();
  }

  // Take cell i to its state after step u.
  void advance(Part& part, int64_t i, int64_t u) const {
    const auto [begin, n] = std::pair(part.begin, part.count);
    same(part, layers.cells[i].bias);
    if (i == 0)
      for (int64_t r = 0; r < n; ++r) part.starts[r] = token_gates.at(read[(begin + r) * shape.U + u]);
    las::product(kept.operand(places.input[i], u, begin, n), layers.cells[i].weights, part.starts.data(),
                 part.sums.rows(n));
    const int64_t size = shape.H[i];
    const bool last = i + 1 == shape.cells();
    const Matrix<T> gates = kept.operand(places.gates[i], u, begin, n);
    const Matrix<float> cell = kept.state(places.cell[i], u, begin, n);
    const Matrix<float> cell_before = kept.state(places.cell[i], u + kept.steps - 1, begin, n);
    const Matrix<T> hidden = kept.operand(places.input[i] + shape.below(i), u + 1, begin, n);
    const Matrix<T> above = kept.operand(last ? places.spoken : places.input[i + 1], u, begin, n);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const float* sums = part.sums.at(r);
        const float* mask = masks.empty() ? nullptr : masks[i].const_data_ptr<float>() + (begin + r) * size;
        each_vector<W>(size, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const las::LstmGates<W> activated = las::activate_gates<W>(sums + j, size, lanes);
          const Float<W> retained = u > 0 ? activated.forget * get<W>(cell_before.at(r, j), lanes, 0.0f) : Float<W>{};
          const las::LstmState<W> after = las::lstm_step<W>(activated, retained);
          las::put_gates<W>(gates.at(r, j), size, activated, lanes);
          put<W>(cell.at(r, j), after.cell, lanes);
          if (u + 1 < shape.U) put<W>(hidden.at(r, j), after.hidden, lanes);
          put<W>(above.at(r, j), mask ? after.hidden * get<W>(mask + j, lanes, 0.0f) : after.hidden, lanes);
        });
      }
    });
  }

  void attend(Part& part, int64_t u) const {
    const auto [begin, n] = std::pair(part.begin, part.count);
    const int64_t H = shape.H.back(), E = shape.E;
    const Matrix<float> queries = kept.state(places.query, u, begin, n);
    const Matrix<T> spoken = kept.operand(places.spoken, u, begin, n);
    const Matrix<T> next = kept.operand(places.input[0], u + 1, begin, n);
    las::product(spoken, layers.query.weights, same(part, layers.query.bias), queries);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t b = begin + r, frames = memory.frames(b);
        float* weights = attention + (b * shape.U + u) * shape.T;
        std::fill_n(part.context.at(0), E, 0.0f);
        las::dots<W>(Rows{queries.at(r), 0, 1}, frames_of<float>(memory.keys, b, frames), Rows{weights, 0, 1});
        las::softmax<W>(weights, frames);
        std::fill(weights + frames, weights + shape.T, 0.0f);
        las::average<W>(Rows{weights, 0, 1}, frames_of<float>(memory.values, b, frames), Rows{part.context.at(0), 0, 1});
        las::convert<W>(part.context.at(0), E, spoken.at(r, H));
        if (u + 1 < shape.U) las::convert<W>(part.context.at(0), E, next.at(r));
      }
    });
  }

  void spell(Part& part, int64_t u) const {
    const auto [begin, n] = std::pair(part.begin, part.count);
    const Matrix<float> projected = kept.state(places.projected, u, begin, n);
    const Matrix<T> features = kept.operand(places.features, u, begin, n);
    las::product(kept.operand(places.spoken, u, begin, n), layers.project.weights, same(part, layers.project.bias),
                 projected);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t r = 0; r < n; ++r)
        each_vector<W>(shape.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          put<W>(features.at(r, j), las::gelu<W>(get<W>(projected.at(r, j), lanes, 0.0f)), lanes);
        });
    });
    las::product(features, layers.output.weights, same(part, layers.output.bias), part.sums.rows(n));
    for (int64_t r = 0; r < n; ++r) {
      const float* row = part.sums.at(r);
      std::copy_n(row, shape.V, logits + ((begin + r) * shape.U + u) * shape.V);
      part.best[r] = std::max_element(row, row + shape.V) - row;
    }
  }
};

}  // namespace las::unroll
