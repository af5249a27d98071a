// Hypotheses from back-pointers: the C++ twin of las_fast/ops/beam_backtrack.py, which says what it means.
//
// Each utterance is followed on its own, from the last step to the first, so threads share nothing. One pass reads each
// token and pointer on a hypothesis once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace {

constexpr int64_t GRAIN = 16384;  // pointers a thread should follow to be worth starting

void check(const at::Tensor& tokens, const at::Tensor& parents) {
  TORCH_CHECK(tokens.dim() == 3 && tokens.scalar_type() == at::kLong,
              "tokens must be (L, B, K) int64; got ", tokens.sizes(), " ", tokens.scalar_type());
  TORCH_CHECK(parents.sizes() == tokens.sizes() && parents.scalar_type() == at::kLong,
              "parents must be int64 of shape ", tokens.sizes(), " like tokens; got ", parents.sizes(), " ",
              parents.scalar_type());
}

// Follow the hypothesis that ends in beam k of utterance b; return its length without eos.
int64_t follow(const int64_t* tokens, const int64_t* parents, int64_t L, int64_t B, int64_t K, int64_t b, int64_t k,
               int64_t eos, int64_t* hypothesis, int64_t* path) {
  int64_t length = L;
  int64_t beam = k;
  for (int64_t t = L - 1; t >= 0; --t) {
    const int64_t at = (t * B + b) * K + beam;
    path[t] = beam;
    hypothesis[t] = tokens[at];
    if (tokens[at] == eos) length = t;
    if (t == 0) break;
    beam = parents[at];
    TORCH_CHECK(beam >= 0 && beam < K, "parents must be from 0 to ", K - 1, "; got ", beam, " at step ", t,
                " of utterance ", b);
  }
  std::fill(hypothesis + length, hypothesis + L, eos);
  return length;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> beam_backtrack(const at::Tensor& tokens_in,
                                                              const at::Tensor& parents_in, int64_t eos) {
  check(tokens_in, parents_in);
  const at::Tensor tokens = tokens_in.contiguous(), parents = parents_in.contiguous();
  const int64_t L = tokens.size(0), B = tokens.size(1), K = tokens.size(2);
  at::Tensor hypotheses = at::empty({B, K, L}, tokens.options());
  at::Tensor lengths = at::empty({B, K}, tokens.options());
  at::Tensor paths = at::empty({B, K, L}, tokens.options());
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int64_t* parent = parents.const_data_ptr<int64_t>();
  int64_t* hypothesis = hypotheses.mutable_data_ptr<int64_t>();
  int64_t* length = lengths.mutable_data_ptr<int64_t>();
  int64_t* path = paths.mutable_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, K * L));
  at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * K; row < end * K; ++row)
      length[row] =
          follow(token, parent, L, B, K, row / K, row % K, eos, hypothesis + row * L, path + row * L);
  });
  return {hypotheses, lengths, paths};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(las_fast, m) {
  m.def("beam_backtrack(Tensor tokens, Tensor parents, int eos) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("beam_backtrack", &beam_backtrack); }
