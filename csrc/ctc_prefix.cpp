// One step of CTC prefix scores: the C++ backend of las_fast/ops/ctc_prefix.py, which defines it.

#include "ctc_prefix.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace {

using las::ctc::CtcLogProbs;
using las::ctc::CtcHypothesis;
using las::ctc::Scorer;

void check_like(const char* name, const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) {
  las::check_tensor(name, x, shape, dtype, " like ctc_log_probs");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ctc_prefix(
    const at::Tensor& ctc_log_probs_in, const at::Tensor& forward_in, const at::Tensor& prefix_log_probs_in,
    const at::Tensor& next_log_probs_in, const at::Tensor& tokens_in, const at::Tensor& parents_in,
    const at::Tensor& chosen_in, int64_t eos) {
  TORCH_CHECK(ctc_log_probs_in.dim() == 3 && ctc_log_probs_in.scalar_type() == at::kFloat,
              "ctc_log_probs must be (B, T, V) float32; got ", ctc_log_probs_in.sizes(), " ",
              ctc_log_probs_in.scalar_type());
  TORCH_CHECK(tokens_in.dim() == 2, "tokens must be (B, K) int64; got ", tokens_in.sizes());
  const int64_t B = ctc_log_probs_in.size(0), T = ctc_log_probs_in.size(1), V = ctc_log_probs_in.size(2);
  const int64_t K = tokens_in.size(1);
  check_like("forward_log_probs", forward_in, {B, K, T + 1}, at::kFloat);
  check_like("prefix_log_probs", prefix_log_probs_in, {B, K}, at::kFloat);
  check_like("next_log_probs", next_log_probs_in, {B, K, V}, at::kFloat);
  check_like("tokens", tokens_in, {B, K}, at::kLong);
  check_like("parents", parents_in, {B, K}, at::kLong);
  check_like("chosen", chosen_in, {B, K}, at::kLong);
  las::check_token("eos", eos, V);
  const at::Tensor ctc_log_probs = ctc_log_probs_in.contiguous(), forward = forward_in.contiguous();
  const at::Tensor prefix_log_probs = prefix_log_probs_in.contiguous(), next_log_probs = next_log_probs_in.contiguous();
  const at::Tensor tokens = tokens_in.contiguous(), parents = parents_in.contiguous(), chosen = chosen_in.contiguous();
  las::check_range("parents", parents, K);
  las::check_range("chosen", chosen, V);

  const at::Tensor forward_out = at::empty_like(forward), prefix_log_probs_out = at::empty_like(prefix_log_probs);
  const at::Tensor next_log_probs_out = at::empty_like(next_log_probs);
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    Scorer scorer;
    std::vector<CtcHypothesis> all(K);
    for (int64_t b = begin; b < end; ++b) {
      const CtcLogProbs utterance(ctc_log_probs.const_data_ptr<float>() + b * T * V, T, V);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t to = b * K + k, from = b * K + parents.const_data_ptr<int64_t>()[to];
        const int64_t token = chosen.const_data_ptr<int64_t>()[to];
        float& prefix_log_prob = prefix_log_probs_out.mutable_data_ptr<float>()[to];
        prefix_log_prob =
            prefix_log_probs.const_data_ptr<float>()[from] + next_log_probs.const_data_ptr<float>()[from * V + token];
        all[k] = {forward.const_data_ptr<float>() + from * (T + 1),
                  forward_out.mutable_data_ptr<float>() + to * (T + 1),
                  tokens.const_data_ptr<int64_t>()[from],
                  token,
                  prefix_log_prob,
                  next_log_probs_out.mutable_data_ptr<float>() + to * V};
      }
      scorer.advance(utterance, all, eos);
      for (const CtcHypothesis& hypothesis : all)
        std::fill(hypothesis.forward + utterance.T, hypothesis.forward + T + 1, hypothesis.forward[utterance.T]);
    }
  });
  return {forward_out, prefix_log_probs_out, next_log_probs_out};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("ctc_prefix_cpp", &ctc_prefix); }
