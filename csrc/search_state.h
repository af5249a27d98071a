// What the beam search of the speller reads and what it keeps of each utterance between two steps.

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
#include "speller.h"
#include "vector.h"

namespace las::search {

// ------------------------------------------------------------------------------------------------------- what is read

template <class G>
struct LaterCell {
  int64_t size;
  Layer<G> input, recurrent;  // the bias is in `recurrent`
};

// Weights of the gates are of type G, all others and the memory of the utterances of type T.
template <class T, class G>
struct Speller {
  int64_t V, M, D, E, H;  // M of the embedding, H of the first cell
  const float* embedding;
  Layer<T> token;  // from the embedding to the gates of the first cell
  Layer<G> first;  // from [context, hidden]
  std::vector<LaterCell<G>> later;
  Layer<T> query, project, output;

  int64_t cells() const { return 1 + int64_t(later.size()); }
  int64_t size(int64_t cell) const { return cell == 0 ? H : later[cell - 1].size; }
};

struct Job {
  at::Tensor keys, values, lengths;
  std::optional<at::Tensor> minimum, table, frames_of_ctc;
  at::Tensor maximum;
  int64_t B, T, K, sos, eos;
  float length_penalty, eos_threshold, coverage_weight, ngram_weight, ctc_weight;

  int64_t frames(int64_t b) const { return std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[b], 0, T); }
};

// ------------------------------------------------------------------------------------------------------- what is kept

// All beams of one utterance.
struct Beams {
  explicit Beams(int64_t K) : scores(K), tokens(K), parents(K), lengths(K), ngram_states(K), ended(new bool[K]) {}

  topk::Outputs outputs() {
    return {scores.data(), tokens.data(), parents.data(), ended.get(), lengths.data(), ngram_states.data()};
  }
  bool living(int64_t k) const { return !ended[k] && scores[k] > -las::INFINITE; }

  std::vector<float> scores;
  std::vector<int64_t> tokens, parents, lengths, ngram_states;
  std::unique_ptr<bool[]> ended;
};

// All steps of one utterance, K values each.
struct History {
  void add(const Beams& beams, const std::vector<int64_t>& peaks) {
    tokens.insert(tokens.end(), beams.tokens.begin(), beams.tokens.end());
    parents.insert(parents.end(), beams.parents.begin(), beams.parents.end());
    scores.insert(scores.end(), beams.scores.begin(), beams.scores.end());
    frames.insert(frames.end(), peaks.begin(), peaks.end());
  }

  std::vector<int64_t> tokens, parents, frames;
  std::vector<float> scores;
};

// What hidden states and contexts are kept as: as products take them, where those do not need more of them.
template <class T, class G>
using Kept = std::conditional_t<std::is_same_v<G, int8_t>, float, T>;

// The states of all rows between two steps.
template <class S>
struct States {
  template <class T, class G>
  States(const Speller<T, G>& speller, int64_t rows) : first(rows, speller.E + speller.H + 1) {  // 1: what follows is 0
    for (int64_t i = 0; i < speller.cells(); ++i) {
      cell.emplace_back(rows, speller.size(i));
      hidden.emplace_back(i == 0 ? 0 : rows, speller.size(i) + 1);
    }
  }

  Zeros<S> first;  // the context, and the hidden state of the first cell
  std::vector<Zeros<S>> hidden;
  std::vector<Zeros<>> cell;
};

// One living beam.
struct Living {
  int64_t slot, beam, token;
  int64_t before;  // row of the state that it continues
  int64_t source;  // that state's index among those that are continued
};

// What CTC says of the beams of one utterance.
struct Prefixes {
  void begin(const Job& job, int64_t b, int64_t V) {
    const int64_t T = job.frames_of_ctc->size(1), K = job.K;
    heard = std::make_unique<ctc::Frames>(job.frames_of_ctc->const_data_ptr<float>() + b * T * V, T, V);
    alphas.resize(K * stride());
    next_alphas.resize(K * stride());
    gains.resize(K * V);
    next_gains.resize(K * V);
    prefixes.assign(K, 0.0f);
    scorer.start(*heard, {nullptr, alphas.data(), job.sos, job.sos, 0.0f, gains.data()}, job.eos);
  }

  int64_t stride() const { return heard->T + 1; }

  // Let the living beams of `after` continue those of `before`.
  void follow(const Beams& before, const Beams& after, int64_t eos) {
    const std::vector<float> old = prefixes;
    living.clear();
    for (int64_t k = 0; k < int64_t(old.size()); ++k) {
      if (!after.living(k)) continue;
      const int64_t parent = after.parents[k], token = after.tokens[k], V = heard->V;
      prefixes[k] = old[parent] + gains[parent * V + token];
      living.push_back({alphas.data() + parent * stride(), next_alphas.data() + k * stride(), before.tokens[parent],
                        token, prefixes[k], next_gains.data() + k * V});
    }
    scorer.advance(*heard, living, eos);
    std::swap(alphas, next_alphas);
    std::swap(gains, next_gains);
  }

  std::unique_ptr<ctc::Frames> heard;
  std::vector<float> alphas, next_alphas, gains, next_gains, prefixes;  // (K, T' + 1), (K, V) and (K,)
  std::vector<ctc::Hypothesis> living;
  ctc::Scorer scorer;
};

// An utterance that is being searched.
template <class T>
struct Slot {
  explicit Slot(int64_t K) : beams(K), next(K), rows(K), peaks(K), coverage(K) {}

  int64_t b = -1;  // -1: none
  int64_t frames = 0;
  las::Memory<T> key_memory, value_memory;
  Panels<T> keys, values;
  Beams beams, next;
  std::vector<int64_t> rows;  // of the state that each beam continues
  std::vector<int64_t> peaks;
  std::vector<float> coverage, attention;  // attention (K, frames): got by each frame from all tokens
  Prefixes prefixes;
};

}  // namespace las::search
