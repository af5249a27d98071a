// The backward pass of bilstm.cpp.
//
// lstm.h has the gradients of the gates of a step. They are computed from the last step to the first; dX is the
// gradient of X, and dgates' that of the gates of the following step:
//   dh += dgates' W_hh
// Then, over all frames, with dgates of the frame itself and h' the previous hidden state:
//   dx = sum over directions of dgates W_ih;   dW_ih = dgates^T x;   dW_hh = dgates^T h';   db = sum of dgates

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bilstm_frames.h"
#include "lstm.h"
#include "matmul.h"
#include "memory.h"
#include "packing.h"
#include "softmax.h"
#include "vector.h"

namespace las::bilstm {

constexpr int64_t BLOCK = 2048;  // frames per matmul of a weight's gradient: each matmul reads and writes all of it

// The gradients of the weights of one direction.
struct DirectionGradients {
  Matrix<float> input, recurrent;  // (4 * H, padded I), (4 * H, padded H)
  float* bias;                     // (4 * H,): the same for both biases
};

template <class T>
class BiLstmBackward {
 public:
  BiLstmBackward(const BiLstmShape& shape, const ValidFrames& frames, const BiLstmWeights& weights, const T* gradient,
                 const T* x, const T* output, const T* saved)
      : shape_(shape), frames_(frames), weights_(weights), gradient_(gradient), x_(x), output_(output), saved_(saved),
        gates_(frames.count(), DIRECTIONS * 4 * shape.H), zeros_(shape.H, T(0.0f)) {}

  // Compute the gradients of the gates of all frames.
  void backpropagate() {
    const auto groups = frames_.grouped(group_count(shape_.B));
    const int64_t H = shape_.H;
    AlignedArray<T> memory[DIRECTIONS];
    Panels<T> recurrent[DIRECTIONS];
    for_each_direction([&](int64_t d) {
      recurrent[d] = las::pack<T>(weights_.recurrent(d), 1, H, H, 4 * H, memory[d]);
    });
    at::parallel_for(0, DIRECTIONS * int64_t(groups.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        backpropagate(i % DIRECTIONS, groups[i / DIRECTIONS], recurrent[i % DIRECTIONS]);
    });
  }

  // Compute the gradient of x (B, T, I), zero past the lengths.
  void input_gradients(T* x_gradient) {
    AlignedArray<T> memory[DIRECTIONS];
    Panels<T> input[DIRECTIONS];
    for_each_direction([&](int64_t d) {
      input[d] = las::pack<T>(weights_.input(d), 1, shape_.I, shape_.I, 4 * shape_.H, memory[d]);
    });
    at::parallel_for(0, frames_.count(), CHUNK, [&](int64_t begin, int64_t end) {
      const RowBuffer<float> sums(CHUNK, shape_.I);
      std::vector<const float*> initial(CHUNK);
      for (int64_t i = 0; i < CHUNK; ++i) initial[i] = sums.at(i);
      for (int64_t from = begin; from < end; from += CHUNK)
        input_gradients(input, from, std::min(CHUNK, end - from), sums, initial.data(), x_gradient);
    });
    for (int64_t b = 0; b < shape_.B; ++b) {
      const int64_t valid = frames_.lengths[b];
      std::fill_n(x_gradient + (b * shape_.T + valid) * shape_.I, (shape_.T - valid) * shape_.I, T(0.0f));
    }
  }

  // Compute the gradients of the weights and biases. Those of the biases must be zeros beforehand.
  void weight_gradients(const DirectionGradients (&to)[DIRECTIONS]) const {
    const int64_t depth = padded(std::min(BLOCK, frames_.count()), DEPTH_INTERLEAVE<T>);
    const AlignedArray<T> x(padded(shape_.I) * depth), h(padded(shape_.H) * depth);
    int64_t from = 0;
    do {  // without frames, one empty block sets the gradients to zero
      const int64_t count = std::min(BLOCK, frames_.count() - from);
      const Panels<T> inputs = pack(rows_of_inputs(from, count), shape_.I, x);
      for (int64_t d = 0; d < DIRECTIONS; ++d)
        weight_gradients(rows_of_gates(d, from, count), inputs, pack(rows_of_states(d, from, count), shape_.H, h),
                         from > 0, to[d]);
      from += BLOCK;
    } while (from < frames_.count());
  }

 private:
  void backpropagate(int64_t direction, const std::vector<int64_t>& utterances, const Panels<T>& recurrent) {
    const int64_t H = shape_.H, all = int64_t(utterances.size());
    RowBuffer<float> hidden(all, H), cell(all, H);
    RowBuffer<T> gates(all, 4 * H);
    hidden.clear(), cell.clear();  // zero after the last frame of an utterance
    int64_t active = 0;
    for (int64_t step = frames_.lengths[utterances[0]] - 1; step >= 0; --step) {
      while (active < all && frames_.lengths[utterances[active]] > step) ++active;
      dispatch_width([&](auto width) __attribute__((always_inline)) {
        for (int64_t r = 0; r < active; ++r)
          cell_backward<width>(direction, utterances[r], step, hidden.at(r), cell.at(r), gates.at(r));
      });
      if (step > 0) matmul(gates.rows(active), recurrent, nullptr, hidden.rows(active));
    }
  }

  const T* saved(int64_t direction, int64_t index) const {
    return saved_ + (frames_.positions[index] * DIRECTIONS + direction) * SAVED * shape_.H;
  }

  template <int W>
  LAS_INLINE void cell_backward(int64_t direction, int64_t b, int64_t step, const float* hidden, float* cell,
                                T* row) const {
    const int64_t H = shape_.H, index = frames_.index(direction, b, step);
    const T* saved_now = saved(direction, index);
    const T* saved_before = step > 0 ? saved(direction, frames_.index(direction, b, step - 1)) + 4 * H : zeros_.data();
    const T* output_gradient = gradient_ + (frames_.positions[index] * DIRECTIONS + direction) * H;
    // The saved values have left the cache. Prefetch two steps ahead: a step also reads the previous cell state.
    const int64_t ahead = frames_.index(direction, b, std::max<int64_t>(step - 2, 0));
    const T* saved_ahead = saved(direction, ahead);
    const T* output_gradient_ahead = gradient_ + (frames_.positions[ahead] * DIRECTIONS + direction) * H;
    for_each_vector<W>(H, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      for (int64_t i = 0; i < SAVED; ++i) prefetch(saved_ahead + i * H + j);
      prefetch(output_gradient_ahead + j);
      const LstmGates<W> gates = load_gates<W>(saved_now + j, H, lanes);
      const Float<W> tanh_cell = tanh<W>(load<W>(saved_now + 4 * H + j, lanes));
      const Float<W> dh = load<W>(output_gradient + j, lanes) + load<W>(hidden + j, lanes);
      const Float<W> dc = lstm_cell_gradient<W>(gates, tanh_cell, dh) + load<W>(cell + j, lanes);
      const Float<W> cell_before = load<W>(saved_before + j, lanes);
      store_gates<W>(row + j, H, lstm_gate_gradients<W>(gates, tanh_cell, cell_before, dh, dc), lanes);
      store<W>(cell + j, dc * gates.forget, lanes);
    });
    std::copy_n(row, 4 * H, gates_.at(index) + direction * 4 * H);
  }

  void input_gradients(const Panels<T> (&input)[DIRECTIONS], int64_t from, int64_t count, const RowBuffer<float>& sums,
                       InitialSums initial, T* x_gradient) const {
    for (int64_t d = 0; d < DIRECTIONS; ++d) {
      Matrix<T> rows = gates_.rows(count, from);
      rows.data += d * 4 * shape_.H;
      matmul(rows, input[d], d == 0 ? nullptr : initial, sums.rows(count));
    }
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i)
        convert<width>(sums.at(i), shape_.I, x_gradient + frames_.positions[from + i] * shape_.I);
    });
  }

  std::vector<const T*> rows_of_inputs(int64_t from, int64_t count) const {
    std::vector<const T*> rows(count);
    for (int64_t k = 0; k < count; ++k) rows[k] = x_ + frames_.positions[from + k] * shape_.I;
    return rows;
  }

  std::vector<const T*> rows_of_gates(int64_t direction, int64_t from, int64_t count) const {
    std::vector<const T*> rows(count);
    for (int64_t k = 0; k < count; ++k) rows[k] = gates_.at(from + k) + direction * 4 * shape_.H;
    return rows;
  }

  // The previous hidden states: those of the preceding frame, or of the following one in the backward direction.
  std::vector<const T*> rows_of_states(int64_t direction, int64_t from, int64_t count) const {
    std::vector<const T*> rows(count);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t position = frames_.positions[from + k], b = position / shape_.T, t = position % shape_.T;
      const bool first = direction == 0 ? t == 0 : t == frames_.lengths[b] - 1;
      const int64_t source = direction == 0 ? position - 1 : position + 1;
      rows[k] = first ? zeros_.data() : output_ + (source * DIRECTIONS + direction) * shape_.H;
    }
    return rows;
  }

  // Compute the gradients of one direction from a block of frames. `accumulate`: add to the weights' gradients in `to`.
  void weight_gradients(const std::vector<const T*>& gates, const Panels<T>& inputs, const Panels<T>& states,
                        bool accumulate, const DirectionGradients& to) const {
    const int64_t H = shape_.H;
    at::parallel_for(0, padded(4 * H) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
      TransposedRows<T> outputs(inputs.depth, std::min(end - begin, TransposedRows<T>::max_panels()));
      for (int64_t index = begin; index < end; index += outputs.panels) {
        const int64_t first = index * COLUMNS, last = std::min(index + outputs.panels, end) * COLUMNS;
        outputs.assign(first, std::min(last, 4 * H), [&](int64_t column, int64_t count, T* panel) {
          pack_panel(gates, column, count, panel);
          add_bias(gates, column, count, to.bias + column);
        });
        outputs.multiply(inputs, accumulate, {to.input.at(first), to.input.stride, to.input.count - first});
        outputs.multiply(states, accumulate, {to.recurrent.at(first), to.recurrent.stride, to.recurrent.count - first});
      }
    });
  }

  static void pack_panel(const std::vector<const T*>& rows, int64_t column, int64_t columns, T* to) {
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      pack_rows<width>(rows.data(), int64_t(rows.size()), column, columns, to);
    });
  }

  static Panels<T> pack(const std::vector<const T*>& rows, int64_t columns, const AlignedArray<T>& memory) {
    const int64_t depth = padded(int64_t(rows.size()), DEPTH_INTERLEAVE<T>);
    at::parallel_for(0, padded(columns) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t column = index * COLUMNS;
        pack_panel(rows, column, std::min(COLUMNS, columns - column), memory.data() + column * depth);
      }
    });
    return {memory.data(), columns, depth};
  }

  static void add_bias(const std::vector<const T*>& rows, int64_t column, int64_t columns, float* bias) {
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for_each_vector<W>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
        Float<W> sum = load<W>(bias + j, lanes);
        for (const T* row : rows) sum += load<W>(row + column + j, lanes);
        store<W>(bias + j, sum, lanes);
      });
    });
  }

  const BiLstmShape& shape_;
  const ValidFrames& frames_;
  const BiLstmWeights& weights_;
  const T *gradient_, *x_, *output_, *saved_;  // tensors of the op
  RowBuffer<T> gates_;                         // (frames, 2, 4, H): gradients of the gates
  std::vector<T> zeros_;                       // (H,)
};

}  // namespace las::bilstm
