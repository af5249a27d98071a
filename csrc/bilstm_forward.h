// The forward pass of bilstm.cpp. Each thread takes one direction of a group of utterances through all steps.

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

// The packed weights of one direction.
template <class T>
struct PackedDirection {
  Panels<T> input, recurrent;  // (4 * H, I), (4 * H, H)
  std::vector<float> bias;     // (padded 4 * H,)
  AlignedArray<T> input_memory, recurrent_memory;
};

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
    matmul(scratch.inputs.rows(n), packed_[direction].input, scratch.initial.data(), scratch.gates.rows(n));
  }

  // Run one step of scratch.rows [row, row + count). States are zero before the first step.
  void step_rows(int64_t direction, Scratch& scratch, int64_t row, int64_t count, bool first) {
    const int64_t H = shape_.H;
    const Matrix<float> gates = scratch.gates.rows(count, row);
    if (!first) {
      for (int64_t i = 0; i < count; ++i) scratch.initial[i] = gates.at(i);
      matmul(scratch.hidden.rows(count), packed_[direction].recurrent, scratch.initial.data(), gates);
    }
    dispatch_width([&](auto width) __attribute__((always_inline)) {
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
    for_each_vector<W>(H, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const LstmGates<W> gates = activate_gates<W>(sums + j, H, lanes);
      const LstmState<W> after = lstm_step<W>(gates, gates.forget * load<W>(cell + j, lanes));
      store<W>(cell + j, after.cell, lanes);
      store<W>(hidden + j, after.hidden, lanes);
      store<W>(output + j, after.hidden, lanes);
      if (!saved) return;
      store_gates<W>(saved + j, H, gates, lanes);
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

}  // namespace las::bilstm
