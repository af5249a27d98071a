// The pruning of one step of beam search, for whatever makes the logits.
//
// First every row of logits is summarised, by threads that share nothing: its maximum, the log of its sum, and the
// maximum of each block. Then each utterance takes its best candidates. A rank only grows with the logit, so a block
// whose maximum would not enter is passed over: with thousands of tokens that is nearly all of them, and it is exact.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vector.h"

namespace las::topk {

constexpr int64_t BLOCK = 64;  // tokens

// What a row of logits comes to. With NaN or +inf among them, or nothing but -inf, log_sum is NaN, and so are the ranks
// of all its candidates: Best takes none of them.
struct Row {
  float maximum, log_sum;

  float log_probability(float logit) const { return (logit - maximum) - log_sum; }
};

// The logits from v on, W of them, with -inf past the end of the row.
template <int W>
LAS_INLINE Float<W> load_logits(const float* row, int64_t v, int64_t V) {
  if (v + W <= V) return load<W>(row + v);
  if (V < W) return load_part<W>(row, V, -INFINITE);
  // The last W of the row, without those before v: their order does not matter here.
  Int<W> lane = {};
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < int32_t(v + W - V) ? broadcast<W>(-INFINITE) : load<W>(row + V - W);
}

template <int W>
LAS_INLINE float block_maximum(const float* row, int64_t begin, int64_t V) {
  Float<W> most = broadcast<W>(-INFINITE);
  for (int64_t v = begin; v < std::min(begin + BLOCK, V); v += W)
    most = larger<W>(most, load_logits<W>(row, v, V));
  return largest<W>(most);
}

template <int W>
LAS_INLINE float block_sum(const float* row, int64_t begin, int64_t V, float maximum) {
  Float<W> total = {};
  for (int64_t v = begin; v < std::min(begin + BLOCK, V); v += W)
    total += las::exp<W>(load_logits<W>(row, v, V) - maximum);
  return las::sum<W>(total);
}

inline Row summarise(const float* logits, int64_t V, float* block_maxima) {
  Row row{-INFINITE, 0.0f};
  widest([&](auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    for (int64_t v = 0; v < V; v += BLOCK) {
      const float most = block_maximum<W>(logits, v, V);
      block_maxima[v / BLOCK] = most;
      row.maximum = most > row.maximum ? most : row.maximum;
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

// The best candidates so far, best first. Equal ranks go to the lower index.
class Best {
 public:
  explicit Best(int64_t size) : found_(size), size_(size) {}

  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  const Candidate& operator[](int64_t i) const { return found_[i]; }

  // Whether a candidate of that rank and an index above all others so far would enter; one of NaN never does.
  bool takes(float rank) const { return count_ < size_ ? rank > -INFINITE : rank > found_[size_ - 1].rank; }

  void offer(const Candidate& candidate) {
    if (!takes(candidate.rank)) return;
    int64_t i = count_ < size_ ? count_++ : size_ - 1;
    for (; i > 0 && candidate.rank > found_[i - 1].rank; --i) found_[i] = found_[i - 1];
    found_[i] = candidate;
  }

  // Candidates of rank -inf come last, by index: those not yet taken, from the lowest.
  void fill() {
    const int64_t taken = count_;
    for (int64_t index = 0; count_ < size_; ++index) {
      const auto same = [&](const Candidate& x) { return x.index == index; };
      if (std::none_of(found_.begin(), found_.begin() + taken, same)) found_[count_++] = {-INFINITE, -INFINITE, index};
    }
  }

 private:
  std::vector<Candidate> found_;
  int64_t size_, count_ = 0;
};

struct Options {
  int64_t eos;
  const int64_t *minimum, *maximum;  // (B,) or null
  double length_penalty;
  float eos_threshold;
  const float *coverage, *table;  // (B, K) and (states, V), or null
  const int64_t* states;
  int64_t state_count;
  float weight;
  const float* gains;  // (B, K, V), or null
  float ctc_weight;
};

struct Inputs {
  const float *logits, *scores;
  const bool* finished;
  const int64_t* lengths;
  int64_t B, K, V, blocks;
};

// How the candidates of one beam are ranked.
struct Beam {
  const float* logits;
  const float* block_maxima;
  Row row;
  float score, factor, coverage;  // rank = score of the candidate * factor + coverage
  const float* ngram;  // its row of the table, or null
  float weight;
  const float* gains;  // those of its continuations, or null
  float ctc_weight;

  // What token v adds to the score.
  float step(int64_t v) const {
    float model = row.log_probability(logits[v]);
    if (gains && model != -INFINITE) model = (1.0f - ctc_weight) * model + ctc_weight * gains[v];
    return ngram ? model + weight * ngram[v] : model;
  }
  float rank(float total) const { return total * factor + coverage; }
  Candidate candidate(float step, int64_t index) const { return {rank(score + step), score + step, index}; }
};

// Whether eos is too improbable beside the best other token.
inline bool below_threshold(const Beam& beam, const Inputs& in, int64_t eos, float threshold) {
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

inline void offer_all(const Beam& beam, int64_t first, const Inputs& in, int64_t excluded, Best& best) {
  for (int64_t block = 0; block < in.blocks; ++block) {
    const float most = beam.score + beam.row.log_probability(beam.block_maxima[block]);
    if (!beam.ngram && !beam.gains && !best.takes(beam.rank(most))) continue;
    const int64_t begin = block * BLOCK, n = std::min(BLOCK, in.V - begin);
    float totals[BLOCK], ranks[BLOCK];
    for (int64_t i = 0; i < n; ++i) totals[i] = beam.score + beam.step(begin + i);
    for (int64_t i = 0; i < n; ++i) ranks[i] = beam.rank(totals[i]);
    for (int64_t i = 0; i < n; ++i)
      if (best.takes(ranks[i]) && begin + i != excluded) best.offer({ranks[i], totals[i], first + begin + i});
  }
}

// Offer the candidates of beam k of utterance b, in the order of their indices.
inline void offer_beam(const Inputs& in, const Options& options, const Row* rows, const float* block_maxima,
                       int64_t b, int64_t k, Best& best) {
  const int64_t at = b * in.K + k, first = k * in.V, eos = options.eos;
  const bool finished = in.finished[at];
  const float tokens = float(std::max<int64_t>(1, in.lengths[at] + !finished));
  const Beam beam{in.logits + at * in.V,
                  block_maxima + at * in.blocks,
                  rows[at],
                  in.scores[at],
                  options.length_penalty == 0.0 ? 1.0f : 1.0f / std::pow(tokens, float(options.length_penalty)),
                  options.coverage ? options.coverage[at] : 0.0f,
                  options.table ? options.table + options.states[at] * in.V : nullptr,
                  options.weight,
                  options.gains ? options.gains + at * in.V : nullptr,
                  options.ctc_weight};
  if (finished) return best.offer(beam.candidate(0.0f, first + eos));
  if (beam.score == -INFINITE) return;
  if (options.maximum && in.lengths[at] >= options.maximum[b])
    return best.offer(beam.candidate(beam.step(eos), first + eos));
  const bool denied =
      (options.eos_threshold != 0.0f && below_threshold(beam, in, eos, options.eos_threshold)) ||
      (options.minimum && in.lengths[at] < options.minimum[b]);
  offer_all(beam, first, in, denied ? eos : -1, best);
}

struct Outputs {
  float* scores;
  int64_t *tokens, *parents;
  bool* finished;
  int64_t *lengths, *states;
};

inline void write(const Inputs& in, const Options& options, int64_t b, const Best& best, const Outputs& out) {
  for (int64_t k = 0; k < in.K; ++k) {
    const int64_t to = b * in.K + k, parent = best[k].index / in.V, token = best[k].index % in.V;
    const int64_t from = b * in.K + parent;
    const bool ended = in.finished[from];
    out.scores[to] = best[k].score;
    out.tokens[to] = token;
    out.parents[to] = parent;
    out.finished[to] = ended || token == options.eos;
    out.lengths[to] = in.lengths[from] + !ended;
    if (options.table == nullptr) continue;
    const int64_t state = options.states[from];
    out.states[to] = ended ? state : (state * in.V + token) % options.state_count;
  }
}

}  // namespace las::topk
