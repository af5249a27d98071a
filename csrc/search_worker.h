// One thread of the beam search; speller_search.cpp explains how the threads share the utterances.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "beam_topk.h"
#include "packing.h"
#include "search_state.h"
#include "search_step.h"
#include "vector.h"

namespace las::search {

template <class T, class G>
class SearchWorker {
 public:
  SearchWorker(const PackedSpeller<T, G>& speller, const SearchArguments& arguments, int64_t slots)
      : speller_(speller), arguments_(arguments), live_(slots * arguments.K + 1), step_(speller, arguments, live_),
        logits_(arguments.K * speller.V), block_maxima_(arguments.K * topk::block_count(speller.V)),
        summaries_(arguments.K), best_(arguments.K) {
    for (int64_t i = 0; i < slots; ++i) slots_.emplace_back(arguments.K);
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
      live_.list(slots_, arguments_.K);
      if (live_.rows.empty()) return;
      step_.run(slots_);
      for (size_t i = 0; i < slots_.size(); ++i)
        if (slots_[i].b >= 0) take_best(int64_t(i), histories[slots_[i].b]);
    }
  }

 private:
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
    std::fill_n(slot.state_rows.begin(), K, live_.initial_state());
    if (arguments_.coverage_weight != 0.0f) slot.attention_sums.assign(K * n, 0.0f);
    if (arguments_.ctc_log_probs) slot.prefixes.start(arguments_, b, speller_.V);
    if (arguments_.ngram_rows) slot.ngram_scores.start(arguments_.ngram_model(speller_.V), K, arguments_.ngram_start);
  }

  // Replace the beams of slot s by their best continuations, and add the step to `history`.
  void take_best(int64_t s, StepHistory& history) {
    SearchSlot<T>& slot = slots_[s];
    const int64_t K = arguments_.K, V = speller_.V, blocks = topk::block_count(V);
    for (int64_t i = first_row(s); i < live_.count() && live_.rows[i].slot == s; ++i) {
      const int64_t k = live_.rows[i].beam;
      std::copy_n(step_.logits(i), V, logits_.data() + k * V);
      summaries_[k] = topk::summarise(logits_.data() + k * V, V, block_maxima_.data() + k * blocks);
      slot.state_rows[k] = i;
    }
    const UtteranceBeams& beams = slot.beams;
    const topk::Inputs in{logits_.data(),       beams.scores.data(), beams.ended.get(),
                          beams.lengths.data(), K, V, blocks};
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
    return std::lower_bound(live_.rows.begin(), live_.rows.end(), s, is_before) - live_.rows.begin();
  }

  topk::Options options_of(const SearchSlot<T>& slot) const {
    const auto limit = [&](const at::Tensor& x) { return x.const_data_ptr<int64_t>() + slot.b; };
    return {arguments_.eos,
            arguments_.minimum ? limit(*arguments_.minimum) : nullptr,
            limit(arguments_.maximum),
            arguments_.length_penalty,
            arguments_.eos_threshold,
            arguments_.coverage_weight != 0.0f ? slot.coverage.data() : nullptr,
            arguments_.ngram_rows ? slot.ngram_scores.log_probs.data() : nullptr,
            arguments_.ngram_weight,
            arguments_.ctc_log_probs ? slot.prefixes.next_log_probs.data() : nullptr,
            arguments_.ctc_weight,
            arguments_.beam_threshold};
  }

  // Reorder the rest of the beams' state by their parents. Free the slot if no beam is live.
  void follow_parents(SearchSlot<T>& slot, StepHistory& history) {
    const std::vector<int64_t>& parents = slot.next.parents;
    history.add(slot.next, slot.attended_frames);
    const std::vector<int64_t> state_rows = slot.state_rows;
    for (int64_t k = 0; k < arguments_.K; ++k) slot.state_rows[k] = state_rows[parents[k]];
    if (arguments_.coverage_weight != 0.0f) move_attention(slot, parents);
    if (arguments_.ctc_log_probs) slot.prefixes.follow_parents(slot.beams, slot.next, arguments_.eos);
    if (arguments_.ngram_rows) slot.ngram_scores.follow_parents(slot.next);
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
  std::vector<SearchSlot<T>> slots_;
  LiveBeams live_;
  SearchStep<T, G> step_;
  std::vector<float> logits_, block_maxima_;  // (K, V) and (K, blocks), of one utterance
  std::vector<topk::RowSummary> summaries_;   // (K,)
  topk::BestCandidates best_;
};

}  // namespace las::search
