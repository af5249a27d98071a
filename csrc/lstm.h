// One step of an LSTM cell and its gradient, for the BiLSTM, the speller's unroll and the beam search.
//
// With i, f, g, o the input, forget, candidate and output gates and c' the cell state before the step:
//   i, f, o = sigmoid(their sums);   g = tanh(its sum);   c = f * c' + i * g;   h = o * tanh(c)
// The gradient of the step takes dh and the dc of the next step, where dX is the gradient of X:
//   dc += dh * o * (1 - tanh(c)^2);   dc' = dc * f
//   di = dc * g * i (1 - i);   df = dc * c' * f (1 - f);   dg = dc * i * (1 - g^2);   do = dh * tanh(c) * o (1 - o)
// Here di, df, dg and do are the gradients of the gates' sums.
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

// Load `lanes` units of each gate of a row (4, units); `row` points to the first unit in the input gate.
template <int W, class T>
LAS_INLINE LstmGates<W> load_gates(const T* row, int64_t units, int64_t lanes) {
  return {load<W>(row, lanes), load<W>(row + units, lanes), load<W>(row + 2 * units, lanes),
          load<W>(row + 3 * units, lanes)};
}

template <int W, class T>
LAS_INLINE void store_gates(T* row, int64_t units, const LstmGates<W>& gates, int64_t lanes) {
  store<W>(row, gates.input, lanes);
  store<W>(row + units, gates.forget, lanes);
  store<W>(row + 2 * units, gates.candidate, lanes);
  store<W>(row + 3 * units, gates.output, lanes);
}

// Compute the gates of `lanes` units from a row of their sums, (4, units).
template <int W>
LAS_INLINE LstmGates<W> activate_gates(const float* sums, int64_t units, int64_t lanes) {
  return {sigmoid<W>(load<W>(sums, lanes)), sigmoid<W>(load<W>(sums + units, lanes)),
          tanh<W>(load<W>(sums + 2 * units, lanes)), sigmoid<W>(load<W>(sums + 3 * units, lanes))};
}

// One step for training, which saves the gates. `retained` is f * c'; 0 at the first step.
template <int W>
LAS_INLINE LstmState<W> lstm_step(const LstmGates<W>& gates, Float<W> retained) {
  const Float<W> cell = retained + gates.input * gates.candidate;
  return {cell, gates.output * tanh<W>(cell)};
}

// The contribution of dh to dc.
template <int W>
LAS_INLINE Float<W> lstm_cell_gradient(const LstmGates<W>& gates, Float<W> tanh_cell, Float<W> dh) {
  return dh * gates.output * (1.0f - tanh_cell * tanh_cell);
}

// The gradients of the gates' sums from dh and the complete dc.
template <int W>
LAS_INLINE LstmGates<W> lstm_gate_gradients(const LstmGates<W>& gates, Float<W> tanh_cell, Float<W> cell_before,
                                            Float<W> dh, Float<W> dc) {
  const auto [input, forget, candidate, output] = gates;
  return {dc * candidate * input * (1.0f - input), dc * cell_before * forget * (1.0f - forget),
          dc * input * (1.0f - candidate * candidate), dh * tanh_cell * output * (1.0f - output)};
}

// One step of all units for the search, which saves no gates. sum(i, j, lanes) returns the sums of gate i, units j
// to j + lanes.
//
// Each state takes one division, because the denominators of the gates are multiplied first. Cell and hidden state have
// separate loops: in one loop, each vector would wait for the longer of the two dependency chains.
template <int W, class T, class Sum>
LAS_INLINE void lstm_step_unsaved(int64_t units, const float* cell_before, float* cell, T* hidden, Sum sum) {
  constexpr float LIMIT = 40.0f;  // the product of two sigmoid denominators and one of tanh stays below 1e38
  for_each_vector<W>(units, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> input = sigmoid_denominator<W>(sum(0, j, lanes), LIMIT);
    const Float<W> forget = sigmoid_denominator<W>(sum(1, j, lanes), LIMIT);
    const Ratio<W> candidate = tanh_ratio<W>(sum(2, j, lanes));
    const Float<W> denominator = input * candidate.denominator;
    const Float<W> numerator = load<W>(cell_before + j, lanes) * denominator + candidate.numerator * forget;
    store<W>(cell + j, numerator / (denominator * forget), lanes);
  });
  for_each_vector<W>(units, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Float<W> output = sigmoid_denominator<W>(sum(3, j, lanes), LIMIT);
    const Ratio<W> tanh_cell = tanh_ratio<W>(load<W>(cell + j, lanes));
    store<W>(hidden + j, tanh_cell.numerator / (tanh_cell.denominator * output), lanes);
  });
}

}  // namespace las
