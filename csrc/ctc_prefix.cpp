// One step of CTC prefix scores: the C++ twin of las_fast/ops/ctc_prefix.py, which says what it means.

#include "ctc_prefix.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace {

using las::ctc::Frames;
using las::ctc::Hypothesis;
using las::ctc::Scorer;

void check_like(const char* name, const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(x.sizes() == shape && x.scalar_type() == dtype, name, " must be ", shape, " ", dtype,
              " like frames; got ", x.sizes(), " ", x.scalar_type());
}

void check_range(const char* name, const at::Tensor& x, int64_t end) {
  const int64_t* values = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); ++i)
    TORCH_CHECK(values[i] >= 0 && values[i] < end, name, " must be from 0 to ", end - 1, "; got ", values[i]);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ctc_prefix(
    const at::Tensor& frames_in, const at::Tensor& alphas_in, const at::Tensor& prefixes_in, const at::Tensor& gains_in,
    const at::Tensor& tokens_in, const at::Tensor& parents_in, const at::Tensor& chosen_in, int64_t eos) {
  TORCH_CHECK(frames_in.dim() == 3 && frames_in.scalar_type() == at::kFloat, "frames must be (B, T, V) float32; got ",
              frames_in.sizes(), " ", frames_in.scalar_type());
  TORCH_CHECK(tokens_in.dim() == 2, "tokens must be (B, K) int64; got ", tokens_in.sizes());
  const int64_t B = frames_in.size(0), T = frames_in.size(1), V = frames_in.size(2), K = tokens_in.size(1);
  check_like("alphas", alphas_in, {B, K, T + 1}, at::kFloat);
  check_like("prefixes", prefixes_in, {B, K}, at::kFloat);
  check_like("gains", gains_in, {B, K, V}, at::kFloat);
  check_like("tokens", tokens_in, {B, K}, at::kLong);
  check_like("parents", parents_in, {B, K}, at::kLong);
  check_like("chosen", chosen_in, {B, K}, at::kLong);
  TORCH_CHECK(eos >= 0 && eos < V, "eos must be a token from 0 to ", V - 1, "; got ", eos);
  const at::Tensor frames = frames_in.contiguous(), before = alphas_in.contiguous();
  const at::Tensor prefixes = prefixes_in.contiguous(), gains = gains_in.contiguous();
  const at::Tensor tokens = tokens_in.contiguous(), parents = parents_in.contiguous(), chosen = chosen_in.contiguous();
  check_range("parents", parents, K);
  check_range("chosen", chosen, V);

  const at::Tensor alphas_out = at::empty_like(before), prefixes_out = at::empty_like(prefixes);
  const at::Tensor gains_out = at::empty_like(gains);
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    Scorer scorer;
    std::vector<Hypothesis> all(K);
    for (int64_t b = begin; b < end; ++b) {
      const Frames utterance(frames.const_data_ptr<float>() + b * T * V, T, V);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t to = b * K + k, from = b * K + parents.const_data_ptr<int64_t>()[to];
        const int64_t token = chosen.const_data_ptr<int64_t>()[to];
        float& prefix = prefixes_out.mutable_data_ptr<float>()[to];
        prefix = prefixes.const_data_ptr<float>()[from] + gains.const_data_ptr<float>()[from * V + token];
        all[k] = {before.const_data_ptr<float>() + from * (T + 1),
                  alphas_out.mutable_data_ptr<float>() + to * (T + 1),
                  tokens.const_data_ptr<int64_t>()[from],
                  token,
                  prefix,
                  gains_out.mutable_data_ptr<float>() + to * V};
      }
      scorer.advance(utterance, all, eos);
      for (const Hypothesis& one : all) std::fill(one.after + utterance.T, one.after + T + 1, one.after[utterance.T]);
    }
  });
  return {alphas_out, prefixes_out, gains_out};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("ctc_prefix_cpp", &ctc_prefix); }
