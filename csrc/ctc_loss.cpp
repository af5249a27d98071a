// The CTC loss, its gradient, and where its posterior has each token: the C++ twin of las_fast/ops/ctc_loss.py.
//
// States of an utterance with S tokens are pairs: u = 0 to S counts the tokens begun, and the frame is the u-th token
// or a blank after it. So the recursion over frames runs over vectors of u. It is in logarithms: a state that is
// 1e-40 as likely as another one may be the only one that reaches the end. The largest of each frame is kept apart,
// in float64: so the likeliest states are near 0, where a float32 is fine, however long the utterance.
//
// A sum never depends on the utterances beside it: there is one answer alone and in any batch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "ctc_prefix.h"
#include "memory.h"
#include "softmax.h"
#include "vector.h"

namespace {

using las::add_logs;
using las::Float;
using las::INFINITE;
using las::load;
using las::store;
using las::ctc::BLANK;

constexpr int64_t EDGE = 16;  // never reached states before and after each row, so that neighbours can be loaded

struct Utterance {
  const float* logits;  // (T, V)
  int64_t T, V;
  const int64_t* tokens;  // (S,)
  int64_t S;
};

// Rows of values for u = 0 to S, and for as many more as make whole vectors.
class Rows {
 public:
  void begin(int64_t count, int64_t S) {
    size_ = las::padded(S + 1, EDGE);
    values_.assign(count * (size_ + 2 * EDGE), -INFINITE);
  }
  float* at(int64_t row = 0) { return values_.data() + row * (size_ + 2 * EDGE) + EDGE; }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
  std::vector<float> values_;
};

// Forward and backward over one utterance. Log-probabilities: `token` and `blank` of the frames alone, the others of
// paths that are in that state.
class Lattice {
 public:
  // Log-probability of the transcript. Unless `apart`, a repeated token needs a blank before it.
  template <int W>
  LAS_INLINE double forward(const Utterance& given, bool apart) {
    emit<W>(given);
    largest_.assign(given.T + 1, 0.0);
    step_over_.begin(1, given.S);
    for (int64_t u = 1; u <= given.S; ++u)
      if (u == 1 || apart || given.tokens[u - 1] != given.tokens[u - 2]) step_over_.at()[u] = 0.0f;
    in_token_.begin(given.T + 1, given.S), in_blank_.begin(given.T + 1, given.S);
    in_blank_.at(0)[0] = 0.0f;
    for (int64_t t = 0; t < given.T; ++t) {
      const float *token = in_token_.at(t), *blank = in_blank_.at(t);
      for (int64_t u = 0; u < in_token_.size(); u += W) {
        const Float<W> stay = load<W>(token + u), stay_blank = load<W>(blank + u);
        const Float<W> over = load<W>(token + u - 1) + load<W>(step_over_.at() + u);
        const Float<W> next = add_logs<W>(over, load<W>(blank + u - 1));
        store<W>(in_token_.at(t + 1) + u, add_logs<W>(stay, next) + load<W>(token_.at(t) + u));
        store<W>(in_blank_.at(t + 1) + u, add_logs<W>(stay, stay_blank) + blank_[t]);
      }
      largest_[t + 1] = largest_[t] + take_out_largest<W>(in_token_.at(t + 1), in_blank_.at(t + 1), in_token_.size());
    }
    const Float<W> ends = add_logs<W>(las::broadcast<W>(in_token_.at(given.T)[given.S]),
                                      las::broadcast<W>(in_blank_.at(given.T)[given.S]));
    return largest_[given.T] + ends[0];
  }

  // Call each(t, token, blank) from the last frame to the first, with the posteriors of the states, `size()` of each;
  // `total` is the log-probability of the transcript.
  template <int W, class Each>
  LAS_INLINE void backward(const Utterance& given, double total, Each each) {
    after_token_.begin(1, given.S), after_blank_.begin(1, given.S);  // of what follows, the frame itself included
    posterior_token_.begin(1, given.S), posterior_blank_.begin(1, given.S);
    float *token = after_token_.at(), *blank = after_blank_.at();
    double largest = 0.0;
    for (int64_t t = given.T - 1; t >= 0; --t) {
      const float scale = float(largest_[t + 1] + largest - total);
      for (int64_t u = 0; u < after_token_.size(); u += W) {
        Float<W> now, now_blank;
        if (t == given.T - 1) {
          now = now_blank = at_end<W>(given.S, u);
        } else {
          const Float<W> next = load<W>(token + u + 1), stay_blank = load<W>(blank + u);
          const Float<W> over = next + load<W>(step_over_.at() + u + 1);
          now = add_logs<W>(add_logs<W>(load<W>(token + u), stay_blank), over);
          now_blank = add_logs<W>(stay_blank, next);
        }
        store<W>(posterior_token_.at() + u, share<W>(load<W>(in_token_.at(t + 1) + u) + now + scale));
        store<W>(posterior_blank_.at() + u, share<W>(load<W>(in_blank_.at(t + 1) + u) + now_blank + scale));
        store<W>(token + u, now + load<W>(token_.at(t) + u));
        store<W>(blank + u, now_blank + blank_[t]);
      }
      largest += take_out_largest<W>(token, blank, after_token_.size());
      each(t, posterior_token_.at(), posterior_blank_.at());
    }
  }

  int64_t size() const { return in_token_.size(); }
  const float* probabilities(int64_t t, int64_t V) const { return probabilities_.data() + t * V; }

 private:
  // The softmax of each frame, and the log-probabilities of the blank and of the transcript's tokens.
  template <int W>
  LAS_INLINE void emit(const Utterance& given) {
    const auto [logits, T, V, tokens, S] = given;
    probabilities_.assign(logits, logits + T * V);
    token_.begin(T, S);
    blank_.resize(T);
    for (int64_t t = 0; t < T; ++t) {
      const float* frame = logits + t * V;
      const las::Summary all = las::softmax<W>(probabilities_.data() + t * V, V);
      blank_[t] = frame[BLANK] - all.maximum - all.log_sum;  // one after another: their sum would be rounded
      for (int64_t u = 1; u <= S; ++u) token_.at(t)[u] = frame[tokens[u - 1]] - all.maximum - all.log_sum;
    }
  }

  // Certain that nothing follows: after S tokens, and never after fewer.
  template <int W>
  static LAS_INLINE Float<W> at_end(int64_t S, int64_t u) {
    Float<W> x;
    for (int i = 0; i < W; ++i) x[i] = u + i == S ? 0.0f : -INFINITE;
    return x;
  }

  template <int W>
  static LAS_INLINE Float<W> share(Float<W> log) {
    return las::exp<W>(log > 0.0f ? Float<W>{} : log);  // rounding may have made it more than certain
  }

  // Subtract the largest of two rows from both and return it, unless no state can be reached.
  template <int W>
  static LAS_INLINE float take_out_largest(float* token, float* blank, int64_t size) {
    Float<W> most = las::broadcast<W>(-INFINITE);
    for (int64_t u = 0; u < size; u += W)
      most = las::larger<W>(most, las::larger<W>(load<W>(token + u), load<W>(blank + u)));
    const float largest = las::largest<W>(most);
    if (largest == -INFINITE) return 0.0f;
    for (float* row : {token, blank})
      for (int64_t u = 0; u < size; u += W) store<W>(row + u, load<W>(row + u) - largest);
    return largest;
  }

  Rows token_, step_over_, in_token_, in_blank_, after_token_, after_blank_, posterior_token_, posterior_blank_;
  std::vector<float> probabilities_, blank_;
  std::vector<double> largest_;  // taken out of in_token_ and in_blank_, up to each row
};

// ---------------------------------------------------------------------------------------------------------------- loss

// Minus the log-probability, and its gradient (T, V) unless null: what is said of each token, less its posterior.
template <int W>
LAS_INLINE float loss(Lattice& lattice, const Utterance& given, float* gradient) {
  const double total = lattice.forward<W>(given, false);
  if (total == -INFINITE) return 0.0f;
  if (gradient)
    lattice.backward<W>(given, total, [&](int64_t t, const float* token, const float* blank)
                                          __attribute__((always_inline)) {
      float* to = gradient + t * given.V;
      std::copy_n(lattice.probabilities(t, given.V), given.V, to);
      Float<W> sum = {};
      for (int64_t u = 0; u < lattice.size(); u += W) sum += load<W>(blank + u);
      to[BLANK] -= las::sum<W>(sum);
      for (int64_t u = 1; u <= given.S; ++u) to[given.tokens[u - 1]] -= token[u];
    });
  return float(-total);
}

// -------------------------------------------------------------------------------------------------------------- places

// The mean frame of each token's posterior, of a transcript whose tokens need no blank between them.
template <int W>
LAS_INLINE void places(Lattice& lattice, const Utterance& given, float* to) {
  const double total = lattice.forward<W>(given, true);
  if (total == -INFINITE) return;
  Rows sums;
  sums.begin(2, given.S);
  float *mass = sums.at(0), *moment = sums.at(1);
  std::fill_n(mass, sums.size(), 0.0f), std::fill_n(moment, sums.size(), 0.0f);
  lattice.backward<W>(given, total, [&](int64_t t, const float* token, const float*) __attribute__((always_inline)) {
    for (int64_t u = 0; u < sums.size(); u += W) {
      store<W>(mass + u, load<W>(mass + u) + load<W>(token + u));
      store<W>(moment + u, load<W>(moment + u) + float(t) * load<W>(token + u));
    }
  });
  for (int64_t u = 1; u <= given.S; ++u) to[u - 1] = moment[u] / std::max(mass[u], 1e-6f);
}

// ----------------------------------------------------------------------------------------------------------- arguments

void check_lengths(const char* name, const at::Tensor& x, int64_t B, int64_t most) {
  TORCH_CHECK(x.dim() == 1 && x.size(0) == B && x.scalar_type() == at::kLong, name, " must be (", B, ",) int64; got ",
              x.sizes(), " ", x.scalar_type());
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = x.const_data_ptr<int64_t>()[b];
    TORCH_CHECK(length >= 0 && length <= most, name, " must be from 0 to ", most, "; got ", length);
  }
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

  // Call each(b, utterance, lattice) for all, on several threads.
  template <class Each>
  void each(const Each& call) const {
    const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2), S = tokens.size(1);
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      Lattice lattice;
      for (int64_t b = begin; b < end; ++b)
        call(b, Utterance{logits.const_data_ptr<float>() + b * T * V, lengths.const_data_ptr<int64_t>()[b], V,
                          tokens.const_data_ptr<int64_t>() + b * S, token_lengths.const_data_ptr<int64_t>()[b]},
             lattice);
    });
  }

  at::Tensor logits, lengths, tokens, token_lengths;
};

std::tuple<at::Tensor, at::Tensor> ctc_loss(const at::Tensor& logits, const at::Tensor& lengths,
                                            const at::Tensor& tokens, const at::Tensor& token_lengths,
                                            bool gradients) {
  const Arguments given(logits, lengths, tokens, token_lengths);
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  const at::Tensor losses = at::empty({B}, given.logits.options());
  const at::Tensor gradient = at::zeros({gradients ? B : 0, T, V}, given.logits.options());
  given.each([&](int64_t b, const Utterance& utterance, Lattice& lattice) {
    las::widest([&](auto width) __attribute__((always_inline)) {
      losses.mutable_data_ptr<float>()[b] =
          loss<width>(lattice, utterance, gradients ? gradient.mutable_data_ptr<float>() + b * T * V : nullptr);
    });
  });
  return {losses, gradient};
}

at::Tensor ctc_places(const at::Tensor& logits, const at::Tensor& lengths, const at::Tensor& tokens,
                      const at::Tensor& token_lengths) {
  const Arguments given(logits, lengths, tokens, token_lengths);
  const at::Tensor found = at::zeros(tokens.sizes(), given.logits.options());
  given.each([&](int64_t b, const Utterance& utterance, Lattice& lattice) {
    las::widest([&](auto width) __attribute__((always_inline)) {
      places<width>(lattice, utterance, found.mutable_data_ptr<float>() + b * found.size(1));
    });
  });
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("ctc_loss_cpp", &ctc_loss);
  m.impl("ctc_places_cpp", &ctc_places);
}
