// One step of beam search: the C++ backend of las_fast/ops/beam_topk.py, which defines it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "beam_topk.h"

namespace {

using las::contiguous;
using las::data_or_null;
using namespace las::topk;

constexpr int64_t GRAIN = 1 << 14;  // logits per thread, at least

using Optional = std::optional<at::Tensor>;

void check_like(const char* name, const Optional& x, at::IntArrayRef shape, at::ScalarType dtype) {
  las::check_tensor(name, x, shape, dtype, " like logits");
}

void check(const at::Tensor& logits, const at::Tensor& scores, const at::Tensor& finished, const at::Tensor& lengths,
           int64_t eos, const Optional& minimum, const Optional& maximum, const Optional& coverage,
           const Optional& ngram_log_probs, const Optional& ctc_next_log_probs) {
  const auto type = logits.scalar_type();
  TORCH_CHECK(logits.dim() == 3 && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
              "logits must be (B, K, V) float32, bfloat16 or float16; got ", logits.sizes(), " ", type);
  const int64_t B = logits.size(0), K = logits.size(1), V = logits.size(2);
  check_like("scores", scores, {B, K}, at::kFloat);
  check_like("finished", finished, {B, K}, at::kBool);
  check_like("lengths", lengths, {B, K}, at::kLong);
  check_like("minimum", minimum, {B}, at::kLong);
  check_like("maximum", maximum, {B}, at::kLong);
  check_like("coverage", coverage, {B, K}, at::kFloat);
  check_like("ngram_log_probs", ngram_log_probs, {B, K, V}, at::kFloat);
  check_like("ctc_next_log_probs", ctc_next_log_probs, {B, K, V}, at::kFloat);
  las::check_token("eos", eos, V);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> beam_topk(
    const at::Tensor& logits_in, const at::Tensor& scores_in, const at::Tensor& finished_in,
    const at::Tensor& lengths_in, int64_t eos, const Optional& minimum_in, const Optional& maximum_in,
    double length_penalty, double eos_threshold, const Optional& coverage_in, const Optional& ngram_log_probs_in,
    double ngram_weight, const Optional& ctc_next_log_probs_in, double ctc_weight, double beam_threshold) {
  check(logits_in, scores_in, finished_in, lengths_in, eos, minimum_in, maximum_in, coverage_in,
        ngram_log_probs_in, ctc_next_log_probs_in);
  const at::Tensor logits = logits_in.to(at::kFloat).contiguous(), scores = scores_in.contiguous();
  const at::Tensor finished = finished_in.contiguous(), lengths = lengths_in.contiguous();
  const Optional minimum = contiguous(minimum_in), maximum = contiguous(maximum_in);
  const Optional coverage = contiguous(coverage_in), ctc_next_log_probs = contiguous(ctc_next_log_probs_in);
  const Optional ngram_log_probs = contiguous(ngram_log_probs_in);
  const int64_t B = logits.size(0), K = logits.size(1), V = logits.size(2);
  const Inputs in{logits.const_data_ptr<float>(), scores.const_data_ptr<float>(), finished.const_data_ptr<bool>(),
                  lengths.const_data_ptr<int64_t>(), K, V, block_count(V)};
  const Options options{eos,
                        data_or_null<int64_t>(minimum),
                        data_or_null<int64_t>(maximum),
                        length_penalty,
                        float(eos_threshold),
                        data_or_null<float>(coverage),
                        data_or_null<float>(ngram_log_probs),
                        float(ngram_weight),
                        data_or_null<float>(ctc_next_log_probs),
                        float(ctc_weight),
                        float(beam_threshold)};

  std::vector<RowSummary> rows(B * K);
  std::vector<float> block_maxima(B * K * in.blocks);
  at::parallel_for(0, B * K, std::max<int64_t>(1, GRAIN / V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!in.finished[i]) rows[i] = summarise(in.logits + i * V, V, block_maxima.data() + i * in.blocks);
  });

  const at::IntArrayRef shape = scores.sizes();
  const at::Tensor scores_after = at::empty(shape, scores.options());
  const at::Tensor finished_after = at::empty(shape, finished.options());
  const at::Tensor tokens = at::empty(shape, lengths.options()), parents = at::empty(shape, lengths.options());
  const at::Tensor lengths_after = at::empty(shape, lengths.options());
  const Outputs out{scores_after.mutable_data_ptr<float>(), tokens.mutable_data_ptr<int64_t>(),
                    parents.mutable_data_ptr<int64_t>(), finished_after.mutable_data_ptr<bool>(),
                    lengths_after.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, B, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, K * V)), [&](int64_t begin, int64_t end) {
    BestCandidates best(K);
    for (int64_t b = begin; b < end; ++b) {
      best.clear();
      for (int64_t k = 0; k < K; ++k) offer_beam(in, options, rows.data(), block_maxima.data(), b, k, best);
      best.fill();
      write(in, options, b, best, out);
    }
  });
  return {scores_after, tokens, parents, finished_after, lengths_after};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("beam_topk_cpp", &beam_topk); }
