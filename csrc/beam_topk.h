// One step of beam search: the best continuations of the beams, for beam_topk.cpp and speller_search.cpp.
//
// First each row of logits is summarised: its maximum, its log-sum-exp and the maximum of each block of tokens. Then
// each utterance takes its best candidates. Without an n-gram model and CTC, ranks grow with logits, so a block is
// skipped if its maximum is not good enough. With thousands of tokens nearly all blocks are skipped, and the result is
// still exact.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "vector.h"

namespace las::topk {

constexpr int64_t BLOCK = 64;  // tokens per block

inline int64_t block_count(int64_t V) { return padded(V, BLOCK) / BLOCK; }

// The maximum of a row of logits and the log of the sum of exp(logit - maximum). If the row holds NaN or +inf, or only
// -inf, log_sum is NaN, and so are the ranks of all its candidates: BestCandidates accepts none of them.
struct RowSummary {
  float maximum, log_sum;

  float log_probability(float logit) const { return (logit - maximum) - log_sum; }
};

// W logits from v on, in any order; -inf past the end of the row.
template <int W>
LAS_INLINE Float<W> load_logits(const float* row, int64_t v, int64_t V) {
  if (v + W <= V) return load<W>(row + v);
  if (V < W) return load_partial<W>(row, V, -INFINITE);
  // Load the last W logits of the row, and replace those before v by -inf.
  return lane_numbers<W>() < int32_t(v + W - V) ? broadcast<W>(-INFINITE) : load<W>(row + V - W);
}

template <int W>
LAS_INLINE float block_maximum(const float* row, int64_t begin, int64_t V) {
  Float<W> maxima = broadcast<W>(-INFINITE);
  for (int64_t v = begin; v < std::min(begin + BLOCK, V); v += W)
    maxima = max<W>(maxima, load_logits<W>(row, v, V));
  return largest<W>(maxima);
}

template <int W>
LAS_INLINE float block_sum(const float* row, int64_t begin, int64_t V, float maximum) {
  Float<W> sums = {};
  for (int64_t v = begin; v < std::min(begin + BLOCK, V); v += W)
    sums += las::exp<W>(load_logits<W>(row, v, V) - maximum);
  return las::sum<W>(sums);
}

// Summarise a row of V logits, and write the maximum of each block.
inline RowSummary summarise(const float* logits, int64_t V, float* block_maxima) {
  RowSummary row{-INFINITE, {}};
  dispatch_width([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t v = 0; v < V; v += BLOCK) {
      const float maximum = block_maximum<W>(logits, v, V);
      block_maxima[v / BLOCK] = maximum;
      row.maximum = maximum > row.maximum ? maximum : row.maximum;
    }
    double total = 0.0;
    for (int64_t v = 0; v < V; v += BLOCK) total += block_sum<W>(logits, v, V, row.maximum);
    row.log_sum = std::log(float(total));
  });
  return row;
}

struct Candidate {
  float rank, score;
  int64_t index;  // k * V + v
};

// The best candidates so far, best first. Among equal ranks the lower index comes first.
class BestCandidates {
 public:
  explicit BestCandidates(int64_t size) : candidates_(size), size_(size) {}

  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  const Candidate& operator[](int64_t i) const { return candidates_[i]; }

  // Whether a candidate of this rank is good enough, if its index is above all others so far. NaN never is.
  bool accepts(float rank) const { return count_ < size_ ? rank > -INFINITE : rank > candidates_[size_ - 1].rank; }

  void offer(const Candidate& candidate) {
    if (!accepts(candidate.rank)) return;
    int64_t i = count_ < size_ ? count_++ : size_ - 1;
    for (; i > 0 && candidate.rank > candidates_[i - 1].rank; --i) candidates_[i] = candidates_[i - 1];
    candidates_[i] = candidate;
  }

  // If there are too few, add candidates of rank -inf: the lowest indices that are not among them.
  void fill() {
    const int64_t accepted = count_;
    for (int64_t index = 0; count_ < size_; ++index) {
      const auto same = [&](const Candidate& x) { return x.index == index; };
      if (std::none_of(candidates_.begin(), candidates_.begin() + accepted, same))
        candidates_[count_++] = {-INFINITE, -INFINITE, index};
    }
  }

 private:
  std::vector<Candidate> candidates_;
  int64_t size_, count_ = 0;
};

struct Options {
  int64_t eos;
  const int64_t *minimum, *maximum;  // (B,) or null
  double length_penalty;
  float eos_threshold;
  const float *coverage, *ngram_log_probs;  // (B, K) and (B, K, V), or null
  float ngram_weight;
  const float* ctc_next_log_probs;  // (B, K, V), or null
  float ctc_weight, beam_threshold;
};

struct Inputs {
  const float *logits, *scores;  // (B, K, V), (B, K)
  const bool* finished;          // (B, K)
  const int64_t* lengths;        // (B, K)
  int64_t K, V, blocks;
};

// The values that rank the candidates of one beam.
struct BeamRanking {
  const float* logits;        // (V,)
  const float* block_maxima;  // (blocks,)
  RowSummary row;
  float score, factor, coverage;  // rank = score of the candidate * factor + coverage
  const float* ngram;  // (V,): log-probabilities of the n-gram model, or null
  float ngram_weight;
  const float* ctc_next_log_probs;  // (V,), or null
  float ctc_weight;

  // The contribution of token v to the score.
  float step(int64_t v) const {
    float model = row.log_probability(logits[v]);
    if (ctc_next_log_probs && model != -INFINITE)
      model = (1.0f - ctc_weight) * model + ctc_weight * ctc_next_log_probs[v];
    return ngram ? model + ngram_weight * ngram[v] : model;
  }
  float rank(float new_score) const { return new_score * factor + coverage; }
  Candidate candidate(float step, int64_t index) const { return {rank(score + step), score + step, index}; }
};

// Whether eos is too improbable compared with the best other token.
inline bool below_threshold(const BeamRanking& beam, const Inputs& in, int64_t eos, float threshold) {
  float other = -INFINITE;
  for (int64_t block = 0; block < in.blocks; ++block) {
    if (block != eos / BLOCK) {
      other = std::max(other, beam.block_maxima[block]);
      continue;
    }
    for (int64_t v = block * BLOCK; v < std::min(in.V, (block + 1) * BLOCK); ++v)
      if (v != eos) other = std::max(other, beam.logits[v]);
  }
  return beam.row.log_probability(beam.logits[eos]) <= threshold * beam.row.log_probability(other);
}

// Offer the candidates of a beam, except the token `excluded`; `first` is the index of the first candidate.
inline void offer_all(const BeamRanking& beam, int64_t first, const Inputs& in, int64_t excluded,
                      BestCandidates& best) {
  for (int64_t block = 0; block < in.blocks; ++block) {
    const float max_score = beam.score + beam.row.log_probability(beam.block_maxima[block]);
    if (!beam.ngram && !beam.ctc_next_log_probs && !best.accepts(beam.rank(max_score))) continue;
    const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.V - begin);
    float scores[BLOCK], ranks[BLOCK];
    for (int64_t i = 0; i < n; ++i) scores[i] = beam.score + beam.step(begin + i);
    for (int64_t i = 0; i < n; ++i) ranks[i] = beam.rank(scores[i]);
    for (int64_t i = 0; i < n; ++i)
      if (begin + i != excluded) best.offer({ranks[i], scores[i], first + begin + i});
  }
}

// Offer the candidates of beam k of utterance b, in the order of their indices.
inline void offer_beam(const Inputs& in, const Options& options, const RowSummary* rows, const float* block_maxima,
                       int64_t b, int64_t k, BestCandidates& best) {
  const int64_t at = b * in.K + k, first = k * in.V, eos = options.eos;
  const bool finished = in.finished[at];
  const float tokens = float(std::max<int64_t>(1, in.lengths[at] + !finished));
  const BeamRanking beam{in.logits + at * in.V,
                         block_maxima + at * in.blocks,
                         rows[at],
                         in.scores[at],
                         options.length_penalty == 0.0 ? 1.0f : 1.0f / std::pow(tokens, float(options.length_penalty)),
                         options.coverage ? options.coverage[at] : 0.0f,
                         options.ngram_log_probs ? options.ngram_log_probs + at * in.V : nullptr,
                         options.ngram_weight,
                         options.ctc_next_log_probs ? options.ctc_next_log_probs + at * in.V : nullptr,
                         options.ctc_weight};
  if (finished) return best.offer(beam.candidate(0.0f, first + eos));
  if (beam.score == -INFINITE) return;
  if (options.maximum && in.lengths[at] >= options.maximum[b])
    return best.offer(beam.candidate(beam.step(eos), first + eos));
  const bool eos_denied =
      (options.eos_threshold != 0.0f && below_threshold(beam, in, eos, options.eos_threshold)) ||
      (options.minimum && in.lengths[at] < options.minimum[b]);
  offer_all(beam, first, in, eos_denied ? eos : -1, best);
}

// The beams after the step, (B, K) each.
struct Outputs {
  float* scores;
  int64_t *tokens, *parents;
  bool* finished;
  int64_t* lengths;
};

// Whether an unfinished beam of `tokens` tokens is too far below the best one. False if no beam exists, because -inf
// minus itself is NaN.
inline bool dropped(const Options& options, float best_rank, float rank, int64_t tokens) {
  if (options.beam_threshold == INFINITE) return false;
  return (best_rank - rank) * std::pow(float(tokens), float(options.length_penalty)) > options.beam_threshold;
}

// Write the beams of utterance b.
inline void write(const Inputs& in, const Options& options, int64_t b, const BestCandidates& best, const Outputs& out) {
  for (int64_t k = 0; k < in.K; ++k) {
    const int64_t to = b * in.K + k, parent = best[k].index / in.V, token = best[k].index % in.V;
    const int64_t from = b * in.K + parent;
    const bool ended = in.finished[from];
    out.tokens[to] = token;
    out.parents[to] = parent;
    out.finished[to] = ended || token == options.eos;
    out.lengths[to] = in.lengths[from] + !ended;
    const bool drop = !out.finished[to] && dropped(options, best[0].rank, best[k].rank, out.lengths[to]);
    out.scores[to] = drop ? -INFINITE : best[k].score;
  }
}

}  // namespace las::topk
