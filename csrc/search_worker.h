// One thread of the beam search of the speller; speller_search.cpp says how the threads share the utterances.

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

constexpr float UNSEEN = 0.01f;  // least attention that a frame counts as having got, for a finite logarithm

template <class T, class G>
class Worker {
  using S = Kept<T, G>;

 public:
  Worker(const Speller<T, G>& speller, const Job& job, int64_t slots)
      : speller_(speller), job_(job), most_(slots * job.K), before_(speller, most_ + 1), after_(speller, most_ + 1),
        best_(job.K), index_(most_ + 1), token_gates_(speller.V) {
    for (int64_t i = 0; i < slots; ++i) slots_.emplace_back(job.K);
    make_room();
  }

  // Search utterances until the queue, whose next is `queue`, is empty.
  void run(std::atomic<int64_t>& queue, std::vector<History>& found) {
    for (;;) {
      for (Slot<T>& slot : slots_)
        if (slot.b < 0) {
          const int64_t b = queue++;
          if (b >= job_.B) break;
          begin(slot, b);
        }
      list();
      if (rows_.empty()) return;
      meet();
      recur();
      for (int64_t i = 0; i < speller_.cells(); ++i) advance(i);
      attend();
      spell();
      for (size_t i = 0; i < slots_.size(); ++i)
        if (slots_[i].b >= 0) prune(int64_t(i), found[slots_[i].b]);
      std::swap(before_, after_);
    }
  }

 private:
  int64_t silence() const { return most_; }  // row of the state before the first token: always zeros

  void make_room() {
    int64_t widest = speller_.E + speller_.H, gates = 0;
    for (int64_t i = 0; i < speller_.cells(); ++i) {
      widest = std::max(widest, speller_.size(i) + speller_.E);
      gates = std::max(gates, 4 * speller_.size(i));
      recurrent_.emplace_back(most_ + 1, 4 * speller_.size(i));
    }
    widest = std::max({widest, speller_.D, speller_.E, job_.T, speller_.M});
    operand_ = Zeros<T>(most_ + 1, widest);
    if constexpr (std::is_same_v<G, int8_t>) numbers_ = Zeros<uint8_t>(most_ + 1, widest);
    scales_.resize(most_ + 1);
    sums_ = Zeros<>(most_ + 1, std::max({gates, speller_.M, speller_.V}));
    queries_ = Zeros<>(most_ + 1, speller_.D);
    weights_ = Zeros<>(job_.K, job_.T);
    contexts_ = Zeros<>(job_.K, speller_.E);
    logits_.resize(job_.K * speller_.V);
    summaries_.resize(job_.K);
    block_maxima_.resize(job_.K * blocks());
    starts_.resize(most_ + 1);
  }

  int64_t blocks() const { return (speller_.V + topk::BLOCK - 1) / topk::BLOCK; }

  void begin(Slot<T>& slot, int64_t b) {
    const int64_t n = job_.frames(b), K = job_.K, D = speller_.D, E = speller_.E;
    slot.b = b;
    slot.frames = n;
    slot.keys = las::pack<T>(job_.keys.const_data_ptr<float>() + b * job_.T * D, D, 1, n, D, slot.key_memory);
    slot.values = las::pack<T>(job_.values.const_data_ptr<float>() + b * job_.T * E, 1, E, E, n, slot.value_memory);
    Beams& beams = slot.beams;
    std::fill_n(beams.scores.begin(), K, -las::INFINITE);  // only one beam exists so far
    beams.scores[0] = 0.0f;
    std::fill_n(beams.tokens.begin(), K, job_.sos);
    std::fill_n(beams.lengths.begin(), K, 0);
    std::fill_n(beams.ended.get(), K, false);
    std::fill_n(beams.ngram_states.begin(), K, job_.table ? first_ngram_state() : 0);
    std::fill_n(slot.rows.begin(), K, silence());
    if (job_.coverage_weight != 0.0f) slot.attention.assign(K * n, 0.0f);
    if (job_.frames_of_ctc) slot.prefixes.begin(job_, b, speller_.V);
  }

  // <sos> all through, as digits to the base V.
  int64_t first_ngram_state() const {
    const int64_t states = job_.table->size(0);
    return speller_.V > 1 ? job_.sos * (states - 1) / (speller_.V - 1) : 0;
  }

  // List the living beams and the states that they continue.
  void list() {
    rows_.clear();
    sources_.clear();
    std::fill(index_.begin(), index_.end(), -1);
    for (size_t s = 0; s < slots_.size(); ++s) {
      const Slot<T>& slot = slots_[s];
      for (int64_t k = 0; slot.b >= 0 && k < job_.K; ++k) {
        if (!slot.beams.living(k)) continue;
        const int64_t before = slot.rows[k];
        if (index_[before] < 0) {
          index_[before] = int64_t(sources_.size());
          sources_.push_back(before);
        }
        rows_.push_back({int64_t(s), k, slot.beams.tokens[k], before, index_[before]});
      }
    }
  }

  int64_t count() const { return int64_t(rows_.size()); }

  // The first `n` values of rows from(i) as operands of the next product.
  template <class From>
  Matrix<const T> operand(int64_t count, int64_t depth, int64_t n, From from) {
    for (int64_t i = 0; i < count; ++i) {
      T* to = operand_.at(i);
      convert(from(i), n, to);
      std::fill(to + n, to + depth, T(0.0f));
    }
    return operand_.rows(count);
  }

  // The same as whole numbers.
  template <class From>
  las::Int8Rows numbers(int64_t count, int64_t depth, int64_t n, From from) {
    las::widest([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) scales_[i] = las::quantise<width>(from(i), n, depth, numbers_.at(i));
    });
    return {numbers_.at(0), numbers_.stride, count, scales_.data()};
  }

  // What the first `n` values of rows from(i) add to gates.
  template <class From>
  void gates(const Layer<G>& layer, int64_t count, int64_t n, From from, las::Starts starts, const Matrix<float>& out) {
    const int64_t depth = layer.weights.depth;
    if constexpr (std::is_same_v<G, int8_t>)
      las::product(numbers(count, depth, n, from), layer.weights, starts, out);
    else
      las::product(operand(count, depth, n, from), layer.weights, starts, out);
  }

  las::Starts same(const std::vector<float>& bias, int64_t count) {
    std::fill_n(starts_.begin(), count, bias.data());
    return starts_.data();
  }

  // Compute what tokens that have not been met yet add to the gates of the first cell.
  void meet() {
    std::vector<int64_t> fresh;
    for (const Living& row : rows_) {
      las::Memory<float>& gates = token_gates_[row.token];
      if (gates.data()) continue;
      gates = las::Memory<float>(4 * speller_.H);
      fresh.push_back(row.token);
    }
    const int64_t n = int64_t(fresh.size());
    const Layer<T>& layer = speller_.token;
    const auto embedded = [&](int64_t i) { return speller_.embedding + fresh[i] * speller_.M; };
    las::product(operand(n, layer.weights.depth, speller_.M, embedded), layer.weights, same(layer.bias, n),
                 sums_.rows(n));
    for (int64_t i = 0; i < n; ++i) std::copy_n(sums_.at(i), 4 * speller_.H, token_gates_[fresh[i]].data());
  }

  // What the gates gain from the states before, once for each state.
  void recur() {
    const int64_t n = int64_t(sources_.size());
    const auto first = [&](int64_t i) { return before_.first.at(sources_[i]); };
    gates(speller_.first, n, speller_.E + speller_.H, first, nullptr, recurrent_[0].rows(n));
    for (int64_t c = 1; c < speller_.cells(); ++c) {
      const Layer<G>& layer = speller_.later[c - 1].recurrent;
      const auto hidden = [&](int64_t i) { return before_.hidden[c].at(sources_[i]); };
      gates(layer, n, speller_.size(c), hidden, same(layer.bias, n), recurrent_[c].rows(n));
    }
  }

  S* hidden(int64_t cell, int64_t row) {
    return cell == 0 ? after_.first.at(row) + speller_.E : after_.hidden[cell].at(row);
  }

  // The `n` new hidden values of all rows as operands, as they lie if they can: a 0 follows them in their buffers.
  Matrix<const T> state(int64_t cell, int64_t depth, int64_t n) {
    if constexpr (std::is_same_v<S, T>)
      return {hidden(cell, 0), (cell == 0 ? after_.first : after_.hidden[cell]).stride, count()};
    else
      return operand(count(), depth, n, [&](int64_t i) { return hidden(cell, i); });
  }

  // Take cell c to its next state.
  void advance(int64_t c) {
    const int64_t size = speller_.size(c);
    if (c > 0) input(c, speller_.later[c - 1].input);
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < count(); ++i) {
        const float* gates = c == 0 ? recurrent_[0].at(rows_[i].source) : sums_.at(i);
        const float* token = c == 0 ? token_gates_[rows_[i].token].data() : nullptr;
        const auto gate = [&](int64_t g, int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> sum = get<W>(gates + g * size + j, lanes, 0.0f);
          return token ? sum + get<W>(token + g * size + j, lanes, 0.0f) : sum;
        };
        las::lstm_step_unsaved<W>(size, before_.cell[c].at(rows_[i].before), after_.cell[c].at(i), hidden(c, i), gate);
      }
    });
  }

  // Add to the gates of cell c what the new values of the cell below say.
  void input(int64_t c, const Layer<G>& layer) {
    const int64_t n = speller_.size(c - 1);
    for (int64_t i = 0; i < count(); ++i) starts_[i] = recurrent_[c].at(rows_[i].source);
    const las::Starts starts = starts_.data();
    if constexpr (std::is_same_v<G, int8_t>)
      gates(layer, count(), n, [&](int64_t i) { return hidden(c - 1, i); }, starts, sums_.rows(count()));
    else
      las::product(state(c - 1, layer.weights.depth, n), layer.weights, starts, sums_.rows(count()));
  }

  void attend() {
    const int64_t last = speller_.cells() - 1;
    const Layer<T>& query = speller_.query;
    las::product(state(last, query.weights.depth, speller_.size(last)), query.weights, same(query.bias, count()),
                 queries_.rows(count()));
    for (int64_t i = 0; i < count();) {
      int64_t end = i;
      while (end < count() && rows_[end].slot == rows_[i].slot) ++end;
      attend(slots_[rows_[i].slot], i, end - i);
      i = end;
    }
  }

  // Rows first to first + n, which are those of one utterance.
  void attend(Slot<T>& slot, int64_t first, int64_t n) {
    const auto query = [&](int64_t i) { return queries_.at(first + i); };
    las::product(operand(n, slot.keys.depth, speller_.D, query), slot.keys, nullptr, weights_.rows(n));
    std::fill(slot.peaks.begin(), slot.peaks.end(), 0);
    las::widest([&](auto width) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i)
        slot.peaks[rows_[first + i].beam] = las::softmax<width>(weights_.at(i), slot.frames).peak;
    });
    if (job_.coverage_weight != 0.0f) cover(slot, first, n);
    const auto weights = [&](int64_t i) { return weights_.at(i); };
    las::product(operand(n, slot.values.depth, slot.frames, weights), slot.values, nullptr, contexts_.rows(n));
    for (int64_t i = 0; i < n; ++i) convert(contexts_.at(i), speller_.E, after_.first.at(first + i));
  }

  void cover(Slot<T>& slot, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      float* got = slot.attention.data() + rows_[first + i].beam * slot.frames;
      double sum = 0.0;
      for (int64_t t = 0; t < slot.frames; ++t) {
        got[t] += weights_.at(i)[t];
        sum += std::log(std::clamp(got[t], UNSEEN, 1.0f));
      }
      slot.coverage[rows_[first + i].beam] = job_.coverage_weight * float(sum / std::max<int64_t>(1, slot.frames));
    }
  }

  // The logits of every row, in sums_.
  void spell() {
    const int64_t last = speller_.cells() - 1, n = count();
    const Layer<T>& project = speller_.project;
    const int64_t H = speller_.size(last), E = speller_.E;
    for (int64_t i = 0; i < n; ++i) {
      T* to = operand_.at(i);
      convert(hidden(last, i), H, to);
      convert(after_.first.at(i), E, to + H);
      std::fill(to + H + E, to + project.weights.depth, T(0.0f));
    }
    las::product(Matrix<const T>(operand_.rows(n)), project.weights, same(project.bias, n), sums_.rows(n));
    bend();
    const Layer<T>& output = speller_.output;
    const auto features = [&](int64_t i) { return sums_.at(i); };
    const Matrix<const T> rows = operand(n, output.weights.depth, speller_.M, features);
    las::product(rows, output.weights, same(output.bias, n), sums_.rows(n));
  }

  void bend() {
    las::widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < count(); ++i)
        las::each_vector<W>(speller_.M, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          put<W>(sums_.at(i) + j, las::gelu<W>(get<W>(sums_.at(i) + j, lanes, 0.0f)), lanes);
        });
    });
  }

  // Replace the beams of an utterance by the best continuations; keep the step in `history`.
  void prune(int64_t s, History& history) {
    Slot<T>& slot = slots_[s];
    const int64_t K = job_.K, V = speller_.V;
    for (int64_t i = first_row(s); i < count() && rows_[i].slot == s; ++i) {
      const int64_t k = rows_[i].beam;
      std::copy_n(sums_.at(i), V, logits_.data() + k * V);
      summaries_[k] = topk::summarise(logits_.data() + k * V, V, block_maxima_.data() + k * blocks());
      slot.rows[k] = i;
    }
    const Beams& beams = slot.beams;
    const topk::Inputs in{logits_.data(),       beams.scores.data(), beams.ended.get(),
                          beams.lengths.data(), 1, K, V, blocks()};
    const topk::Options options = options_of(slot);
    best_.clear();
    for (int64_t k = 0; k < K; ++k)
      topk::offer_beam(in, options, summaries_.data(), block_maxima_.data(), 0, k, best_);
    best_.fill();
    topk::write(in, options, 0, best_, slot.next.outputs());
    follow(slot, history);
  }

  int64_t first_row(int64_t s) const {
    const auto before = [](const Living& row, int64_t s) { return row.slot < s; };
    return std::lower_bound(rows_.begin(), rows_.end(), s, before) - rows_.begin();
  }

  topk::Options options_of(const Slot<T>& slot) const {
    const auto limit = [&](const at::Tensor& x) { return x.const_data_ptr<int64_t>() + slot.b; };
    return {job_.eos,
            job_.minimum ? limit(*job_.minimum) : nullptr,
            limit(job_.maximum),
            job_.length_penalty,
            job_.eos_threshold,
            job_.coverage_weight != 0.0f ? slot.coverage.data() : nullptr,
            job_.table ? job_.table->const_data_ptr<float>() : nullptr,
            slot.beams.ngram_states.data(),
            job_.table ? job_.table->size(0) : 0,
            job_.ngram_weight,
            job_.frames_of_ctc ? slot.prefixes.gains.data() : nullptr,
            job_.ctc_weight};
  }

  // Let everything else of the beams follow their parents, and give the slot free if all have ended.
  void follow(Slot<T>& slot, History& history) {
    const std::vector<int64_t>& parents = slot.next.parents;
    history.add(slot.next, slot.peaks);
    const std::vector<int64_t> rows = slot.rows;
    for (int64_t k = 0; k < job_.K; ++k) slot.rows[k] = rows[parents[k]];
    if (job_.coverage_weight != 0.0f) move_attention(slot, parents);
    if (job_.frames_of_ctc) slot.prefixes.follow(slot.beams, slot.next, job_.eos);
    std::swap(slot.beams, slot.next);
    bool living = false;
    for (int64_t k = 0; k < job_.K; ++k) living |= slot.beams.living(k);
    if (!living) slot.b = -1;
  }

  void move_attention(Slot<T>& slot, const std::vector<int64_t>& parents) {
    const int64_t n = slot.frames;
    const std::vector<float> attention = slot.attention, coverage = slot.coverage;
    for (int64_t k = 0; k < job_.K; ++k) {
      std::copy_n(attention.begin() + parents[k] * n, n, slot.attention.begin() + k * n);
      slot.coverage[k] = coverage[parents[k]];
    }
  }

  const Speller<T, G>& speller_;
  const Job& job_;
  int64_t most_;  // living beams
  std::vector<Slot<T>> slots_;
  States<S> before_, after_;
  std::vector<Living> rows_;
  std::vector<int64_t> sources_;  // rows of the states that are continued
  Zeros<T> operand_;
  Zeros<uint8_t> numbers_;    // rows of products in whole numbers
  std::vector<float> scales_;  // of them
  std::vector<Zeros<>> recurrent_;
  Zeros<> sums_, queries_, weights_, contexts_;
  std::vector<const float*> starts_;
  std::vector<float> logits_, block_maxima_;
  std::vector<topk::Row> summaries_;
  topk::Best best_;
  std::vector<int64_t> index_;  // of each row before among sources_, or -1
  std::vector<las::Memory<float>> token_gates_;  // (4 * H) of each token met so far
};

}  // namespace las::search
