// CTC prefix scores of the hypotheses of one utterance; las_fast/ops/ctc_prefix.py has the formulas.
//
// The recursion over frames is in logarithms, with one hypothesis per lane. The sums over frames that score all
// continuations are one matmul of probabilities, each relative to the largest of its hypothesis and of its token. That
// leaves enough of float32's range for all sums but a few, which are made again in logarithms.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "matmul.h"
#include "memory.h"
#include "packing.h"
#include "softmax.h"
#include "vector.h"

namespace las::ctc {

constexpr int64_t BLANK = 0;
constexpr float MIN_SUM = 1e-30f;  // larger sums are accurate: terms lost below float32's range are at most 1e-38

// The log-probabilities of one utterance.
struct CtcLogProbs {
  CtcLogProbs() = default;
  CtcLogProbs(const float* log, int64_t T, int64_t V) : log(log), T(T), V(V), max_log(V, -INFINITE) {
    // Frames at the end that are certainly blank change nothing. A batch of unequal lengths has many of them.
    while (this->T > 0 && log[(this->T - 1) * V + BLANK] == 0.0f) --this->T;
    for (int64_t t = 0; t < this->T; ++t)
      for (int64_t v = 0; v < V; ++v) max_log[v] = std::max(max_log[v], log[t * V + v]);
    std::vector<float> relative(this->T * V);
    widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t t = 0; t < this->T; ++t)
        each_vector<W>(V, [&](int64_t v, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> peak = get<W>(max_log.data() + v, lanes, 0.0f), x = get<W>(log + t * V + v, lanes, 0.0f);
          put<W>(relative.data() + t * V + v, las::exp<W>(x == peak ? Float<W>{} : x - peak), lanes);
        });
    });
    relative_probs = pack<float>(relative.data(), 1, V, V, this->T, memory);
  }

  const float* log = nullptr;  // (T, V)
  int64_t T = 0, V = 0;
  std::vector<float> max_log;  // (V,): the largest of each token
  AlignedArray<float> memory;
  Panels<float> relative_probs;  // (V, T): exp(log - max_log)
};

// A hypothesis, which continues another one.
struct CtcHypothesis {
  const float* forward_before;  // (T + 1,): a_t of its parent
  float* forward;               // (T + 1,): its own
  int64_t last, chosen;         // last token of the parent; token that extends it
  float prefix_log_prob;        // its log psi
  float* gains;                 // (V,)
};

class Scorer {
 public:
  // Compute `forward` and `gains` of some hypotheses of one utterance.
  void advance(const CtcLogProbs& log_probs, const std::vector<CtcHypothesis>& all, int64_t eos) {
    repeated_.assign(all.size(), 0.0f);
    widest([&](auto width) __attribute__((always_inline)) {
      for (size_t i = 0; i < all.size(); i += width)
        extend<width>(log_probs, all.data() + i, std::min<int64_t>(width, all.size() - i), repeated_.data() + i);
    });
    score(log_probs, all, eos, true);
  }

  // The same for the empty hypothesis, whose a_t begins with 0.
  void start(const CtcLogProbs& log_probs, const CtcHypothesis& empty, int64_t eos) {
    empty.forward[0] = 0.0f;
    for (int64_t t = 0; t < log_probs.T; ++t)
      empty.forward[t + 1] = empty.forward[t] + log_probs.log[t * log_probs.V + BLANK];
    score(log_probs, {empty}, eos, false);
  }

 private:
  // The recursion over frames for n hypotheses, at most W; `repeated`: (n,) log psi of each with its last token again.
  template <int W>
  LAS_INLINE void extend(const CtcLogProbs& log_probs, const CtcHypothesis* some, int64_t n, float* repeated) {
    const int64_t T = log_probs.T, V = log_probs.V;
    const float* log = log_probs.log;
    begun_.assign((T + 1) * W, -INFINITE);
    label_.assign((T + 1) * W, -INFINITE);
    forward_.resize((T + 1) * W);
    for (int64_t i = 0; i < n; ++i) {
      const CtcHypothesis& one = some[i];
      const bool repeats = one.chosen == one.last;
      for (int64_t t = repeats; t < T; ++t)
        begun_[t * W + i] = repeats ? one.forward_before[t - 1] + log[(t - 1) * V + BLANK] : one.forward_before[t];
      for (int64_t t = 0; t < T; ++t) label_[t * W + i] = log[t * V + one.chosen];
    }
    Float<W> newest = broadcast<W>(-INFINITE), alpha = newest, again = newest;
    store<W>(forward_.data(), alpha);
    for (int64_t t = 0; t < T; ++t) {
      const Float<W> blank = alpha + log[t * V + BLANK];
      newest = logaddexp<W>(newest, load<W>(begun_.data() + t * W)) + load<W>(label_.data() + t * W);
      alpha = logaddexp<W>(newest, blank);
      again = logaddexp<W>(again, blank + load<W>(label_.data() + (t + 1) * W));
      store<W>(forward_.data() + (t + 1) * W, alpha);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t <= T; ++t) some[i].forward[t] = forward_[t * W + i];
      repeated[i] = again[i];
    }
  }

  // The gains of all continuations. `repeats`: whether the hypotheses have a last token, which may follow itself.
  void score(const CtcLogProbs& log_probs, const std::vector<CtcHypothesis>& all, int64_t eos, bool repeats) {
    const int64_t T = log_probs.T, V = log_probs.V, n = int64_t(all.size()), padded_V = padded(V);
    relative_.resize(n * T);
    peaks_.assign(n, -INFINITE);
    sums_.resize(n * padded_V);
    widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t t = 0; t < T; ++t) peaks_[i] = std::max(peaks_[i], all[i].forward[t]);
        const float peak = peaks_[i] == -INFINITE ? 0.0f : peaks_[i];
        each_vector<W>(T, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
          put<W>(relative_.data() + i * T + t, las::exp<W>(get<W>(all[i].forward + t, lanes, 0.0f) - peak), lanes);
        });
      }
    });
    matmul(Matrix<const float>{relative_.data(), T, n}, log_probs.relative_probs, nullptr, {sums_.data(), padded_V, n});
    for (int64_t i = 0; i < n; ++i) {
      const CtcHypothesis& one = all[i];
      const float prefix = one.prefix_log_prob;
      const auto gain = [&](float psi) { return prefix == -INFINITE ? -INFINITE : psi - prefix; };
      for (int64_t v = 0; v < V; ++v) one.gains[v] = gain(sum(log_probs, one, peaks_[i], v, sums_[i * padded_V + v]));
      if (repeats) one.gains[one.chosen] = gain(repeated_[i]);
      one.gains[BLANK] = -INFINITE;
      one.gains[eos] = gain(one.forward[T]);
    }
  }

  // log psi with token v, from its `sum` relative to both maxima.
  static float sum(const CtcLogProbs& log_probs, const CtcHypothesis& one, float peak, int64_t v, float sum) {
    if (peak == -INFINITE || log_probs.max_log[v] == -INFINITE) return -INFINITE;
    if (sum > MIN_SUM) return std::log(sum) + (peak + log_probs.max_log[v]);
    const auto term = [&](int64_t t) { return one.forward[t] + log_probs.log[t * log_probs.V + v]; };
    float most = -INFINITE;
    for (int64_t t = 0; t < log_probs.T; ++t) most = std::max(most, term(t));
    if (most == -INFINITE) return -INFINITE;
    float total = 0.0f;
    for (int64_t t = 0; t < log_probs.T; ++t) total += std::exp(term(t) - most);
    return most + std::log(total);
  }

  std::vector<float> begun_, label_, forward_;  // (T + 1, W): f_t, p_(t+1) and a_t
  std::vector<float> relative_;                 // (hypotheses, T): exp(a_t - peak)
  std::vector<float> peaks_, repeated_;         // (hypotheses,): the largest a_t, and see extend
  std::vector<float> sums_;                     // (hypotheses, padded V)
};

}  // namespace las::ctc
