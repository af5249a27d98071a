// CTC prefix scores of the hypotheses of one utterance; las_fast/ops/ctc_prefix.py has the formulas.
//
// The recursion over frames is in logarithms, a hypothesis a lane. The sums over frames that score all continuations are
// one product of probabilities, each relative to the largest of its hypothesis and of its token: that leaves a float32
// enough room for all sums but a few, and those are made again in logarithms.

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
constexpr float FULL = 1e-30f;  // a sum above it has lost nothing that counts: what is below float32's range is 1e-38

// The frames of one utterance.
struct Frames {
  Frames() = default;
  Frames(const float* log, int64_t T, int64_t V) : log(log), T(T), V(V), most(V, -INFINITE) {
    // Certain blanks at the end change nothing, and are many where utterances of one batch are not equally long.
    while (this->T > 0 && log[(this->T - 1) * V + BLANK] == 0.0f) --this->T;
    for (int64_t t = 0; t < this->T; ++t)
      for (int64_t v = 0; v < V; ++v) most[v] = std::max(most[v], log[t * V + v]);
    std::vector<float> relative(this->T * V);
    widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t t = 0; t < this->T; ++t)
        each_vector<W>(V, [&](int64_t v, int64_t lanes) __attribute__((always_inline)) {
          const Float<W> peak = get<W>(most.data() + v, lanes, 0.0f), x = get<W>(log + t * V + v, lanes, 0.0f);
          put<W>(relative.data() + t * V + v, las::exp<W>(x == peak ? Float<W>{} : x - peak), lanes);
        });
    });
    shares = pack<float>(relative.data(), 1, V, V, this->T, memory);
  }

  const float* log = nullptr;  // (T, V)
  int64_t T = 0, V = 0;
  std::vector<float> most;  // largest of each token
  las::Memory<float> memory;
  Panels<float> shares;  // exp(log - most)
};

// A hypothesis that continues another one.
struct Hypothesis {
  const float* before;   // a_t of the one that it continues, T + 1 values
  float* after;          // its own; as many
  int64_t last, chosen;  // tokens: the last of that one, and its own
  float prefix;          // its log psi
  float* gains;          // (V,)
};

class Scorer {
 public:
  // Fill in `after` and `gains` of some hypotheses of one utterance.
  void advance(const Frames& frames, const std::vector<Hypothesis>& all, int64_t eos) {
    again_.assign(all.size(), 0.0f);
    widest([&](auto width) __attribute__((always_inline)) {
      for (size_t i = 0; i < all.size(); i += width)
        recur<width>(frames, all.data() + i, std::min<int64_t>(width, all.size() - i), again_.data() + i);
    });
    score(frames, all, eos, true);
  }

  // The same of the empty hypothesis, whose a_t begins with 0.
  void start(const Frames& frames, const Hypothesis& empty, int64_t eos) {
    empty.after[0] = 0.0f;
    for (int64_t t = 0; t < frames.T; ++t) empty.after[t + 1] = empty.after[t] + frames.log[t * frames.V + BLANK];
    score(frames, {empty}, eos, false);
  }

 private:
  // The recursion over frames for n hypotheses; `again`: log psi of each with its last token once more.
  template <int W>
  LAS_INLINE void recur(const Frames& frames, const Hypothesis* some, int64_t n, float* again) {
    const int64_t T = frames.T, V = frames.V;
    const float* log = frames.log;
    begun_.assign((T + 1) * W, -INFINITE);
    label_.assign((T + 1) * W, -INFINITE);
    alphas_.resize((T + 1) * W);
    for (int64_t i = 0; i < n; ++i) {
      const Hypothesis& one = some[i];
      const bool repeats = one.chosen == one.last;
      for (int64_t t = repeats; t < T; ++t)
        begun_[t * W + i] = repeats ? one.before[t - 1] + log[(t - 1) * V + BLANK] : one.before[t];
      for (int64_t t = 0; t < T; ++t) label_[t * W + i] = log[t * V + one.chosen];
    }
    Float<W> newest = broadcast<W>(-INFINITE), alpha = newest, repeated = newest;
    store<W>(alphas_.data(), alpha);
    for (int64_t t = 0; t < T; ++t) {
      const Float<W> blank = alpha + log[t * V + BLANK];
      newest = add_logs<W>(newest, load<W>(begun_.data() + t * W)) + load<W>(label_.data() + t * W);
      alpha = add_logs<W>(newest, blank);
      repeated = add_logs<W>(repeated, blank + load<W>(label_.data() + (t + 1) * W));
      store<W>(alphas_.data() + (t + 1) * W, alpha);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t <= T; ++t) some[i].after[t] = alphas_[t * W + i];
      again[i] = repeated[i];
    }
  }

  void score(const Frames& frames, const std::vector<Hypothesis>& all, int64_t eos, bool repeats) {
    const int64_t T = frames.T, V = frames.V, n = int64_t(all.size()), wide = padded(V);
    relative_.resize(n * T);
    peaks_.assign(n, -INFINITE);
    sums_.resize(n * wide);
    widest([&](auto width) __attribute__((always_inline)) {
      constexpr int W = width;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t t = 0; t < T; ++t) peaks_[i] = std::max(peaks_[i], all[i].after[t]);
        const float peak = peaks_[i] == -INFINITE ? 0.0f : peaks_[i];
        each_vector<W>(T, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
          put<W>(relative_.data() + i * T + t, las::exp<W>(get<W>(all[i].after + t, lanes, 0.0f) - peak), lanes);
        });
      }
    });
    product(Matrix<const float>{relative_.data(), T, n}, frames.shares, nullptr, {sums_.data(), wide, n});
    for (int64_t i = 0; i < n; ++i) {
      const Hypothesis& one = all[i];
      const auto gain = [&](float psi) { return one.prefix == -INFINITE ? -INFINITE : psi - one.prefix; };
      for (int64_t v = 0; v < V; ++v) one.gains[v] = gain(sum(frames, one, peaks_[i], v, sums_[i * wide + v]));
      if (repeats) one.gains[one.chosen] = gain(again_[i]);
      one.gains[BLANK] = -INFINITE;
      one.gains[eos] = gain(one.after[T]);
    }
  }

  // log psi with token v, of its `sum` relative to both peaks.
  static float sum(const Frames& frames, const Hypothesis& one, float peak, int64_t v, float sum) {
    if (peak == -INFINITE || frames.most[v] == -INFINITE) return -INFINITE;
    if (sum > FULL) return std::log(sum) + (peak + frames.most[v]);
    const auto term = [&](int64_t t) { return one.after[t] + frames.log[t * frames.V + v]; };
    float most = -INFINITE;
    for (int64_t t = 0; t < frames.T; ++t) most = std::max(most, term(t));
    if (most == -INFINITE) return -INFINITE;
    float total = 0.0f;
    for (int64_t t = 0; t < frames.T; ++t) total += std::exp(term(t) - most);
    return most + std::log(total);
  }

  std::vector<float> begun_, label_, alphas_;  // (T + 1, W): f_t, p_(t+1) and a_t
  std::vector<float> relative_, peaks_, sums_, again_;
};

}  // namespace las::ctc
