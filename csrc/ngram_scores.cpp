// Scores of an n-gram model: the C++ backend of las_fast/ops/ngram_scores.py, which defines it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "ngram_scores.h"

namespace {

constexpr int64_t GRAIN = 1 << 12;  // log-probabilities per thread, at least

using Optional = std::optional<at::Tensor>;

void check(const at::Tensor& rows, const at::Tensor& arcs, int64_t V, int64_t order, const at::Tensor& states,
           const Optional& parents, const Optional& tokens) {
  las::check_ngram_model(rows, arcs, V, order);
  TORCH_CHECK(states.dim() == 2 && states.scalar_type() == at::kLong, "states must be (B, K) int64; got ",
              states.sizes(), " ", states.scalar_type());
  TORCH_CHECK(parents.has_value() == tokens.has_value(), "parents and tokens must be given together");
  las::check_tensor("parents", parents, states.sizes(), at::kLong, " like states");
  las::check_tensor("tokens", tokens, states.sizes(), at::kLong, " like states");
}

std::tuple<at::Tensor, at::Tensor> ngram_scores(const at::Tensor& rows_in, const at::Tensor& arcs_in, int64_t V,
                                                int64_t order, const at::Tensor& states_in, const Optional& parents_in,
                                                const Optional& tokens_in) {
  check(rows_in, arcs_in, V, order, states_in, parents_in, tokens_in);
  const at::Tensor rows = rows_in.contiguous(), arcs = arcs_in.contiguous(), states = states_in.contiguous();
  const Optional parents = las::contiguous(parents_in), tokens = las::contiguous(tokens_in);
  const int64_t B = states.size(0), K = states.size(1);
  las::check_range("states", states, rows.size(0));
  if (parents) las::check_range("parents", *parents, K);
  if (tokens) las::check_range("tokens", *tokens, V);
  const las::ngram::Model model{rows.const_data_ptr<int32_t>(), arcs.const_data_ptr<int32_t>(), V, order};
  const at::Tensor states_after = at::empty({B, K}, states.options());
  const at::Tensor log_probs = at::empty({B, K, V}, states.options().dtype(at::kFloat));
  const int64_t *before = states.const_data_ptr<int64_t>(), *parent = las::data_or_null<int64_t>(parents);
  const int64_t* token = las::data_or_null<int64_t>(tokens);
  int64_t* after = states_after.mutable_data_ptr<int64_t>();
  float* out = log_probs.mutable_data_ptr<float>();
  at::parallel_for(0, B * K, std::max<int64_t>(1, GRAIN / V), [&](int64_t begin, int64_t end) {
    las::ngram::Scorer scorer;
    for (int64_t i = begin; i < end; ++i) {
      after[i] = token ? las::ngram::follow(model, before[i / K * K + parent[i]], token[i]) : before[i];
      scorer.score(model, after[i], out + i * V);
    }
  });
  return {states_after, log_probs};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("ngram_scores_cpp", &ngram_scores); }
