// A bidirectional LSTM layer over utterances of different lengths, and its gradients: the C++ backend of
// las_fast/ops/bilstm.py, which defines it.
//
// Utterances are sorted from the longest to the shortest. At step s, those longer than s are the rows of the matmuls,
// in both directions: the backward direction reads frame length - 1 - s. So nothing is reversed, and no padding is
// computed. Inputs are multiplied for several steps at once, hidden states step by step, both by weights packed
// beforehand.
//
// A row's sums do not depend on the other rows (matmul.h): an utterance gets the same result alone and in any batch.
// Gradients are summed in the order of the frames, with any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "lstm.h"
#include "matmul.h"
#include "memory.h"
#include "packing.h"
#include "vector.h"

namespace {

using las::COLUMNS;
using las::Float;
using las::load;
using las::Matrix;
using las::padded;
using las::Panels;
using las::store;
using las::RowBuffer;

constexpr int64_t DIRECTIONS = 2;
constexpr int64_t SAVED = 5;      // saved values per frame, direction and unit: the four gates and the cell state
constexpr int64_t CHUNK = 128;    // rows per matmul of inputs: their gates stay in the second-level cache
constexpr int64_t BLOCK = 2048;   // frames per matmul of a weight's gradient: each matmul reads and writes all of it
constexpr int64_t MIN_GROUP = 8;  // utterances per group: with fewer rows, reading the weights takes most of the time

struct BiLstmShape {
  int64_t B, T, I, H;
};

// The valid frames, numbered in two ways: a position is b * T + t, as in tensors; an index does not count padding.
struct ValidFrames {
  ValidFrames(const at::Tensor& lengths_in, int64_t B, int64_t T) : lengths(B), first(B + 1, 0) {
    for (int64_t b = 0; b < B; ++b) {
      lengths[b] = std::clamp<int64_t>(lengths_in.const_data_ptr<int64_t>()[b], 0, T);
      first[b + 1] = first[b] + lengths[b];
      for (int64_t t = 0; t < lengths[b]; ++t) positions.push_back(b * T + t);
    }
  }
  int64_t count() const { return int64_t(positions.size()); }

  // Distribute the utterances in order of length, so that the groups have about the same work. Each group is sorted
  // from the longest to the shortest.
  std::vector<std::vector<int64_t>> grouped(int64_t count) const {
    std::vector<int64_t> order(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    std::vector<std::vector<int64_t>> groups(count);
    for (size_t i = 0; i < order.size(); ++i) groups[i % count].push_back(order[i]);
    return groups;
  }
  // The index of the frame that a direction of utterance b reads at a step.
  int64_t index(int64_t direction, int64_t b, int64_t step) const {
    return first[b] + (direction == 0 ? step : lengths[b] - 1 - step);
  }

  std::vector<int64_t> lengths;    // (B,)
  std::vector<int64_t> first;      // (B + 1,): index of the first frame of each utterance
  std::vector<int64_t> positions;  // (frames,)
};

template <class Each>
void for_each_direction(const Each& each) {
  at::parallel_for(0, DIRECTIONS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) each(d);
  });
}

// The number of groups of utterances, none of which is empty.
int64_t group_count(int64_t B) {
  return std::min(B, std::max<int64_t>(1, std::min((at::get_num_threads() + 1) / DIRECTIONS, B / MIN_GROUP)));
}

// In the order of the schema: weight_ih (4H, I), weight_hh (4H, H), bias_ih (4H,), bias_hh (4H,) per direction.
struct BiLstmWeights {
  explicit BiLstmWeights(at::TensorList list) {
    for (const at::Tensor& x : list) tensors.push_back(x.contiguous());
  }
  const float* input(int64_t direction) const { return tensors[4 * direction].const_data_ptr<float>(); }
  const float* recurrent(int64_t direction) const { return tensors[4 * direction + 1].const_data_ptr<float>(); }
  float bias(int64_t direction, int64_t i) const {
    const at::Tensor &bias_ih = tensors[4 * direction + 2], &bias_hh = tensors[4 * direction + 3];
    return bias_ih.const_data_ptr<float>()[i] + bias_hh.const_data_ptr<float>()[i];
  }

  std::vector<at::Tensor> tensors;
};

// The packed weights of one direction.
template <class T>
struct PackedDirection {
  Panels<T> input, recurrent;  // (4 * H, I), (4 * H, H)
  std::vector<float> bias;     // (padded 4 * H,)
  las::AlignedArray<T> input_memory, recurrent_memory;
};

// ------------------------------------------------------------------------------------------------------------- forward

template <class T>
class BiLstmForward {
 public:
  BiLstmForward(const BiLstmShape& shape, const ValidFrames& frames, const BiLstmWeights& weights, const T* x,
                T* output, T* saved)
      : shape_(shape), frames_(frames), x_(x), output_(output), saved_(saved) {
    for_each_direction([&](int64_t d) { pack(weights, d); });
  }

  void run() {
    const auto groups = frames_.grouped(group_count(shape_.B));
    at::parallel_for(0, DIRECTIONS * int64_t(groups.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i % DIRECTIONS, groups[i / DIRECTIONS]);
    });
    at::parallel_for(0, shape_.B, MIN_GROUP, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) clear_padding(b);
    });
  }

 private:
  struct FrameRow {
    int64_t utterance, index;
  };

  struct Scratch {
    Scratch(const BiLstmShape& s, int64_t utterances, int64_t rows)
        : inputs(rows, s.I), hidden(utterances, s.H), gates(rows, 4 * s.H), cell(utterances, s.H), initial(rows) {
      inputs.clear(), hidden.clear(), cell.clear();
    }
    RowBuffer<T> inputs, hidden;        // (rows, I), (utterances, H)
    RowBuffer<float> gates, cell;       // (rows, 4 * H), (utterances, H)
    std::vector<const float*> initial;  // (rows,)
    std::vector<FrameRow> rows;
  };

  void pack(const BiLstmWeights& weights, int64_t d) {
    const auto [B, _, I, H] = shape_;
    PackedDirection<T>& to = packed_[d];
    to.input = las::pack<T>(weights.input(d), I, 1, 4 * H, I, to.input_memory);
    to.recurrent = las::pack<T>(weights.recurrent(d), H, 1, 4 * H, H, to.recurrent_memory);
    to.bias.resize(padded(4 * H));
    for (int64_t i = 0; i < 4 * H; ++i) to.bias[i] = weights.bias(d, i);
  }

  // Run one direction of a group of utterances, which are sorted from the longest to the shortest.
  void run(int64_t direction, const std::vector<int64_t>& utterances) {
    int64_t active = int64_t(utterances.size());
    Scratch scratch(shape_, active, std::max(active, CHUNK));
    const int64_t longest = frames_.lengths[utterances[0]];
    for (int64_t step = 0; step < longest;) {
      scratch.rows.clear();
      std::vector<int64_t> counts;
      do {
        while (frames_.lengths[utterances[active - 1]] <= step) --active;
        for (int64_t r = 0; r < active; ++r)
          scratch.rows.push_back({utterances[r], frames_.index(direction, utterances[r], step)});
        counts.push_back(active);
      } while (++step < longest && int64_t(scratch.rows.size()) + active <= CHUNK);
      compute_input_gates(direction, scratch);
      int64_t row = 0;
      for (const int64_t count : counts) {
        step_rows(direction, scratch, row, count, row == 0 && step == int64_t(counts.size()));
        row += count;
      }
    }
  }

  // Compute the contribution of the inputs to the gates of scratch.rows.
  void compute_input_gates(int64_t direction, Scratch& scratch) {
    const int64_t n = int64_t(scratch.rows.size()), I = shape_.I;
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(x_ + frames_.positions[scratch.rows[i].index] * I, I, scratch.inputs.at(i));
    std::fill_n(scratch.initial.begin(), n, packed_[direction].bias.data());
    las::matmul(scratch.inputs.rows(n), packed_[direction].input, scratch.initial.data(), scratch.gates.rows(n));
  }

  // Run one step of scratch.rows [row, row + count). States are zero before the first step.
  void step_rows(int64_t direction, Scratch& scratch, int64_t row, int64_t count, bool first) {
    const int64_t H = shape_.H;
    const Matrix<float> gates = scratch.gates.rows(count, row);
    if (!first) {
      for (int64_t i = 0; i < count; ++i) scratch.initial[i] = gates.at(i);
      las::matmul(scratch.hidden.rows(count), packed_[direction].recurrent, scratch.initial.data(), gates);
    }
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = frames_.positions[scratch.rows[row + i].index];
        T* out = output_ + (position * DIRECTIONS + direction) * H;
        T* saved = saved_ ? saved_ + (position * DIRECTIONS + direction) * SAVED * H : nullptr;
        step_cell<width>(gates.at(i), scratch.cell.at(i), scratch.hidden.at(i), out, saved);
      }
    });
  }

  template <int W>
  LAS_INLINE void step_cell(const float* sums, float* cell, T* hidden, T* output, T* saved) const {
    const int64_t H = shape_.H;
    las::for_each_vector<W>(H, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const las::LstmGates<W> gates = las::activate_gates<W>(sums + j, H, lanes);
      const las::LstmState<W> after = las::lstm_step<W>(gates, gates.forget * load<W>(cell + j, lanes));
      store<W>(cell + j, after.cell, lanes);
      store<W>(hidden + j, after.hidden, lanes);
      store<W>(output + j, after.hidden, lanes);
      if (!saved) return;
      las::store_gates<W>(saved + j, H, gates, lanes);
      store<W>(saved + 4 * H + j, after.cell, lanes);
    });
  }

  void clear_padding(int64_t b) {
    const int64_t frame = DIRECTIONS * shape_.H, valid = frames_.lengths[b];
    std::fill_n(output_ + (b * shape_.T + valid) * frame, (shape_.T - valid) * frame, T(0.0f));
  }

  const BiLstmShape& shape_;
  const ValidFrames& frames_;
  const T* x_;
  T *output_, *saved_;  // (B, T, 2 * H) and (B, T, 2, SAVED, H); saved may be null
  PackedDirection<T> packed_[DIRECTIONS];
};

// ------------------------------------------------------------------------------------------------------------ backward

// lstm.h has the gradients of the gates of a step. They are computed from the last step to the first, where dX is the
// gradient of X and dgates that of the following step:
//   dh += W_hh^T dgates
// Then, over all frames, with h' the previous hidden state:
//   dx = sum over directions of dgates W_ih;   dW_ih = dgates^T x;   dW_hh = dgates^T h';   db = sum of dgates

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
    las::AlignedArray<T> memory[DIRECTIONS];
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
    las::AlignedArray<T> memory[DIRECTIONS];
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
    const int64_t depth = padded(std::min(BLOCK, frames_.count()), las::DEPTH_INTERLEAVE<T>);
    const las::AlignedArray<T> x(padded(shape_.I) * depth), h(padded(shape_.H) * depth);
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
      las::dispatch_width([&](auto width) __attribute__((always_inline)) {
        for (int64_t r = 0; r < active; ++r)
          cell_backward<width>(direction, utterances[r], step, hidden.at(r), cell.at(r), gates.at(r));
      });
      if (step > 0) las::matmul(gates.rows(active), recurrent, nullptr, hidden.rows(active));
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
    las::for_each_vector<W>(H, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      for (int64_t i = 0; i < SAVED; ++i) las::prefetch(saved_ahead + i * H + j);
      las::prefetch(output_gradient_ahead + j);
      const las::LstmGates<W> gates = las::load_gates<W>(saved_now + j, H, lanes);
      const Float<W> tanh_cell = las::tanh<W>(load<W>(saved_now + 4 * H + j, lanes));
      const Float<W> dh = load<W>(output_gradient + j, lanes) + load<W>(hidden + j, lanes);
      const Float<W> dc = las::lstm_cell_gradient<W>(gates, tanh_cell, dh) + load<W>(cell + j, lanes);
      const Float<W> cell_before = load<W>(saved_before + j, lanes);
      las::store_gates<W>(row + j, H, las::lstm_gate_gradients<W>(gates, tanh_cell, cell_before, dh, dc), lanes);
      store<W>(cell + j, dc * gates.forget, lanes);
    });
    std::copy_n(row, 4 * H, gates_.at(index) + direction * 4 * H);
  }

  void input_gradients(const Panels<T> (&input)[DIRECTIONS], int64_t from, int64_t count, const RowBuffer<float>& sums,
                       las::InitialSums initial, T* x_gradient) const {
    for (int64_t d = 0; d < DIRECTIONS; ++d) {
      Matrix<T> rows = gates_.rows(count, from);
      rows.data += d * 4 * shape_.H;
      las::matmul(rows, input[d], d == 0 ? nullptr : initial, sums.rows(count));
    }
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i)
        las::convert<width>(sums.at(i), shape_.I, x_gradient + frames_.positions[from + i] * shape_.I);
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
      const las::AlignedArray<T> panel(COLUMNS * inputs.depth);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t column = index * COLUMNS, count = std::min(COLUMNS, 4 * H - column);
        pack_panel(gates, column, count, panel.data());
        add_bias(gates, column, count, to.bias + column);
        const auto rows = [&](const Matrix<float>& all) { return Matrix<float>{all.at(column), all.stride, count}; };
        las::transposed_matmul({panel.data(), count}, inputs, accumulate, rows(to.input));
        las::transposed_matmul({panel.data(), count}, states, accumulate, rows(to.recurrent));
      }
    });
  }

  static void pack_panel(const std::vector<const T*>& rows, int64_t column, int64_t columns, T* to) {
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      las::pack_rows<width>(rows.data(), int64_t(rows.size()), column, columns, to);
    });
  }

  static Panels<T> pack(const std::vector<const T*>& rows, int64_t columns, const las::AlignedArray<T>& memory) {
    const int64_t depth = padded(int64_t(rows.size()), las::DEPTH_INTERLEAVE<T>);
    at::parallel_for(0, padded(columns) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t column = index * COLUMNS;
        pack_panel(rows, column, std::min(COLUMNS, columns - column), memory.data() + column * depth);
      }
    });
    return {memory.data(), columns, depth};
  }

  static void add_bias(const std::vector<const T*>& rows, int64_t column, int64_t columns, float* bias) {
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      las::for_each_vector<W>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
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

// ----------------------------------------------------------------------------------------------------------- arguments

BiLstmShape check(const at::Tensor& x, const at::Tensor& lengths, at::TensorList weights) {
  TORCH_CHECK(x.dim() == 3 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "x must be (B, T, I) float32 or bfloat16; got ", x.sizes(), " ", x.scalar_type());
  const int64_t B = x.size(0), I = x.size(2);
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == B && lengths.scalar_type() == at::kLong, "lengths must be (", B,
              ",) int64; got ", lengths.sizes(), " ", lengths.scalar_type());
  TORCH_CHECK(weights.size() == 4 * DIRECTIONS, "weights must be 8 tensors; got ", weights.size());
  TORCH_CHECK(weights[1].dim() == 2, "weight_hh must be (4H, H); got ", weights[1].sizes());
  const int64_t H = weights[1].size(1);
  const std::vector<int64_t> shapes[] = {{4 * H, I}, {4 * H, H}, {4 * H}, {4 * H}};
  for (size_t i = 0; i < weights.size(); ++i)
    TORCH_CHECK(weights[i].sizes() == shapes[i % 4] && weights[i].scalar_type() == at::kFloat, "weights[", i,
                "] must be ", at::IntArrayRef(shapes[i % 4]), " float32; got ", weights[i].sizes(), " ",
                weights[i].scalar_type());
  return {B, x.size(1), I, H};
}

template <class T>
void run_forward(const BiLstmShape& shape, const at::Tensor& x, const at::Tensor& lengths, at::TensorList weights,
                 at::Tensor& output, at::Tensor& saved) {
  const ValidFrames frames(lengths, shape.B, shape.T);
  const at::Tensor inputs = x.contiguous();
  BiLstmForward<T>(shape, frames, BiLstmWeights(weights), inputs.const_data_ptr<T>(), output.mutable_data_ptr<T>(),
                   saved.mutable_data_ptr<T>()).run();  // the pointer is null if `saved` is empty
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& lengths, at::TensorList weights,
                                           bool gradients) {
  const BiLstmShape shape = check(x, lengths, weights);
  const auto [B, T, I, H] = shape;
  at::Tensor output = at::empty({B, T, DIRECTIONS * H}, x.options());
  at::Tensor saved = at::empty({gradients ? B : 0, T, DIRECTIONS, SAVED, H}, x.options());
  if (x.scalar_type() == at::kFloat) run_forward<float>(shape, x, lengths.contiguous(), weights, output, saved);
  else run_forward<at::BFloat16>(shape, x, lengths.contiguous(), weights, output, saved);
  return {output, saved};
}

template <class T>
void run_backward(const BiLstmShape& shape, const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& lengths,
                  at::TensorList list, const at::Tensor& output, const at::Tensor& saved, at::Tensor& x_gradient,
                  std::vector<at::Tensor>& gradients) {
  const ValidFrames frames(lengths, shape.B, shape.T);
  const BiLstmWeights weights(list);
  const at::Tensor output_gradient = gradient.contiguous(), inputs = x.contiguous();
  BiLstmBackward<T> job(shape, frames, weights, output_gradient.const_data_ptr<T>(), inputs.const_data_ptr<T>(),
                        output.const_data_ptr<T>(), saved.const_data_ptr<T>());
  job.backpropagate();
  if (x_gradient.numel()) job.input_gradients(x_gradient.mutable_data_ptr<T>());
  const auto rows = [&](int64_t i) {
    return Matrix<float>{gradients[i].mutable_data_ptr<float>(), gradients[i].stride(0), gradients[i].size(0)};
  };
  job.weight_gradients({{rows(0), rows(1), rows(2).data}, {rows(3), rows(4), rows(5).data}});
}

std::tuple<at::Tensor, std::vector<at::Tensor>> backward(const at::Tensor& gradient, const at::Tensor& x,
                                                         const at::Tensor& lengths, at::TensorList weights,
                                                         const at::Tensor& output, const at::Tensor& saved,
                                                         bool inputs) {
  const BiLstmShape shape = check(x, lengths, weights);
  const auto [B, T, I, H] = shape;
  for (const auto& [name, tensor] : {std::pair("gradient", gradient), std::pair("output", output)})
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef({B, T, DIRECTIONS * H}) && tensor.scalar_type() == x.scalar_type(),
                name, " must be (B, T, 2H) with B=", B, ", T=", T, ", H=", H, " and the dtype of x; got ",
                tensor.sizes(), " ", tensor.scalar_type());
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({B, T, DIRECTIONS, SAVED, H}) && saved.scalar_type() == x.scalar_type(),
              "saved must be the second result of the forward op for these inputs; got ", saved.sizes(), " ",
              saved.scalar_type());
  at::Tensor x_gradient = at::empty({inputs ? B : 0, T, I}, x.options());
  std::vector<at::Tensor> gradients;
  for (int64_t d = 0; d < DIRECTIONS; ++d)
    for (const std::vector<int64_t>& sizes : {std::vector{4 * H, padded(I)}, {4 * H, padded(H)}, {4 * H}})
      gradients.push_back(sizes.size() == 2 ? at::empty(sizes, weights[0].options())
                                            : at::zeros(sizes, weights[0].options()));
  const auto run = x.scalar_type() == at::kFloat ? run_backward<float> : run_backward<at::BFloat16>;
  run(shape, gradient, x, lengths.contiguous(), weights, output.contiguous(), saved.contiguous(), x_gradient,
      gradients);
  for (size_t i = 0; i < gradients.size(); ++i)
    if (gradients[i].dim() == 2) gradients[i] = gradients[i].narrow(1, 0, i % 3 == 0 ? I : H).contiguous();
  return {x_gradient, gradients};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("bilstm_cpp", &forward);
  m.impl("bilstm_backward_cpp", &backward);
}
