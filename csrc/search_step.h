// One step of the speller for the live beams of a thread: from their tokens and their parents' states to their logits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "activations.h"
#include "int8.h"
#include "lstm.h"
#include "matmul.h"
#include "memory.h"
#include "packing.h"
#include "search_state.h"
#include "softmax.h"
#include "speller.h"
#include "vector.h"

namespace las::search {

constexpr float COVERAGE_FLOOR = 0.01f;  // lower limit of a frame's attention sum, so that its logarithm is finite

template <class T, class G>
class SearchStep {
  using S = StateType<T, G>;

 public:
  SearchStep(const PackedSpeller<T, G>& speller, const SearchArguments& arguments, const LiveBeams& live)
      : speller_(speller), arguments_(arguments), live_(live), before_(speller, live.max_rows),
        after_(speller, live.max_rows), token_gates_(speller.V) {
    allocate();
  }

  // Compute the next states and the logits of the live beams. Write their attention to their slots.
  void run(std::vector<SearchSlot<T>>& slots) {
    embed_new_tokens();
    compute_recurrent_gates();
    for (int64_t i = 0; i < speller_.cells(); ++i) step_cell(i);
    attend(slots);
    compute_logits();
    std::swap(before_, after_);
  }

  const float* logits(int64_t row) const { return sums_.at(row); }  // (V,)

 private:
  void allocate() {
    const int64_t rows = live_.max_rows;
    int64_t max_depth = std::max({speller_.D, arguments_.T, speller_.M}), gates = 0;
    for (int64_t i = 0; i < speller_.cells(); ++i) {
      max_depth = std::max(max_depth, speller_.size(i) + speller_.E);
      gates = std::max(gates, 4 * speller_.size(i));
      recurrent_.emplace_back(rows, 4 * speller_.size(i));
    }
    inputs_ = ZeroedBuffer<T>(rows, max_depth);
    if constexpr (std::is_same_v<G, int8_t>) quantised_ = ZeroedBuffer<uint8_t>(rows, max_depth);
    scales_.resize(rows);
    sums_ = ZeroedBuffer<>(rows, std::max({gates, speller_.M, speller_.V}));
    queries_ = ZeroedBuffer<>(rows, speller_.D);
    weights_ = ZeroedBuffer<>(arguments_.K, arguments_.T);
    contexts_ = ZeroedBuffer<>(arguments_.K, speller_.E);
    initial_.resize(rows);
  }

  int64_t count() const { return live_.count(); }

  // Convert the first `n` values of the rows from(i) to the input (count, depth) of a matmul, padded with zeros.
  template <class From>
  Matrix<const T> converted(int64_t count, int64_t depth, int64_t n, From from) {
    for (int64_t i = 0; i < count; ++i) {
      T* to = inputs_.at(i);
      convert(from(i), n, to);
      std::fill(to + n, to + depth, T(0.0f));
    }
    return inputs_.rows(count);
  }

  // The same for a matmul in int8.
  template <class From>
  Int8Rows quantised(int64_t count, int64_t depth, int64_t n, From from) {
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) scales_[i] = las::quantise<width>(from(i), n, depth, quantised_.at(i));
    });
    return {quantised_.at(0), quantised_.stride, count, scales_.data()};
  }

  // Multiply the first `n` values of the rows from(i) by a layer of gates.
  template <class From>
  void multiply_gates(const Layer<G>& layer, int64_t count, int64_t n, From from, InitialSums initial,
                      const Matrix<float>& out) {
    const int64_t depth = layer.weights.depth;
    if constexpr (std::is_same_v<G, int8_t>)
      matmul(quantised(count, depth, n, from), layer.weights, initial, out);
    else
      matmul(converted(count, depth, n, from), layer.weights, initial, out);
  }

  InitialSums broadcast_bias(const std::vector<float>& bias, int64_t count) {
    std::fill_n(initial_.begin(), count, bias.data());
    return initial_.data();
  }

  // Compute the contribution of tokens to the gates of the first cell, for tokens that occur for the first time.
  void embed_new_tokens() {
    std::vector<int64_t> new_tokens;
    for (const LiveBeam& row : live_.rows) {
      AlignedArray<float>& gates = token_gates_[row.token];
      if (gates.data()) continue;
      gates = AlignedArray<float>(4 * speller_.H);
      new_tokens.push_back(row.token);
    }
    const int64_t n = int64_t(new_tokens.size());
    const Layer<T>& layer = speller_.token;
    const auto embedded = [&](int64_t i) { return speller_.embedding + new_tokens[i] * speller_.M; };
    matmul(converted(n, layer.weights.depth, speller_.M, embedded), layer.weights, broadcast_bias(layer.bias, n),
           sums_.rows(n));
    for (int64_t i = 0; i < n; ++i) std::copy_n(sums_.at(i), 4 * speller_.H, token_gates_[new_tokens[i]].data());
  }

  // Compute the contribution of the parents' states to the gates, once per state.
  void compute_recurrent_gates() {
    const int64_t n = int64_t(live_.parent_rows.size());
    const auto first = [&](int64_t i) { return before_.first.at(live_.parent_rows[i]); };
    multiply_gates(speller_.first, n, speller_.E + speller_.H, first, nullptr, recurrent_[0].rows(n));
    for (int64_t c = 1; c < speller_.cells(); ++c) {
      const Layer<G>& layer = speller_.later[c - 1].recurrent;
      const auto hidden = [&](int64_t i) { return before_.hidden[c - 1].at(live_.parent_rows[i]); };
      multiply_gates(layer, n, speller_.size(c), hidden, broadcast_bias(layer.bias, n), recurrent_[c].rows(n));
    }
  }

  S* hidden(int64_t cell, int64_t row) {
    return cell == 0 ? after_.first.at(row) + speller_.E : after_.hidden[cell - 1].at(row);
  }

  // The new hidden states of a cell of size n as the input of a matmul, in place if their type allows it. If n is odd,
  // a matmul of bfloat16 reads one value more, which is 0.
  Matrix<const T> hidden_rows(int64_t cell, int64_t depth, int64_t n) {
    if constexpr (std::is_same_v<S, T>)
      return {hidden(cell, 0), (cell == 0 ? after_.first : after_.hidden[cell - 1]).stride, count()};
    else
      return converted(count(), depth, n, [&](int64_t i) { return hidden(cell, i); });
  }

  // Compute the next state of cell c.
  void step_cell(int64_t c) {
    const int64_t size = speller_.size(c);
    if (c > 0) add_input(c, speller_.later[c - 1].input);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < count(); ++i) {
        const LiveBeam& row = live_.rows[i];
        const float* gates = c == 0 ? recurrent_[0].at(row.parent_index) : sums_.at(i);
        const float* token = c == 0 ? token_gates_[row.token].data() : nullptr;
        const auto sum = [&](int64_t g, int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> gate = load<W>(gates + g * size + j, lanes);
          return token ? gate + load<W>(token + g * size + j, lanes) : gate;
        };
        lstm_step_unsaved<W>(size, before_.cell[c].at(row.parent_row), after_.cell[c].at(i), hidden(c, i), sum);
      }
    });
  }

  // Compute the gates of cell c in sums_: add the contribution of the cell below to the recurrent gates.
  void add_input(int64_t c, const Layer<G>& layer) {
    const int64_t n = speller_.size(c - 1);
    for (int64_t i = 0; i < count(); ++i) initial_[i] = recurrent_[c].at(live_.rows[i].parent_index);
    const InitialSums initial = initial_.data();
    if constexpr (std::is_same_v<G, int8_t>)
      multiply_gates(layer, count(), n, [&](int64_t i) { return hidden(c - 1, i); }, initial, sums_.rows(count()));
    else
      matmul(hidden_rows(c - 1, layer.weights.depth, n), layer.weights, initial, sums_.rows(count()));
  }

  // Compute the new context of every row.
  void attend(std::vector<SearchSlot<T>>& slots) {
    const int64_t last = speller_.cells() - 1;
    const Layer<T>& query = speller_.query;
    matmul(hidden_rows(last, query.weights.depth, speller_.size(last)), query.weights,
           broadcast_bias(query.bias, count()), queries_.rows(count()));
    for (int64_t i = 0; i < count();) {
      int64_t end = i;
      while (end < count() && live_.rows[end].slot == live_.rows[i].slot) ++end;
      attend(slots[live_.rows[i].slot], i, end - i);
      i = end;
    }
  }

  // Rows [first, first + n), all of one utterance.
  void attend(SearchSlot<T>& slot, int64_t first, int64_t n) {
    const auto query = [&](int64_t i) { return queries_.at(first + i); };
    matmul(converted(n, slot.keys.depth, speller_.D, query), slot.keys, nullptr, weights_.rows(n));
    std::fill(slot.attended_frames.begin(), slot.attended_frames.end(), 0);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i)
        slot.attended_frames[live_.rows[first + i].beam] = las::softmax<width>(weights_.at(i), slot.frames).peak;
    });
    if (arguments_.coverage_weight != 0.0f) update_coverage(slot, first, n);
    const auto weights = [&](int64_t i) { return weights_.at(i); };
    matmul(converted(n, slot.values.depth, slot.frames, weights), slot.values, nullptr, contexts_.rows(n));
    for (int64_t i = 0; i < n; ++i) convert(contexts_.at(i), speller_.E, after_.first.at(first + i));
  }

  void update_coverage(SearchSlot<T>& slot, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      float* attention_sum = slot.attention_sums.data() + live_.rows[first + i].beam * slot.frames;
      double sum = 0.0;
      for (int64_t t = 0; t < slot.frames; ++t) {
        attention_sum[t] += weights_.at(i)[t];
        sum += std::log(std::clamp(attention_sum[t], COVERAGE_FLOOR, 1.0f));
      }
      const float mean = float(sum / std::max<int64_t>(1, slot.frames));
      slot.coverage[live_.rows[first + i].beam] = arguments_.coverage_weight * mean;
    }
  }

  // Compute the logits of every row, in sums_.
  void compute_logits() {
    const int64_t last = speller_.cells() - 1, n = count();
    const Layer<T>& project = speller_.project;
    const int64_t H = speller_.size(last), E = speller_.E;
    for (int64_t i = 0; i < n; ++i) {
      T* to = inputs_.at(i);
      convert(hidden(last, i), H, to);
      convert(after_.first.at(i), E, to + H);
      std::fill(to + H + E, to + project.weights.depth, T(0.0f));
    }
    matmul(Matrix<const T>(inputs_.rows(n)), project.weights, broadcast_bias(project.bias, n), sums_.rows(n));
    apply_gelu();
    const Layer<T>& output = speller_.output;
    const auto features = [&](int64_t i) { return sums_.at(i); };
    const Matrix<const T> rows = converted(n, output.weights.depth, speller_.M, features);
    matmul(rows, output.weights, broadcast_bias(output.bias, n), sums_.rows(n));
  }

  void apply_gelu() {
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < count(); ++i)
        for_each_vector<W>(speller_.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          store<W>(sums_.at(i) + j, gelu<W>(load<W>(sums_.at(i) + j, lanes)), lanes);
        });
    });
  }

  const PackedSpeller<T, G>& speller_;
  const SearchArguments& arguments_;
  const LiveBeams& live_;
  States<S> before_, after_;                      // max_rows rows, like all buffers of rows below
  std::vector<ZeroedBuffer<>> recurrent_;         // (rows, 4 * H_i) per cell: contribution of the parents' states
  ZeroedBuffer<T> inputs_;                        // (rows, max depth): inputs of the next matmul
  ZeroedBuffer<uint8_t> quantised_;               // (rows, max depth): inputs of the next matmul in int8
  std::vector<float> scales_;                     // (rows,): scales of quantised_
  std::vector<const float*> initial_;             // (rows,): initial sums of the next matmul
  ZeroedBuffer<> sums_;                           // (rows, max of 4 * H_i, M, V): gates, features, then logits
  ZeroedBuffer<> queries_;                        // (rows, D)
  ZeroedBuffer<> weights_, contexts_;             // (K, T) and (K, E), of one utterance
  std::vector<AlignedArray<float>> token_gates_;  // (4 * H) per token: its contribution to the gates, once computed
};

}  // namespace las::search
