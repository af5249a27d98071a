// CTC prefix scores of the hypotheses of one utterance; las_fast/ops/ctc_prefix.py has the formulas.
//
// The recursion over frames is in logarithms, with one hypothesis per lane. The sums over frames, for all
// continuations, are one matmul of probabilities, which are relative to the largest of each hypothesis and of each
// token. Nearly all sums then stay within the range of float32; the others are computed again in logarithms.

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
constexpr float MIN_SUM = 1e-30f;  // larger sums are accurate: terms that underflow are below 1e-38

// The CTC log-probabilities of one utterance.
struct CtcLogProbs {
  CtcLogProbs(const float* log, int64_t T, int64_t V) : log(log), T(T), V(V), max_log(V, -INFINITE) {
    while (this->T > 0 && is_padding(log + (this->T - 1) * V)) --this->T;
    for (int64_t t = 0; t < this->T; ++t)
      for (int64_t v = 0; v < V; ++v) max_log[v] = std::max(max_log[v], log[t * V + v]);
    std::vector<float> relative(this->T * V);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t t = 0; t < this->T; ++t)
        for_each_vector<W>(V, [&](int64_t v, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> peak = load<W>(max_log.data() + v, lanes), x = load<W>(log + t * V + v, lanes);
          store<W>(relative.data() + t * V + v, las::exp<W>(x - peak), lanes);
        });
    });
    relative_probs = pack<float>(relative.data(), 1, V, V, this->T, memory);
  }

  // Whether all tokens but the blank are impossible in a frame. Such frames at the end change nothing.
  bool is_padding(const float* frame) const {
    if (frame[BLANK] != 0.0f) return false;
    const auto rest = std::max_element(frame + BLANK + 1, frame + V);
    return rest == frame + V || *rest == -INFINITE;
  }

  const float* log = nullptr;  // (T, V)
  int64_t T = 0, V = 0;
  std::vector<float> max_log;  // (V,): the largest of each token over the frames
  AlignedArray<float> memory;
  Panels<float> relative_probs;  // (V, T): exp(log - max_log); NaN for tokens that are never possible
};

// A hypothesis: the results of its parent, and where to write its own.
struct CtcHypothesis {
  const float* forward_before;  // (T + 1,): a_t of its parent
  float* forward;               // (T + 1,): a_t of the hypothesis
  int64_t last, chosen;         // last token of the parent; token that extends the parent
  float prefix_log_prob;        // log psi of the hypothesis
  float* next_log_probs;        // (V,): log psi of each continuation - prefix_log_prob
};

class Scorer {
 public:
  // Compute `forward` and `next_log_probs` of all hypotheses of one utterance.
  void advance(const CtcLogProbs& log_probs, const std::vector<CtcHypothesis>& all, int64_t eos) {
    repeated_.resize(all.size());
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      for (size_t i = 0; i < all.size(); i += width)
        extend<width>(log_probs, all.data() + i, std::min<int64_t>(width, all.size() - i), repeated_.data() + i);
    });
    score(log_probs, all, eos, true);
  }

  // The same for the empty hypothesis, whose log a_0 is 0.
  void start(const CtcLogProbs& log_probs, const CtcHypothesis& empty, int64_t eos) {
    empty.forward[0] = 0.0f;
    for (int64_t t = 0; t < log_probs.T; ++t)
      empty.forward[t + 1] = empty.forward[t] + log_probs.log[t * log_probs.V + BLANK];
    score(log_probs, {empty}, eos, false);
  }

 private:
  // The recursion over frames for n <= W hypotheses. repeated (n,): log psi of each, extended by its last token again.
  template <int W>
  LAS_INLINE void extend(const CtcLogProbs& log_probs, const CtcHypothesis* some, int64_t n, float* repeated) {
    const int64_t T = log_probs.T, V = log_probs.V;
    const float* log = log_probs.log;
    begun_.assign(T * W, -INFINITE);
    label_.assign((T + 1) * W, -INFINITE);
    forward_.resize((T + 1) * W);
    for (int64_t i = 0; i < n; ++i) {
      const CtcHypothesis& hypothesis = some[i];
      const float* before = hypothesis.forward_before;
      const bool repeats = hypothesis.chosen == hypothesis.last;
      for (int64_t t = repeats; t < T; ++t)
        begun_[t * W + i] = repeats ? before[t - 1] + log[(t - 1) * V + BLANK] : before[t];
      for (int64_t t = 0; t < T; ++t) label_[t * W + i] = log[t * V + hypothesis.chosen];
    }
    Float<W> newest = broadcast<W>(-INFINITE), alpha = newest, repeat = newest;
    store<W>(forward_.data(), alpha);
    for (int64_t t = 0; t < T; ++t) {
      const Float<W> blank = alpha + log[t * V + BLANK];
      newest = logaddexp<W>(newest, load<W>(begun_.data() + t * W)) + load<W>(label_.data() + t * W);
      alpha = logaddexp<W>(newest, blank);
      repeat = logaddexp<W>(repeat, blank + load<W>(label_.data() + (t + 1) * W));
      store<W>(forward_.data() + (t + 1) * W, alpha);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t <= T; ++t) some[i].forward[t] = forward_[t * W + i];
      repeated[i] = repeat[i];
    }
  }

  // Compute `next_log_probs`. `has_last_token`: the hypotheses have a last token, which may be repeated.
  void score(const CtcLogProbs& log_probs, const std::vector<CtcHypothesis>& all, int64_t eos, bool has_last_token) {
    const int64_t T = log_probs.T, V = log_probs.V, n = int64_t(all.size()), padded_V = padded(V);
    relative_.resize(n * T);
    peaks_.assign(n, -INFINITE);
    sums_.resize(n * padded_V);
    dispatch_width([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t t = 0; t < T; ++t) peaks_[i] = std::max(peaks_[i], all[i].forward[t]);
        const float peak = peaks_[i];
        for_each_vector<W>(T, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
          store<W>(relative_.data() + i * T + t, las::exp<W>(load<W>(all[i].forward + t, lanes) - peak), lanes);
        });
      }
    });
    matmul(Matrix<const float>{relative_.data(), T, n}, log_probs.relative_probs, nullptr, {sums_.data(), padded_V, n});
    for (int64_t i = 0; i < n; ++i) {
      const CtcHypothesis& hypothesis = all[i];
      const float prefix = hypothesis.prefix_log_prob;
      const auto relative = [&](float log_psi) { return prefix == -INFINITE ? -INFINITE : log_psi - prefix; };
      const float* sums = sums_.data() + i * padded_V;
      for (int64_t v = 0; v < V; ++v)
        hypothesis.next_log_probs[v] = relative(log_psi(log_probs, hypothesis, peaks_[i], v, sums[v]));
      if (has_last_token) hypothesis.next_log_probs[hypothesis.chosen] = relative(repeated_[i]);
      hypothesis.next_log_probs[BLANK] = -INFINITE;
      hypothesis.next_log_probs[eos] = relative(hypothesis.forward[T]);
    }
  }

  // log psi of a hypothesis with token v. `sum` is psi relative to both maxima.
  static float log_psi(const CtcLogProbs& log_probs, const CtcHypothesis& hypothesis, float peak, int64_t v,
                       float sum) {
    if (peak == -INFINITE || log_probs.max_log[v] == -INFINITE) return -INFINITE;  // `sum` is NaN
    if (sum > MIN_SUM) return std::log(sum) + (peak + log_probs.max_log[v]);
    const auto term = [&](int64_t t) { return hypothesis.forward[t] + log_probs.log[t * log_probs.V + v]; };
    float maximum = -INFINITE;
    for (int64_t t = 0; t < log_probs.T; ++t) maximum = std::max(maximum, term(t));
    if (maximum == -INFINITE) return -INFINITE;
    float total = 0.0f;
    for (int64_t t = 0; t < log_probs.T; ++t) total += std::exp(term(t) - maximum);
    return maximum + std::log(total);
  }

  // Logarithms, one hypothesis per lane: f_t (T, W), p_(t+1) of the chosen token (T + 1, W) and a_t (T + 1, W).
  std::vector<float> begun_, label_, forward_;
  std::vector<float> relative_;                 // (hypotheses, T): exp(log a_t - peak); NaN if the peak is -inf
  std::vector<float> peaks_, repeated_;         // (hypotheses,): largest log a_t; log psi with the last token again
  std::vector<float> sums_;                     // (hypotheses, padded V)
};

}  // namespace las::ctc
