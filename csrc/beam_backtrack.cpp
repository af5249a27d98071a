// Hypotheses from back-pointers: the C++ backend of las_fast/ops/beam_backtrack.py, which defines it.
//
// The hypotheses of an utterance are followed together, from the last step to the first, because the values of one step
// of an utterance are contiguous.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace {

constexpr int64_t GRAIN = 16384;  // back-pointers per thread, at least

void check(const at::Tensor& tokens, const at::Tensor& parents, const at::Tensor& scores,
           const at::Tensor& attended_frames) {
  TORCH_CHECK(tokens.dim() == 3 && tokens.scalar_type() == at::kLong,
              "tokens must be (L, B, K) int64; got ", tokens.sizes(), " ", tokens.scalar_type());
  const auto like = [&](const char* name, const at::Tensor& x, at::ScalarType dtype) {
    las::check_tensor(name, x, tokens.sizes(), dtype, " like tokens");
  };
  like("parents", parents, at::kLong);
  like("scores", scores, at::kFloat);
  like("attended_frames", attended_frames, at::kLong);
}

// The steps of a search, (L, B, K) each.
struct SearchSteps {
  const int64_t *tokens, *parents;
  const float* scores;
  const int64_t* attended_frames;
  int64_t L, B, K;
};

// The hypotheses of the search, (B, K, L) each; lengths (B, K).
struct BacktrackedHypotheses {
  int64_t *tokens, *lengths;
  float* scores;
  int64_t* attended_frames;
};

// Follow the hypotheses of utterance b. `beams` (K,) is scratch memory for the beam of each at the current step.
void follow(const SearchSteps& from, int64_t b, int64_t eos, const BacktrackedHypotheses& to,
            std::vector<int64_t>& beams) {
  const int64_t L = from.L, K = from.K;
  std::iota(beams.begin(), beams.end(), 0);
  std::fill_n(to.lengths + b * K, K, L);
  for (int64_t t = L - 1; t >= 0; --t) {
    const int64_t step = (t * from.B + b) * K, step_before = step - from.B * K;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = step + beams[k], parent = from.parents[at], out = (b * K + k) * L + t;
      TORCH_CHECK(parent >= 0 && parent < K, "parents must be from 0 to ", K - 1, "; got ", parent, " at step ", t,
                  " of utterance ", b);
      const float score = from.scores[at], before = t > 0 ? from.scores[step_before + parent] : 0.0f;
      to.scores[out] = score == before ? 0.0f : score - before;  // 0 also where both are -inf
      to.tokens[out] = from.tokens[at];
      to.attended_frames[out] = from.attended_frames[step + parent];
      if (from.tokens[at] == eos) to.lengths[b * K + k] = t;
      beams[k] = parent;
    }
  }
  for (int64_t row = b * K; row < (b + 1) * K; ++row)
    std::fill(to.tokens + row * L + to.lengths[row], to.tokens + (row + 1) * L, eos);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> beam_backtrack(
    const at::Tensor& tokens_in, const at::Tensor& parents_in, const at::Tensor& scores_in,
    const at::Tensor& attended_frames_in, int64_t eos) {
  check(tokens_in, parents_in, scores_in, attended_frames_in);
  const at::Tensor tokens = tokens_in.contiguous(), parents = parents_in.contiguous();
  const at::Tensor scores = scores_in.contiguous(), attended_frames = attended_frames_in.contiguous();
  const int64_t L = tokens.size(0), B = tokens.size(1), K = tokens.size(2);
  at::Tensor hypotheses = at::empty({B, K, L}, tokens.options()), lengths = at::empty({B, K}, tokens.options());
  at::Tensor token_scores = at::empty({B, K, L}, scores.options());
  at::Tensor hypothesis_frames = at::empty({B, K, L}, tokens.options());
  const SearchSteps from{tokens.const_data_ptr<int64_t>(),
                         parents.const_data_ptr<int64_t>(),
                         scores.const_data_ptr<float>(),
                         attended_frames.const_data_ptr<int64_t>(),
                         L,
                         B,
                         K};
  const BacktrackedHypotheses to{hypotheses.mutable_data_ptr<int64_t>(), lengths.mutable_data_ptr<int64_t>(),
                                 token_scores.mutable_data_ptr<float>(), hypothesis_frames.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, B, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, K * L)), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> beams(K);
    for (int64_t b = begin; b < end; ++b) follow(from, b, eos, to, beams);
  });
  return {hypotheses, lengths, token_scores, hypothesis_frames};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("beam_backtrack_cpp", &beam_backtrack); }
