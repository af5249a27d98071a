// The inputs of the speller's beam search, and the state of its utterances between two steps.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "beam_topk.h"
#include "ctc_prefix.h"
#include "matmul.h"
#include "memory.h"
#include "ngram_scores.h"
#include "speller.h"
#include "vector.h"

namespace las::search {

// ------------------------------------------------------------------------------------------------------------- inputs

template <class G>
struct LaterCell {
  int64_t size;
  Layer<G> input, recurrent;  // `recurrent` includes the bias
};

// The packed weights: of type G for the gates, of type T for the other layers. Keys and values are packed as T, too.
template <class T, class G>
struct PackedSpeller {
  int64_t V, M, D, E, H;   // M: size of the embedding; H: size of the first cell
  const float* embedding;  // (V, M)
  Layer<T> token;          // from the embedding to the gates of the first cell: (4 * H, M), with the bias
  Layer<G> first;          // from [context, hidden state] to the gates of the first cell: (4 * H, E + H)
  std::vector<LaterCell<G>> later;
  Layer<T> query, project, output;

  int64_t cells() const { return 1 + int64_t(later.size()); }
  int64_t size(int64_t cell) const { return cell == 0 ? H : later[cell - 1].size; }
};

struct SearchArguments {
  at::Tensor keys, values, lengths;                  // (B, T, D), (B, T, E), (B,)
  std::optional<at::Tensor> minimum;                 // (B,)
  std::optional<at::Tensor> ngram_rows, ngram_arcs;  // (states, 2 * masks + 2), (arcs, 2)
  std::optional<at::Tensor> ctc_log_probs;           // (B, T', V)
  at::Tensor maximum;                                // (B,)
  int64_t B, T, K, sos, eos, ngram_order, ngram_start;
  float length_penalty, eos_threshold, coverage_weight, ngram_weight, ctc_weight, beam_threshold;

  ngram::Model ngram_model(int64_t V) const {
    return {ngram_rows->const_data_ptr<int32_t>(), ngram_arcs->const_data_ptr<int32_t>(), V, ngram_order};
  }
  int64_t valid_frames(int64_t b) const { return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, T); }
};

// ------------------------------------------------------------------------------------------------------------- states

// The beams of one utterance, (K,) each.
struct UtteranceBeams {
  explicit UtteranceBeams(int64_t K)
      : scores(K), tokens(K), parents(K), lengths(K), ended(new bool[K]) {}

  topk::Outputs outputs() {
    return {scores.data(), tokens.data(), parents.data(), ended.get(), lengths.data()};
  }
  bool live(int64_t k) const { return !ended[k] && scores[k] > -INFINITE; }

  std::vector<float> scores;
  std::vector<int64_t> tokens, parents, lengths;
  std::unique_ptr<bool[]> ended;
};

// The steps of one utterance so far, (steps, K) each.
struct StepHistory {
  void add(const UtteranceBeams& beams, const std::vector<int64_t>& attended) {
    tokens.insert(tokens.end(), beams.tokens.begin(), beams.tokens.end());
    parents.insert(parents.end(), beams.parents.begin(), beams.parents.end());
    scores.insert(scores.end(), beams.scores.begin(), beams.scores.end());
    attended_frames.insert(attended_frames.end(), attended.begin(), attended.end());
  }

  std::vector<int64_t> tokens, parents, attended_frames;
  std::vector<float> scores;
};

// The type that hidden states and contexts are stored in: the input type of the matmuls, or float32 if the gates are
// int8, which quantise their inputs at each step.
template <class T, class G>
using StateType = std::conditional_t<std::is_same_v<G, int8_t>, float, T>;

// The recurrent states and contexts of all rows after a step.
template <class S>
struct States {
  template <class T, class G>
  States(const PackedSpeller<T, G>& speller, int64_t rows)
      : first(rows, speller.E + speller.H + 1) {  // + 1 for the 0 that SearchStep::hidden_rows needs
    for (int64_t i = 0; i < speller.cells(); ++i) cell.emplace_back(rows, speller.size(i));
    for (const auto& later : speller.later) hidden.emplace_back(rows, later.size + 1);
  }

  ZeroedBuffer<S> first;                // (rows, E + H + 1): the context and the hidden state of the first cell
  std::vector<ZeroedBuffer<S>> hidden;  // (rows, H_i + 1) per later cell
  std::vector<ZeroedBuffer<>> cell;     // (rows, H_i) per cell
};

// A live beam, which is one row of the matmuls.
struct LiveBeam {
  int64_t slot, beam, token;
  int64_t parent_row;    // row of its parent's state
  int64_t parent_index;  // index of parent_row in LiveBeams::parent_rows
};

// The CTC prefix scores of the beams of one utterance.
struct CtcPrefixes {
  void start(const SearchArguments& arguments, int64_t b, int64_t V) {
    const int64_t T = arguments.ctc_log_probs->size(1), K = arguments.K;
    log_probs = std::make_unique<ctc::CtcLogProbs>(arguments.ctc_log_probs->const_data_ptr<float>() + b * T * V, T, V);
    forward.resize(K * stride());
    new_forward.resize(K * stride());
    next_log_probs.resize(K * V);
    new_next_log_probs.resize(K * V);
    prefix_log_probs.assign(K, 0.0f);
    scorer.start(*log_probs, {nullptr, forward.data(), arguments.sos, arguments.sos, 0.0f, next_log_probs.data()},
                 arguments.eos);
  }

  int64_t stride() const { return log_probs->T + 1; }

  // Compute the scores of the beams `after` a step from those of the beams `before` it.
  void follow_parents(const UtteranceBeams& before, const UtteranceBeams& after, int64_t eos) {
    const std::vector<float> parent_log_probs = prefix_log_probs;
    live.clear();
    for (int64_t k = 0; k < int64_t(parent_log_probs.size()); ++k) {
      if (!after.live(k)) continue;
      const int64_t parent = after.parents[k], token = after.tokens[k], V = log_probs->V;
      prefix_log_probs[k] = parent_log_probs[parent] + next_log_probs[parent * V + token];
      live.push_back({forward.data() + parent * stride(), new_forward.data() + k * stride(), before.tokens[parent],
                      token, prefix_log_probs[k], new_next_log_probs.data() + k * V});
    }
    scorer.advance(*log_probs, live, eos);
    std::swap(forward, new_forward);
    std::swap(next_log_probs, new_next_log_probs);
  }

  std::unique_ptr<ctc::CtcLogProbs> log_probs;            // (T', V)
  std::vector<float> forward, new_forward;                // (K, T' + 1), as in CtcHypothesis
  std::vector<float> next_log_probs, new_next_log_probs;  // (K, V), as in CtcHypothesis
  std::vector<float> prefix_log_probs;                    // (K,)
  std::vector<ctc::CtcHypothesis> live;
  ctc::Scorer scorer;
};

// The scores of the n-gram model for the beams of one utterance.
struct NgramScores {
  void start(const ngram::Model& ngram_model, int64_t K, int64_t state) {
    model = ngram_model;
    states.assign(K, state);
    log_probs.resize(K * model.V);
    scorer.score(model, state, log_probs.data());  // only one beam exists before the first step
  }

  void follow_parents(const UtteranceBeams& after) {
    const std::vector<int64_t> before = states;
    for (int64_t k = 0; k < int64_t(before.size()); ++k) {
      if (!after.live(k)) continue;
      states[k] = ngram::follow(model, before[after.parents[k]], after.tokens[k]);
      scorer.score(model, states[k], log_probs.data() + k * model.V);
    }
  }

  ngram::Model model;
  std::vector<int64_t> states;   // (K,)
  std::vector<float> log_probs;  // (K, V)
  ngram::Scorer scorer;
};

// One utterance in the search. When it has ended, the slot takes the next one.
template <class T>
struct SearchSlot {
  explicit SearchSlot(int64_t K) : beams(K), next(K), state_rows(K), attended_frames(K), coverage(K) {}

  int64_t b = -1;      // index of the utterance; -1 if the slot is free
  int64_t frames = 0;  // its valid frames
  AlignedArray<T> key_memory, value_memory;
  Panels<T> keys, values;  // (frames, D) and (E, frames)
  UtteranceBeams beams, next;
  std::vector<int64_t> state_rows;       // (K,): row of the state that each beam continues
  std::vector<int64_t> attended_frames;  // (K,)
  std::vector<float> coverage;           // (K,)
  std::vector<float> attention_sums;     // (K, frames): attention weights, summed over the tokens so far
  CtcPrefixes prefixes;
  NgramScores ngram_scores;
};

// The live beams of all slots, and the rows of their parents' states without duplicates.
struct LiveBeams {
  explicit LiveBeams(int64_t max_rows) : max_rows(max_rows), parent_index(max_rows) {}

  template <class T>
  void list(const std::vector<SearchSlot<T>>& slots, int64_t K) {
    rows.clear();
    parent_rows.clear();
    std::fill(parent_index.begin(), parent_index.end(), -1);
    for (size_t s = 0; s < slots.size(); ++s) {
      const SearchSlot<T>& slot = slots[s];
      for (int64_t k = 0; slot.b >= 0 && k < K; ++k) {
        if (!slot.beams.live(k)) continue;
        const int64_t parent_row = slot.state_rows[k];
        if (parent_index[parent_row] < 0) {
          parent_index[parent_row] = int64_t(parent_rows.size());
          parent_rows.push_back(parent_row);
        }
        rows.push_back({int64_t(s), k, slot.beams.tokens[k], parent_row, parent_index[parent_row]});
      }
    }
  }

  int64_t count() const { return int64_t(rows.size()); }
  int64_t initial_state() const { return max_rows - 1; }  // row of the state before the first token, which is zeros

  int64_t max_rows;  // state rows: live beams at most, and the initial state
  std::vector<LiveBeam> rows;
  std::vector<int64_t> parent_rows;
  std::vector<int64_t> parent_index;  // (max_rows,): index in parent_rows of each row, or -1
};

}  // namespace las::search
