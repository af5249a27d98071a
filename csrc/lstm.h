// One step of an LSTM cell and its gradient, for the BiLSTM, the speller's unroll and the beam search.
//
// With i, f, g, o the input, forget, candidate and output gates and c' the cell state before the step:
//   i, f, o = sigmoid(their sums);   g = tanh(its sum);   c = f * c' + i * g;   h = o * tanh(c)
// The gradient of the step takes dh, and dc from the step after, where dX is the gradient of X:
//   dc += dh * o * (1 - tanh(c)^2);   dc' = dc * f
//   di = dc * g * i (1 - i);   df = dc * c' * f (1 - f);   dg = dc * i * (1 - g^2);   do = dh * tanh(c) * o (1 - o)
// where those of the gates are gradients of their sums.
//
// A row of gates is (4, units): input, forget, candidate, output. All values are float32 in registers.

#pragma once

#include <cstdint>

#include "activations.h"
#include "softmax.h"
#include "vector.h"

namespace las {

template <int W>
struct LstmGates {
  Float<W> input, forget, candidate, output;
};

template <int W>
struct LstmState {
  Float<W> cell, hidden;
};

// Some units of a row of gates, whose first gate begins at `row`; each gate has `units` values.
template <int W, class T>
LAS_INLINE LstmGates<W> get_gates(const T* row, int64_t units, int64_t lanes) {
  return {get<W>(row, lanes, 0.0f), get<W>(row + units, lanes, 0.0f), get<W>(row + 2 * units, lanes, 0.0f),
          get<W>(row + 3 * units, lanes, 0.0f)};
}

template <int W, class T>
LAS_INLINE void put_gates(T* row, int64_t units, const LstmGates<W>& gates, int64_t lanes) {
  put<W>(row, gates.input, lanes);
  put<W>(row + units, gates.forget, lanes);
  put<W>(row + 2 * units, gates.candidate, lanes);
  put<W>(row + 3 * units, gates.output, lanes);
}

// The gates of some units from their sums, (4, units).
template <int W>
LAS_INLINE LstmGates<W> activate_gates(const float* sums, int64_t units, int64_t lanes) {
  return {sigmoid<W>(get<W>(sums, lanes, 0.0f)), sigmoid<W>(get<W>(sums + units, lanes, 0.0f)),
          tanh<W>(get<W>(sums + 2 * units, lanes, 0.0f)), sigmoid<W>(get<W>(sums + 3 * units, lanes, 0.0f))};
}

// The step of some units, for training, which saves the gates. `retained` is f * c', or 0 before the first step.
template <int W>
LAS_INLINE LstmState<W> lstm_step(const LstmGates<W>& gates, Float<W> retained) {
  const Float<W> cell = retained + gates.input * gates.candidate;
  return {cell, gates.output * tanh<W>(cell)};
}

// What dh adds to dc.
template <int W>
LAS_INLINE Float<W> lstm_cell_gradient(const LstmGates<W>& gates, Float<W> tanh_cell, Float<W> dh) {
  return dh * gates.output * (1.0f - tanh_cell * tanh_cell);
}

// The gradients of the gates' sums, with dc as a whole. That of the cell state before is dc * f.
template <int W>
LAS_INLINE LstmGates<W> lstm_gate_gradients(const LstmGates<W>& gates, Float<W> tanh_cell, Float<W> cell_before,
                                            Float<W> dh, Float<W> dc) {
  const auto [input, forget, candidate, output] = gates;
  return {dc * candidate * input * (1.0f - input), dc * cell_before * forget * (1.0f - forget),
          dc * input * (1.0f - candidate * candidate), dh * tanh_cell * output * (1.0f - output)};
}

// The step of all units of a cell for the search, which saves no gates. sum(i, j, lanes) gives the sums of units j to
// j + lanes of gate i.
//
// There is one division per state: the gates' denominators are multiplied first. Cell and hidden state have separate
// loops, or each vector would wait for the longer of the two dependency chains.
template <int W, class T, class Sum>
LAS_INLINE void lstm_step_unsaved(int64_t units, const float* cell_before, float* cell, T* hidden, Sum sum) {
  constexpr float LIMIT = 40.0f;  // the product of two sigmoid denominators and one of tanh stays below 1e38
  each_vector<W>(units, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> input = sigmoid_denominator<W>(sum(0, j, lanes), LIMIT);
    const Float<W> forget = sigmoid_denominator<W>(sum(1, j, lanes), LIMIT);
    const Ratio<W> candidate = tanh_ratio<W>(sum(2, j, lanes));
    const Float<W> denominator = input * candidate.denominator;
    const Float<W> numerator = get<W>(cell_before + j, lanes, 0.0f) * denominator + candidate.numerator * forget;
    put<W>(cell + j, numerator / (denominator * forget), lanes);
  });
  each_vector<W>(units, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> output = sigmoid_denominator<W>(sum(3, j, lanes), LIMIT);
    const Ratio<W> tanh_cell = tanh_ratio<W>(get<W>(cell + j, lanes, 0.0f));
    put<W>(hidden + j, tanh_cell.numerator / (tanh_cell.denominator * output), lanes);
  });
}

}  // namespace las
