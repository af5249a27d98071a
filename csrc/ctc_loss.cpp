// The CTC loss, its gradient and the token times: the C++ backend of las_fast/ops/ctc_loss.py, which defines them.
//
// An utterance with S tokens has two states for each u from 0 to S: the frame is the u-th token, or a blank after it.
// So the recursion over frames runs over vectors of u. It is in logarithms, because a state that is 1e-40 times as
// likely as another may be the only one that reaches the end. The largest value of each frame is subtracted and summed
// in float64: the likeliest states stay near 0, where float32 is precise, however long the utterance.
//
// Sums do not depend on the other utterances: an utterance gets the same result alone and in any batch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "ctc_prefix.h"
#include "memory.h"
#include "softmax.h"
#include "vector.h"

namespace {

using las::logaddexp;
using las::Float;
using las::INFINITE;
using las::load;
using las::store;
using las::ctc::BLANK;

constexpr int64_t EDGE = 16;  // unreachable states before and after each row, so that u - 1 and u + 1 can be loaded

struct Utterance {
  const float* logits;  // (T, V)
  int64_t T, V;
  const int64_t* tokens;  // (S,)
  int64_t S;
};

// A matrix (count, S + 1), with u from 0 to S in each row, padded to whole vectors.
class LatticeRows {
 public:
  void reset(int64_t S, int64_t count = 1) {
    size_ = las::padded(S + 1, EDGE);
    stride_ = EDGE + size_ + EDGE;
    values_.assign(count * stride_, -INFINITE);
  }
  float* at(int64_t row = 0) { return values_.data() + row * stride_ + EDGE; }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0, stride_ = 0;
  std::vector<float> values_;
};

// The forward and backward recursion over one utterance, in log-probabilities.
class Lattice {
 public:
  // Return the transcript's log-probability. With `allow_adjacent_equal`, equal tokens need no blank between them.
  template <int W>
  LAS_INLINE double forward(const Utterance& utterance, bool allow_adjacent_equal) {
    compute_emissions<W>(utterance);
    largest_.assign(utterance.T + 1, 0.0);
    skip_blank_.reset(utterance.S);
    for (int64_t u = 2; u <= utterance.S; ++u)  // no token comes before the first
      if (allow_adjacent_equal || utterance.tokens[u - 1] != utterance.tokens[u - 2]) skip_blank_.at()[u] = 0.0f;
    in_token_.reset(utterance.S, utterance.T + 1), in_blank_.reset(utterance.S, utterance.T + 1);
    in_blank_.at(0)[0] = 0.0f;
    for (int64_t t = 0; t < utterance.T; ++t) {
      const float *token = in_token_.at(t), *blank = in_blank_.at(t);
      for (int64_t u = 0; u < in_token_.size(); u += W) {
        const Float<W> stay = load<W>(token + u), stay_blank = load<W>(blank + u);
        const Float<W> from_token = load<W>(token + u - 1) + load<W>(skip_blank_.at() + u);
        const Float<W> next = logaddexp<W>(from_token, load<W>(blank + u - 1));
        store<W>(in_token_.at(t + 1) + u, logaddexp<W>(stay, next) + load<W>(token_.at(t) + u));
        store<W>(in_blank_.at(t + 1) + u, logaddexp<W>(stay, stay_blank) + blank_[t]);
      }
      largest_[t + 1] = largest_[t] + subtract_largest<W>(in_token_.at(t + 1), in_blank_.at(t + 1), in_token_.size());
    }
    const Float<W> ends = logaddexp<W>(las::broadcast<W>(in_token_.at(utterance.T)[utterance.S]),
                                       las::broadcast<W>(in_blank_.at(utterance.T)[utterance.S]));
    return largest_[utterance.T] + ends[0];
  }

  // Call each(t, token, blank) for each frame from the last to the first, where token and blank (size(),) are the
  // posteriors of the states. `total` is the log-probability of the transcript.
  template <int W, class Each>
  LAS_INLINE void backward(const Utterance& utterance, double total, Each each) {
    for (LatticeRows* row : {&after_token_, &after_blank_, &posterior_token_, &posterior_blank_})
      row->reset(utterance.S);
    float *token = after_token_.at(), *blank = after_blank_.at();
    double largest = 0.0;
    for (int64_t t = utterance.T - 1; t >= 0; --t) {
      const float offset = float(largest_[t + 1] + largest - total);
      for (int64_t u = 0; u < after_token_.size(); u += W) {
        Float<W> now, now_blank;
        if (t == utterance.T - 1) {
          now = now_blank = at_end<W>(utterance.S, u);
        } else {
          const Float<W> next = load<W>(token + u + 1), stay_blank = load<W>(blank + u);
          const Float<W> to_token = next + load<W>(skip_blank_.at() + u + 1);
          now = logaddexp<W>(logaddexp<W>(load<W>(token + u), stay_blank), to_token);
          now_blank = logaddexp<W>(stay_blank, next);
        }
        store<W>(posterior_token_.at() + u, probability<W>(load<W>(in_token_.at(t + 1) + u) + now + offset));
        store<W>(posterior_blank_.at() + u, probability<W>(load<W>(in_blank_.at(t + 1) + u) + now_blank + offset));
        store<W>(token + u, now + load<W>(token_.at(t) + u));
        store<W>(blank + u, now_blank + blank_[t]);
      }
      largest += subtract_largest<W>(token, blank, after_token_.size());
      each(t, posterior_token_.at(), posterior_blank_.at());
    }
  }

  int64_t size() const { return in_token_.size(); }
  const float* probabilities(int64_t t, int64_t V) const { return probabilities_.data() + t * V; }

 private:
  // Compute the softmax of each frame, and the log-probabilities of the blank and of the transcript's tokens.
  template <int W>
  LAS_INLINE void compute_emissions(const Utterance& utterance) {
    const auto [logits, T, V, tokens, S] = utterance;
    probabilities_.assign(logits, logits + T * V);
    token_.reset(S, T);
    blank_.resize(T);
    for (int64_t t = 0; t < T; ++t) {
      const float* frame = logits + t * V;
      const las::SoftmaxSummary all = las::softmax<W>(probabilities_.data() + t * V, V);
      blank_[t] = frame[BLANK] - all.maximum - all.log_sum;  // two subtractions: the sum would be rounded
      for (int64_t u = 1; u <= S; ++u) token_.at(t)[u] = frame[tokens[u - 1]] - all.maximum - all.log_sum;
    }
  }

  // The log-probability that the transcript ends in a state: 0 if u = S, otherwise -inf.
  template <int W>
  static LAS_INLINE Float<W> at_end(int64_t S, int64_t u) {
    Float<W> x;
    for (int i = 0; i < W; ++i) x[i] = u + i == S ? 0.0f : -INFINITE;
    return x;
  }

  template <int W>
  static LAS_INLINE Float<W> probability(Float<W> log) {
    return las::exp<W>(log > 0.0f ? Float<W>{} : log);  // rounding may make it exceed 1
  }

  // Subtract the largest value of two rows from both and return it: -inf if no state can be reached.
  template <int W>
  static LAS_INLINE float subtract_largest(float* token, float* blank, int64_t size) {
    Float<W> maxima = las::broadcast<W>(-INFINITE);
    for (int64_t u = 0; u < size; u += W)
      maxima = las::max<W>(maxima, las::max<W>(load<W>(token + u), load<W>(blank + u)));
    const float largest = las::largest<W>(maxima);
    if (largest == -INFINITE) return largest;  // -inf minus itself would be NaN
    for (float* row : {token, blank})
      for (int64_t u = 0; u < size; u += W) store<W>(row + u, load<W>(row + u) - largest);
    return largest;
  }

  LatticeRows token_;                              // (T, S + 1): log-probability of token u in each frame
  LatticeRows skip_blank_;                         // (1, S + 1): 0 if token u may follow without a blank, else -inf
  LatticeRows in_token_, in_blank_;                // (T + 1, S + 1): all paths through the frames before t
  LatticeRows after_token_, after_blank_;          // (1, S + 1): all paths from the current frame to the end
  LatticeRows posterior_token_, posterior_blank_;  // (1, S + 1): posteriors of the current frame
  std::vector<float> probabilities_, blank_;       // (T, V): softmax; (T,): log-probability of the blank
  std::vector<double> largest_;                    // (T + 1,): total subtracted from in_*_ up to each row
};

// ---------------------------------------------------------------------------------------------------------------- loss

// Return minus the log-probability, and set `gradient` (T, V), unless null, to the softmax minus the posterior of each
// token. If no path spells the transcript, return 0 and leave `gradient` as it is.
template <int W>
LAS_INLINE float loss(Lattice& lattice, const Utterance& utterance, float* gradient) {
  const double total = lattice.forward<W>(utterance, false);
  if (total == -INFINITE) return 0.0f;
  if (gradient)
    lattice.backward<W>(utterance, total, [&](int64_t t, const float* token, const float* blank)
                                              __attribute__((always_inline)) {
      float* to = gradient + t * utterance.V;
      std::copy_n(lattice.probabilities(t, utterance.V), utterance.V, to);
      Float<W> sum = {};
      for (int64_t u = 0; u < lattice.size(); u += W) sum += load<W>(blank + u);
      to[BLANK] -= las::sum<W>(sum);
      for (int64_t u = 1; u <= utterance.S; ++u) to[utterance.tokens[u - 1]] -= token[u];
    });
  return float(-total);
}

// --------------------------------------------------------------------------------------------------------- token times

// Set times (S,) to the mean frame of each token's posterior, where equal tokens need no blank between them.
template <int W>
LAS_INLINE void token_times(Lattice& lattice, const Utterance& utterance, float* times) {
  const double total = lattice.forward<W>(utterance, true);
  if (total == -INFINITE) return;
  std::vector<float> mass(lattice.size()), moment(lattice.size());
  lattice.backward<W>(utterance, total, [&](int64_t t, const float* token, const float*)
                                            __attribute__((always_inline)) {
    for (int64_t u = 0; u < lattice.size(); u += W) {
      store<W>(mass.data() + u, load<W>(mass.data() + u) + load<W>(token + u));
      store<W>(moment.data() + u, load<W>(moment.data() + u) + float(t) * load<W>(token + u));
    }
  });
  for (int64_t u = 1; u <= utterance.S; ++u) times[u - 1] = moment[u] / std::max(mass[u], 1e-6f);
}

// ----------------------------------------------------------------------------------------------------------- arguments

void check_lengths(const char* name, const at::Tensor& x, int64_t B, int64_t max_length) {
  las::check_lengths(name, x, B);
  las::check_range(name, x, max_length + 1);
}

struct Arguments {
  Arguments(const at::Tensor& logits_in, const at::Tensor& lengths_in, const at::Tensor& tokens_in,
            const at::Tensor& token_lengths_in)
      : logits(logits_in.contiguous()), lengths(lengths_in.contiguous()), tokens(tokens_in.contiguous()),
        token_lengths(token_lengths_in.contiguous()) {
    TORCH_CHECK(logits.dim() == 3 && logits.size(2) > 0 && logits.scalar_type() == at::kFloat,
                "logits must be (B, T, V) float32 with V > 0; got ", logits.sizes(), " ", logits.scalar_type());
    const int64_t B = logits.size(0), V = logits.size(2);
    TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == B && tokens.scalar_type() == at::kLong, "tokens must be (", B,
                ", S) int64; got ", tokens.sizes(), " ", tokens.scalar_type());
    check_lengths("lengths", lengths, B, logits.size(1));
    check_lengths("token_lengths", token_lengths, B, tokens.size(1));
    for (int64_t b = 0; b < B; ++b)
      for (int64_t u = 0; u < token_lengths.const_data_ptr<int64_t>()[b]; ++u) {
        const int64_t token = tokens.const_data_ptr<int64_t>()[b * tokens.size(1) + u];
        TORCH_CHECK(token > BLANK && token < V, "tokens must be from 1 to ", V - 1, " within token_lengths; got ",
                    token);
      }
  }

  // Call body(b, utterance, lattice) for all utterances, in parallel.
  template <class Body>
  void for_each_utterance(const Body& body) const {
    const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2), S = tokens.size(1);
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      Lattice lattice;
      for (int64_t b = begin; b < end; ++b)
        body(b, Utterance{logits.const_data_ptr<float>() + b * T * V, lengths.const_data_ptr<int64_t>()[b], V,
                          tokens.const_data_ptr<int64_t>() + b * S, token_lengths.const_data_ptr<int64_t>()[b]},
             lattice);
    });
  }

  at::Tensor logits, lengths, tokens, token_lengths;
};

std::tuple<at::Tensor, at::Tensor> ctc_loss(const at::Tensor& logits, const at::Tensor& lengths,
                                            const at::Tensor& tokens, const at::Tensor& token_lengths,
                                            bool gradients) {
  const Arguments arguments(logits, lengths, tokens, token_lengths);
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  const at::Tensor losses = at::empty({B}, arguments.logits.options());
  const at::Tensor gradient = at::zeros({gradients ? B : 0, T, V}, arguments.logits.options());
  arguments.for_each_utterance([&](int64_t b, const Utterance& utterance, Lattice& lattice) {
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      losses.mutable_data_ptr<float>()[b] =
          loss<width>(lattice, utterance, gradients ? gradient.mutable_data_ptr<float>() + b * T * V : nullptr);
    });
  });
  return {losses, gradient};
}

at::Tensor ctc_token_times(const at::Tensor& logits, const at::Tensor& lengths, const at::Tensor& tokens,
                      const at::Tensor& token_lengths) {
  const Arguments arguments(logits, lengths, tokens, token_lengths);
  const at::Tensor times = at::zeros(tokens.sizes(), arguments.logits.options());
  arguments.for_each_utterance([&](int64_t b, const Utterance& utterance, Lattice& lattice) {
    las::dispatch_width([&](auto width) __attribute__((always_inline)) {
      token_times<width>(lattice, utterance, times.mutable_data_ptr<float>() + b * times.size(1));
    });
  });
  return times;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("ctc_loss_cpp", &ctc_loss);
  m.impl("ctc_token_times_cpp", &ctc_token_times);
}
