// The whole decoder pass of training, and its gradients: the C++ twin of las_fast/ops/speller_unroll.py, which says what
// they mean.
//
// Each thread takes some utterances through all steps, side by side as rows of the products. What a product reads is
// written once, to where it is kept for the gradients: rows of operands (float32 or bfloat16) and of states (float32),
// one for each step and utterance. What tokens add to the gates of the first cell is a table.
//
// Gradients take the steps in blocks from the last one. Threads take their utterances back through a block, and leave
// the gradients of each layer's outputs; then they share out the rows of the weights' gradients, to which a block adds
// one product a layer. A sum is made in one order whoever makes it: any number of threads gives the same results.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "lstm.h"
#include "product.h"
#include "softmax.h"
#include "speller.h"
#include "vector.h"

namespace {

using las::COLUMNS;
using las::each_vector;
using las::Float;
using las::Frames;
using las::get;
using las::Layer;
using las::layer;
using las::Matrix;
using las::padded;
using las::Panels;
using las::put;
using las::Rows;
using las::Weights;
using las::Zeros;

constexpr int64_t BLOCK = 1024;  // rows of gradients that are kept at a time, about: 12 MB at 3000 gates

// ------------------------------------------------------------------------------------------------- what is where

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

struct Memory {
  at::Tensor keys, values, lengths;

  int64_t frames(int64_t b) const { return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, keys.size(1)); }
};

float scale_of(const Shape& shape) { return 1.0f / std::sqrt(float(shape.D)); }

// ----------------------------------------------------------------------------------------------------------- forward

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
  const Memory& memory;
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

// ---------------------------------------------------------------------------------------------------------- backward

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
  const Memory& memory;
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

  Backward(const Shape& s, const Places& p, const Transposed<T>& layers, const Memory& memory,
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

// --------------------------------------------------------------------------------------------------------- arguments

void check(const Weights& w, const Memory& memory, const at::Tensor& tokens, const at::Tensor& sampled,
           const std::vector<at::Tensor>& masks) {
  const auto [keys, values, lengths] = memory;
  las::check_memory(keys, values, lengths);
  las::check_weights(w, keys.size(2), values.size(2));
  const int64_t B = keys.size(0);
  TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == B && tokens.size(1) > 0 && tokens.scalar_type() == at::kLong,
              "tokens must be (B, U) int64 with B=", B, " and U at least 1; got ", tokens.sizes(), " ",
              tokens.scalar_type());
  TORCH_CHECK(sampled.sizes() == tokens.sizes() && sampled.scalar_type() == at::kBool, "sampled must be ",
              tokens.sizes(), " bool; got ", sampled.sizes(), " ", sampled.scalar_type());
  TORCH_CHECK(masks.empty() || masks.size() == w.gates.size(), "masks must be one a cell or none; got ", masks.size());
  for (size_t i = 0; i < masks.size(); ++i)
    TORCH_CHECK(masks[i].sizes() == at::IntArrayRef({B, w.gate_biases[i].numel() / 4}) &&
                    masks[i].scalar_type() == at::kFloat,
                "masks must be (B, H) float32 of each cell; got ", masks[i].sizes(), " ", masks[i].scalar_type());
  const int64_t *token = tokens.const_data_ptr<int64_t>(), V = w.embedding.size(0);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    TORCH_CHECK(token[i] >= 0 && token[i] < V, "tokens must be from 0 to ", V - 1, "; got ", token[i]);
}

std::vector<at::Tensor> contiguous(at::TensorList list) {
  std::vector<at::Tensor> all;
  for (const at::Tensor& x : list) all.push_back(x.contiguous());
  return all;
}

using Unrolled = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
Unrolled unroll(const Weights& w, const Memory& memory, const at::Tensor& tokens, const at::Tensor& sampled,
                const std::vector<at::Tensor>& masks, bool gradients) {
  const Shape shape(w, memory.keys, memory.values, tokens);
  const Places places(shape);
  const int64_t steps = gradients ? shape.U : std::min<int64_t>(2, shape.U);
  const at::Tensor logits = large<float>({shape.B, shape.U, shape.V});
  const at::Tensor attention = large<float>({shape.B, shape.U, shape.T}), read = at::empty_like(tokens);
  const at::Tensor operands = large<T>({steps, shape.B, places.operands});
  const at::Tensor states = large<float>({steps, shape.B, places.states});
  las::Memory<uint8_t> packed;
  const auto layers = las::shelved(packed, [&](las::Shelf& shelf) { return Layers<T>(w, shape, shelf); });
  const Zeros<> token_gates = token_gates_of<T>(w, shape);
  Forward<T>{shape,
             places,
             layers,
             token_gates,
             memory,
             masks,
             {operands.mutable_data_ptr<T>(), states.mutable_data_ptr<float>(), places.operands, places.states,
              shape.B, steps},
             tokens.const_data_ptr<int64_t>(),
             sampled.const_data_ptr<bool>(),
             logits.mutable_data_ptr<float>(),
             attention.mutable_data_ptr<float>(),
             read.mutable_data_ptr<int64_t>()}
      .run();
  return {logits, attention, read, operands, states};
}

Unrolled forward(at::TensorList weights, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                 const at::Tensor& tokens, const at::Tensor& sampled, at::TensorList masks, bool bf16, bool gradients) {
  const Weights w(weights);
  const Memory memory{keys.contiguous(), values.contiguous(), lengths.contiguous()};
  const at::Tensor before = tokens.contiguous(), own = sampled.contiguous();
  const std::vector<at::Tensor> dropped = contiguous(masks);
  check(w, memory, before, own, dropped);
  if (bf16) return unroll<at::BFloat16>(w, memory, before, own, dropped, gradients);
  return unroll<float>(w, memory, before, own, dropped, gradients);
}

using Gradients = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor>;

struct Saved {
  at::Tensor attention, read, operands, states;
};

// The gradients of weights, their rows padded to whole panels, those of the first cell behind the token's part.
struct Found {
  at::Tensor embedding, query, project;
  std::vector<at::Tensor> gates;

  explicit Found(const Shape& s)
      : embedding(large<float>({s.V, padded(s.M)})), query(large<float>({s.D, padded(s.H.back())})),
        project(large<float>({s.M, padded(s.spoken())})) {
    for (int64_t i = 0; i < s.cells(); ++i)
      gates.push_back(large<float>({4 * s.H[i], (i == 0 ? s.M : 0) + padded(s.below(i) + s.H[i])}));
  }
  static Matrix<float> matrix(const at::Tensor& x, int64_t from = 0) {
    return {x.mutable_data_ptr<float>() + from, x.size(1), x.size(0)};
  }
  std::vector<Gradient> wanted(const Shape& s, const Places& p) const {
    std::vector<Gradient> all{{p.logits_gradient, s.V, p.features, s.M, matrix(embedding)},
                              {p.query_gradient, s.D, p.spoken, s.H.back(), matrix(query)},
                              {p.projected_gradient, s.M, p.spoken, s.spoken(), matrix(project)}};
    for (int64_t i = 0; i < s.cells(); ++i)
      all.push_back({p.gate_gradients[i], 4 * s.H[i], p.input[i], s.below(i) + s.H[i],
                     matrix(gates[i], i == 0 ? s.M : 0)});
    return all;
  }
};

at::Tensor narrowed(const at::Tensor& x, int64_t columns) { return x.narrow(1, 0, columns).contiguous(); }

at::Tensor vector_of(const std::vector<float>& sums, int64_t from, int64_t count) {
  const at::Tensor x = at::empty({count}, at::kFloat);
  std::copy_n(sums.begin() + from, count, x.mutable_data_ptr<float>());
  return x;
}

template <class T>
Gradients gradients_of(const Weights& w, const Memory& memory, const Shape& shape, const std::vector<at::Tensor>& masks,
                       const Saved& saved, const float* logits_gradient, const float* weights_gradient) {
  const Places places(shape);
  const Transposed<T> layers(w, shape);
  Backward<T> job(shape, places, layers, memory, masks,
                  {saved.operands.const_data_ptr<T>(), saved.states.const_data_ptr<float>(), places.operands,
                   places.states, shape.B, shape.U},
                  {saved.attention.const_data_ptr<float>(), logits_gradient, weights_gradient,
                   saved.read.const_data_ptr<int64_t>()});
  const Found found(shape);
  job.run(found.wanted(shape, places));
  job.through_tokens(w, Found::matrix(found.gates[0]), Found::matrix(found.embedding));
  const at::Tensor keys = large<float>(memory.keys.sizes()), values = large<float>(memory.values.sizes());
  job.memory_gradients(keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>());
  std::vector<at::Tensor> all{narrowed(found.embedding, shape.M),
                              narrowed(found.query, shape.H.back()),
                              vector_of(job.sums, places.query_gradient, shape.D),
                              narrowed(found.project, shape.spoken()),
                              vector_of(job.sums, places.projected_gradient, shape.M),
                              vector_of(job.sums, places.logits_gradient, shape.V)};
  for (int64_t i = 0; i < shape.cells(); ++i) {
    all.push_back(narrowed(found.gates[i], w.gates[i].size(1)));
    all.push_back(vector_of(job.sums, places.gate_gradients[i], 4 * shape.H[i]));
  }
  return {all, keys, values};
}

void check_like(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(!x || (x->sizes() == shape && x->scalar_type() == dtype && x->is_contiguous()), name, " must be ", shape,
              " ", dtype, "; got ", x->sizes(), " ", x->scalar_type());
}

Gradients backward(const std::optional<at::Tensor>& logits_gradient, const std::optional<at::Tensor>& weights_gradient,
                   at::TensorList weights, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                   at::TensorList masks, const at::Tensor& attention, const at::Tensor& read,
                   const at::Tensor& operands, const at::Tensor& states, bool bf16) {
  const Weights w(weights);
  const Memory memory{keys.contiguous(), values.contiguous(), lengths.contiguous()};
  const std::vector<at::Tensor> dropped = contiguous(masks);
  check(w, memory, read, at::empty(read.sizes(), at::kBool), dropped);
  const Shape shape(w, keys, values, read);
  const Places places(shape);
  const auto given = [](const std::optional<at::Tensor>& x) { return x ? std::optional(x->contiguous()) : x; };
  const auto of_logits = given(logits_gradient), of_weights = given(weights_gradient);
  check_like("logits_gradient", of_logits, {shape.B, shape.U, shape.V}, at::kFloat);
  check_like("weights_gradient", of_weights, {shape.B, shape.U, shape.T}, at::kFloat);
  check_like("attention", attention, {shape.B, shape.U, shape.T}, at::kFloat);
  check_like("operands", operands, {shape.U, shape.B, places.operands}, bf16 ? at::kBFloat16 : at::kFloat);
  check_like("states", states, {shape.U, shape.B, places.states}, at::kFloat);
  const Saved saved{attention, read, operands, states};
  const auto run = bf16 ? &gradients_of<at::BFloat16> : &gradients_of<float>;
  return run(w, memory, shape, dropped, saved, data<float>(of_logits), data<float>(of_weights));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) {
  m.def("speller_unroll_cpp(Tensor[] weights, Tensor keys, Tensor values, Tensor lengths, Tensor tokens,"
        " Tensor sampled, Tensor[] masks, bool bf16, bool gradients)"
        " -> (Tensor logits, Tensor attention, Tensor read, Tensor operands, Tensor states)");
  m.def("speller_unroll_backward_cpp(Tensor? logits_gradient, Tensor? attention_gradient, Tensor[] weights,"
        " Tensor keys, Tensor values, Tensor lengths, Tensor[] masks, Tensor attention, Tensor read, Tensor operands,"
        " Tensor states, bool bf16)"
        " -> (Tensor[] weights_gradients, Tensor keys_gradient, Tensor values_gradient)");
}

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("speller_unroll_cpp", &forward);
  m.impl("speller_unroll_backward_cpp", &backward);
}
