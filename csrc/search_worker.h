// One thread of the beam search; speller_search.cpp explains how the threads share the utterances.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "activations.h"
#include "beam_topk.h"
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
class SearchWorker {
  using S = StateType<T, G>;

 public:
  SearchWorker(const PackedSpeller<T, G>& speller, const SearchArguments& arguments, int64_t slots)
      : speller_(speller), arguments_(arguments), max_rows_(slots * arguments.K + 1), before_(speller, max_rows_),
        after_(speller, max_rows_), best_(arguments.K), parent_index_(max_rows_), token_gates_(speller.V) {
    for (int64_t i = 0; i < slots; ++i) slots_.emplace_back(arguments.K);
    allocate();
  }

  // Search utterances until none is left. `queue` is the index of the next one; the steps go to `histories` (B,).
  void run(std::atomic<int64_t>& queue, std::vector<StepHistory>& histories) {
    for (;;) {
      for (SearchSlot<T>& slot : slots_)
        if (slot.b < 0) {
          const int64_t b = queue++;
          if (b >= arguments_.B) break;
          start(slot, b);
        }
      list_live_beams();
      if (rows_.empty()) return;
      embed_new_tokens();
      compute_recurrent_gates();
      for (int64_t i = 0; i < speller_.cells(); ++i) step_cell(i);
      attend();
      compute_logits();
      for (size_t i = 0; i < slots_.size(); ++i)
        if (slots_[i].b >= 0) take_best(int64_t(i), histories[slots_[i].b]);
      std::swap(before_, after_);
    }
  }

 private:
  int64_t initial_state() const { return max_rows_ - 1; }  // row of the state before the first token, which is zeros

  void allocate() {
    int64_t max_depth = std::max({speller_.D, arguments_.T, speller_.M}), gates = 0;
    for (int64_t i = 0; i < speller_.cells(); ++i) {
      max_depth = std::max(max_depth, speller_.size(i) + speller_.E);
      gates = std::max(gates, 4 * speller_.size(i));
      recurrent_.emplace_back(max_rows_, 4 * speller_.size(i));
    }
    inputs_ = ZeroedBuffer<T>(max_rows_, max_depth);
    if constexpr (std::is_same_v<G, int8_t>) quantised_ = ZeroedBuffer<uint8_t>(max_rows_, max_depth);
    scales_.resize(max_rows_);
    sums_ = ZeroedBuffer<>(max_rows_, std::max({gates, speller_.M, speller_.V}));
    queries_ = ZeroedBuffer<>(max_rows_, speller_.D);
    weights_ = ZeroedBuffer<>(arguments_.K, arguments_.T);
    contexts_ = ZeroedBuffer<>(arguments_.K, speller_.E);
    logits_.resize(arguments_.K * speller_.V);
    summaries_.resize(arguments_.K);
    block_maxima_.resize(arguments_.K * topk::block_count(speller_.V));
    initial_.resize(max_rows_);
  }

  // Start the search of utterance b in a slot.
  void start(SearchSlot<T>& slot, int64_t b) {
    const int64_t n = arguments_.valid_frames(b), K = arguments_.K, D = speller_.D, E = speller_.E;
    slot.b = b;
    slot.frames = n;
    const float* keys = arguments_.keys.const_data_ptr<float>() + b * arguments_.T * D;
    const float* values = arguments_.values.const_data_ptr<float>() + b * arguments_.T * E;
    slot.keys = las::pack<T>(keys, D, 1, n, D, slot.key_memory);
    slot.values = las::pack<T>(values, 1, E, E, n, slot.value_memory);
    UtteranceBeams& beams = slot.beams;
    std::fill_n(beams.scores.begin(), K, -INFINITE);  // only one beam exists before the first step
    beams.scores[0] = 0.0f;
    std::fill_n(beams.tokens.begin(), K, arguments_.sos);
    std::fill_n(beams.lengths.begin(), K, 0);
    std::fill_n(beams.ended.get(), K, false);
    if (arguments_.ngram_table) std::fill_n(beams.ngram_states.begin(), K, first_ngram_state());
    std::fill_n(slot.state_rows.begin(), K, initial_state());
    if (arguments_.coverage_weight != 0.0f) slot.attention_sums.assign(K * n, 0.0f);
    if (arguments_.ctc_log_probs) slot.prefixes.start(arguments_, b, speller_.V);
  }

  // The history before the first token is <sos> repeated. A state is its history as a number in base V.
  int64_t first_ngram_state() const {
    const int64_t states = arguments_.ngram_table->size(0);
    return speller_.V > 1 ? arguments_.sos * (states - 1) / (speller_.V - 1) : 0;
  }

  // List the live beams, and the states of their parents without duplicates.
  void list_live_beams() {
    rows_.clear();
    parent_rows_.clear();
    std::fill(parent_index_.begin(), parent_index_.end(), -1);
    for (size_t s = 0; s < slots_.size(); ++s) {
      const SearchSlot<T>& slot = slots_[s];
      for (int64_t k = 0; slot.b >= 0 && k < arguments_.K; ++k) {
        if (!slot.beams.live(k)) continue;
        const int64_t parent_row = slot.state_rows[k];
        if (parent_index_[parent_row] < 0) {
          parent_index_[parent_row] = int64_t(parent_rows_.size());
          parent_rows_.push_back(parent_row);
        }
        rows_.push_back({int64_t(s), k, slot.beams.tokens[k], parent_row, parent_index_[parent_row]});
      }
    }
  }

  int64_t count() const { return int64_t(rows_.size()); }

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
    for (const LiveBeam& row : rows_) {
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
    const int64_t n = int64_t(parent_rows_.size());
    const auto first = [&](int64_t i) { return before_.first.at(parent_rows_[i]); };
    multiply_gates(speller_.first, n, speller_.E + speller_.H, first, nullptr, recurrent_[0].rows(n));
    for (int64_t c = 1; c < speller_.cells(); ++c) {
      const Layer<G>& layer = speller_.later[c - 1].recurrent;
      const auto hidden = [&](int64_t i) { return before_.hidden[c - 1].at(parent_rows_[i]); };
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
        const float* gates = c == 0 ? recurrent_[0].at(rows_[i].parent_index) : sums_.at(i);
        const float* token = c == 0 ? token_gates_[rows_[i].token].data() : nullptr;
        const auto sum = [&](int64_t g, int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> gate = load<W>(gates + g * size + j, lanes);
          return token ? gate + load<W>(token + g * size + j, lanes) : gate;
        };
        lstm_step_unsaved<W>(size, before_.cell[c].at(rows_[i].parent_row), after_.cell[c].at(i), hidden(c, i), sum);
      }
    });
  }

  // Compute the gates of cell c in sums_: add the contribution of the cell below to the recurrent gates.
  void add_input(int64_t c, const Layer<G>& layer) {
    const int64_t n = speller_.size(c - 1);
    for (int64_t i = 0; i < count(); ++i) initial_[i] = recurrent_[c].at(rows_[i].parent_index);
    const InitialSums initial = initial_.data();
    if constexpr (std::is_same_v<G, int8_t>)
      multiply_gates(layer, count(), n, [&](int64_t i) { return hidden(c - 1, i); }, initial, sums_.rows(count()));
    else
      matmul(hidden_rows(c - 1, layer.weights.depth, n), layer.weights, initial, sums_.rows(count()));
  }

  // Compute the new context of every row.
  void attend() {
    const int64_t last = speller_.cells() - 1;
    const Layer<T>& query = speller_.query;
    matmul(hidden_rows(last, query.weights.depth, speller_.size(last)), query.weights,
           broadcast_bias(query.bias, count()), queries_.rows(count()));
    for (int64_t i = 0; i < count();) {
      int64_t end = i;
      while (end < count() && rows_[end].slot == rows_[i].slot) ++end;
      attend(slots_[rows_[i].slot], i, end - i);
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
        slot.attended_frames[rows_[first + i].beam] = las::softmax<width>(weights_.at(i), slot.frames).peak;
    });
    if (arguments_.coverage_weight != 0.0f) update_coverage(slot, first, n);
    const auto weights = [&](int64_t i) { return weights_.at(i); };
    matmul(converted(n, slot.values.depth, slot.frames, weights), slot.values, nullptr, contexts_.rows(n));
    for (int64_t i = 0; i < n; ++i) convert(contexts_.at(i), speller_.E, after_.first.at(first + i));
  }

  void update_coverage(SearchSlot<T>& slot, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      float* attention_sum = slot.attention_sums.data() + rows_[first + i].beam * slot.frames;
      double sum = 0.0;
      for (int64_t t = 0; t < slot.frames; ++t) {
        attention_sum[t] += weights_.at(i)[t];
        sum += std::log(std::clamp(attention_sum[t], COVERAGE_FLOOR, 1.0f));
      }
      const float mean = float(sum / std::max<int64_t>(1, slot.frames));
      slot.coverage[rows_[first + i].beam] = arguments_.coverage_weight * mean;
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

  // Replace the beams of slot s by their best continuations, and add the step to `history`.
  void take_best(int64_t s, StepHistory& history) {
    SearchSlot<T>& slot = slots_[s];
    const int64_t K = arguments_.K, V = speller_.V, blocks = topk::block_count(V);
    for (int64_t i = first_row(s); i < count() && rows_[i].slot == s; ++i) {
      const int64_t k = rows_[i].beam;
      std::copy_n(sums_.at(i), V, logits_.data() + k * V);
      summaries_[k] = topk::summarise(logits_.data() + k * V, V, block_maxima_.data() + k * blocks);
      slot.state_rows[k] = i;
    }
    const UtteranceBeams& beams = slot.beams;
    const topk::Inputs in{logits_.data(),       beams.scores.data(), beams.ended.get(),
                          beams.lengths.data(), 1, K, V, blocks};
    const topk::Options options = options_of(slot);
    best_.clear();
    for (int64_t k = 0; k < K; ++k)
      topk::offer_beam(in, options, summaries_.data(), block_maxima_.data(), 0, k, best_);
    best_.fill();
    topk::write(in, options, 0, best_, slot.next.outputs());
    follow_parents(slot, history);
  }

  int64_t first_row(int64_t s) const {
    const auto is_before = [](const LiveBeam& row, int64_t s) { return row.slot < s; };
    return std::lower_bound(rows_.begin(), rows_.end(), s, is_before) - rows_.begin();
  }

  topk::Options options_of(const SearchSlot<T>& slot) const {
    const auto limit = [&](const at::Tensor& x) { return x.const_data_ptr<int64_t>() + slot.b; };
    return {arguments_.eos,
            arguments_.min_lengths ? limit(*arguments_.min_lengths) : nullptr,
            limit(arguments_.max_lengths),
            arguments_.length_penalty,
            arguments_.eos_threshold,
            arguments_.coverage_weight != 0.0f ? slot.coverage.data() : nullptr,
            arguments_.ngram_table ? arguments_.ngram_table->const_data_ptr<float>() : nullptr,
            slot.beams.ngram_states.data(),
            arguments_.ngram_table ? arguments_.ngram_table->size(0) : 0,
            arguments_.ngram_weight,
            arguments_.ctc_log_probs ? slot.prefixes.next_log_probs.data() : nullptr,
            arguments_.ctc_weight};
  }

  // Reorder the rest of the beams' state by their parents. Free the slot if all beams have ended.
  void follow_parents(SearchSlot<T>& slot, StepHistory& history) {
    const std::vector<int64_t>& parents = slot.next.parents;
    history.add(slot.next, slot.attended_frames);
    const std::vector<int64_t> state_rows = slot.state_rows;
    for (int64_t k = 0; k < arguments_.K; ++k) slot.state_rows[k] = state_rows[parents[k]];
    if (arguments_.coverage_weight != 0.0f) move_attention(slot, parents);
    if (arguments_.ctc_log_probs) slot.prefixes.follow_parents(slot.beams, slot.next, arguments_.eos);
    std::swap(slot.beams, slot.next);
    bool live = false;
    for (int64_t k = 0; k < arguments_.K; ++k) live |= slot.beams.live(k);
    if (!live) slot.b = -1;
  }

  void move_attention(SearchSlot<T>& slot, const std::vector<int64_t>& parents) {
    const int64_t n = slot.frames;
    const std::vector<float> attention_sums = slot.attention_sums, coverage = slot.coverage;
    for (int64_t k = 0; k < arguments_.K; ++k) {
      std::copy_n(attention_sums.begin() + parents[k] * n, n, slot.attention_sums.begin() + k * n);
      slot.coverage[k] = coverage[parents[k]];
    }
  }

  const PackedSpeller<T, G>& speller_;
  const SearchArguments& arguments_;
  int64_t max_rows_;  // slots * K + 1; the last row is the initial state
  std::vector<SearchSlot<T>> slots_;
  States<S> before_, after_;                      // max_rows_ rows, like all buffers of rows below
  std::vector<LiveBeam> rows_;                    // the live beams of all slots
  std::vector<int64_t> parent_rows_;              // rows of the parents' states, each once
  std::vector<ZeroedBuffer<>> recurrent_;         // (rows, 4 * H_i) per cell: contribution of the parents' states
  ZeroedBuffer<T> inputs_;                        // (rows, max depth): inputs of the next matmul
  ZeroedBuffer<uint8_t> quantised_;               // (rows, max depth): inputs of the next matmul in int8
  std::vector<float> scales_;                     // (rows,): scales of quantised_
  std::vector<const float*> initial_;             // (rows,): initial sums of the next matmul
  ZeroedBuffer<> sums_;                           // (rows, max of 4 * H_i, M, V): gates, features, then logits
  ZeroedBuffer<> queries_;                        // (rows, D)
  ZeroedBuffer<> weights_, contexts_;             // (K, T) and (K, E), of one utterance
  std::vector<float> logits_, block_maxima_;      // (K, V) and (K, blocks), of one utterance
  std::vector<topk::RowSummary> summaries_;       // (K,)
  topk::BestCandidates best_;
  std::vector<int64_t> parent_index_;             // (max_rows_,): index in parent_rows_ of each row, or -1
  std::vector<AlignedArray<float>> token_gates_;  // (4 * H) per token: its contribution to the gates, once computed
};

}  // namespace las::search
