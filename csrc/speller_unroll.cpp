// The whole decoder pass of training and its gradients: the C++ backend of las_fast/ops/speller_unroll.py, which
// defines them.
//
// Each thread takes some utterances through all steps, side by side as rows of the matmuls. Threads share the matmuls
// of large cells (team.h). The operands of the matmuls (float32 or bfloat16) and the states (float32) are written once,
// to the rows that are saved for the gradients: one row per step and utterance. The contribution of each token to the
// gates of the first cell is computed beforehand.
//
// The backward pass takes the steps in blocks, from the last to the first. Threads take their utterances back through a
// block and store the gradients of each layer's outputs. Then they share the rows of the weights' gradients, to which a
// block adds one matmul per layer. The order of each sum does not depend on the threads: the results are the same with
// any number of them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "memory.h"
#include "speller.h"
#include "unroll_backward.h"
#include "unroll_forward.h"
#include "unroll_layout.h"

namespace {

using las::data_or_null;
using las::Matrix;
using las::padded;
using las::SpellerWeights;
using las::ZeroedBuffer;
using namespace las::unroll;

void check(const SpellerWeights& w, const EncoderMemory& memory, const at::Tensor& tokens, const at::Tensor& sampled,
           const std::vector<at::Tensor>& masks) {
  const auto [keys, values, lengths] = memory;
  las::check_memory(keys, values, lengths);
  las::check_weights(w, keys.size(2), values.size(2));
  const int64_t B = keys.size(0);
  TORCH_CHECK(tokens.dim() == 2 && tokens.size(0) == B && tokens.size(1) > 0 && tokens.scalar_type() == at::kLong,
              "tokens must be (B, U) int64 with B=", B, " and U at least 1; got ", tokens.sizes(), " ",
              tokens.scalar_type());
  TORCH_CHECK(sampled.sizes() == tokens.sizes() && sampled.scalar_type() == at::kBool, "sampled must be ",
              tokens.sizes(), " bool; got ", sampled.sizes(), " ", sampled.scalar_type());
  TORCH_CHECK(masks.empty() || masks.size() == w.gates.size(), "masks must be one per cell or none; got ",
              masks.size());
  for (size_t i = 0; i < masks.size(); ++i)
    TORCH_CHECK(masks[i].sizes() == at::IntArrayRef({B, w.gate_biases[i].numel() / 4}) &&
                    masks[i].scalar_type() == at::kFloat,
                "masks must be (B, H) float32 of each cell; got ", masks[i].sizes(), " ", masks[i].scalar_type());
  las::check_range("tokens", tokens, w.embedding.size(0));
}

std::vector<at::Tensor> contiguous(at::TensorList list) {
  std::vector<at::Tensor> all;
  for (const at::Tensor& x : list) all.push_back(x.contiguous());
  return all;
}

using Unrolled = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
Unrolled unroll(const SpellerWeights& w, const EncoderMemory& memory, const at::Tensor& tokens,
                const at::Tensor& sampled, const std::vector<at::Tensor>& masks, bool gradients) {
  const UnrollShape shape(w, memory.keys, memory.values, tokens);
  const RowLayout layout(shape);
  const int64_t steps = gradients ? shape.U : std::min<int64_t>(2, shape.U);
  const at::Tensor logits = empty_on_huge_pages<float>({shape.B, shape.U, shape.V});
  const at::Tensor attention = empty_on_huge_pages<float>({shape.B, shape.U, shape.T});
  const at::Tensor tokens_read = at::empty_like(tokens);
  const at::Tensor operands = empty_on_huge_pages<T>({steps, shape.B, layout.operands});
  const at::Tensor states = empty_on_huge_pages<float>({steps, shape.B, layout.states});
  las::AlignedArray<uint8_t> packed;
  const auto pack = [&](las::PackBuffer& buffer) { return PackedLayers<T>(w, shape, buffer); };
  const auto layers = las::packed_in(packed, pack);
  const ZeroedBuffer<> token_gates = compute_token_gates<T>(w, shape);
  UnrollForward<T>{shape,
                   layout,
                   layers,
                   token_gates,
                   memory,
                   masks,
                   {operands.mutable_data_ptr<T>(), states.mutable_data_ptr<float>(), layout.operands, layout.states,
                    shape.B, steps},
                   tokens.const_data_ptr<int64_t>(),
                   sampled.const_data_ptr<bool>(),
                   logits.mutable_data_ptr<float>(),
                   attention.mutable_data_ptr<float>(),
                   tokens_read.mutable_data_ptr<int64_t>()}
      .run();
  return {logits, attention, tokens_read, operands, states};
}

Unrolled forward(at::TensorList weights, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                 const at::Tensor& tokens, const at::Tensor& sampled, at::TensorList masks, bool bf16, bool gradients) {
  const SpellerWeights w(weights);
  const EncoderMemory memory{keys.contiguous(), values.contiguous(), lengths.contiguous()};
  const at::Tensor true_tokens = tokens.contiguous(), is_sampled = sampled.contiguous();
  const std::vector<at::Tensor> dropout = contiguous(masks);
  check(w, memory, true_tokens, is_sampled, dropout);
  if (bf16) return unroll<at::BFloat16>(w, memory, true_tokens, is_sampled, dropout, gradients);
  return unroll<float>(w, memory, true_tokens, is_sampled, dropout, gradients);
}

using UnrollGradients = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor>;

struct SavedTensors {
  at::Tensor attention, tokens_read, operands, states;
};

// The gradients of the weights, (outputs, padded inputs). In those of the first cell's gates, the columns of the
// token's embedding come first.
struct WeightGradients {
  at::Tensor embedding, query, project;
  std::vector<at::Tensor> gates;

  explicit WeightGradients(const UnrollShape& s)
      : embedding(empty_on_huge_pages<float>({s.V, padded(s.M)})),
        query(empty_on_huge_pages<float>({s.D, padded(s.H.back())})),
        project(empty_on_huge_pages<float>({s.M, padded(s.readout())})) {
    for (int64_t i = 0; i < s.cells(); ++i)
      gates.push_back(empty_on_huge_pages<float>({4 * s.H[i], (i == 0 ? s.M : 0) + padded(s.input_size(i) + s.H[i])}));
  }
  static Matrix<float> matrix(const at::Tensor& x, int64_t from = 0) {
    return {x.mutable_data_ptr<float>() + from, x.size(1), x.size(0)};
  }
  std::vector<WeightGradient> list(const UnrollShape& s, const RowLayout& layout) const {
    std::vector<WeightGradient> all{{layout.logits_gradient, s.V, layout.features, s.M, matrix(embedding)},
                                    {layout.query_gradient, s.D, layout.readout, s.H.back(), matrix(query)},
                                    {layout.projected_gradient, s.M, layout.readout, s.readout(), matrix(project)}};
    for (int64_t i = 0; i < s.cells(); ++i)
      all.push_back({layout.gate_gradients[i], 4 * s.H[i], layout.input[i], s.input_size(i) + s.H[i],
                     matrix(gates[i], i == 0 ? s.M : 0)});
    return all;
  }
};

at::Tensor first_columns(const at::Tensor& x, int64_t columns) { return x.narrow(1, 0, columns).contiguous(); }

at::Tensor to_tensor(const std::vector<float>& sums, int64_t from, int64_t count) {
  const at::Tensor x = at::empty({count}, at::kFloat);
  std::copy_n(sums.begin() + from, count, x.mutable_data_ptr<float>());
  return x;
}

template <class T>
UnrollGradients gradients_of(const SpellerWeights& w, const EncoderMemory& memory, const UnrollShape& shape,
                             const std::vector<at::Tensor>& masks, const SavedTensors& saved,
                             const float* logits_gradient, const float* attention_gradient) {
  const RowLayout layout(shape);
  const TransposedLayers<T> layers(w, shape);
  UnrollBackward<T> job(shape, layout, layers, memory, masks,
                        {saved.operands.const_data_ptr<T>(), saved.states.const_data_ptr<float>(), layout.operands,
                         layout.states, shape.B, shape.U},
                        {saved.attention.const_data_ptr<float>(), logits_gradient, attention_gradient,
                         saved.tokens_read.const_data_ptr<int64_t>()});
  const WeightGradients gradients(shape);
  job.run(gradients.list(shape, layout));
  job.token_gates_backward(w, WeightGradients::matrix(gradients.gates[0]),
                           WeightGradients::matrix(gradients.embedding));
  const at::Tensor keys = empty_on_huge_pages<float>(memory.keys.sizes());
  const at::Tensor values = empty_on_huge_pages<float>(memory.values.sizes());
  job.memory_gradients(keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>());
  std::vector<at::Tensor> all{first_columns(gradients.embedding, shape.M),
                              first_columns(gradients.query, shape.H.back()),
                              to_tensor(job.sums, layout.query_gradient, shape.D),
                              first_columns(gradients.project, shape.readout()),
                              to_tensor(job.sums, layout.projected_gradient, shape.M),
                              to_tensor(job.sums, layout.logits_gradient, shape.V)};
  for (int64_t i = 0; i < shape.cells(); ++i) {
    all.push_back(first_columns(gradients.gates[i], w.gates[i].size(1)));
    all.push_back(to_tensor(job.sums, layout.gate_gradients[i], 4 * shape.H[i]));
  }
  return {all, keys, values};
}

void check_like(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef shape, at::ScalarType dtype) {
  las::check_tensor(name, x, shape, dtype);
  TORCH_CHECK(!x || x->is_contiguous(), name, " must be contiguous");
}

UnrollGradients backward(const std::optional<at::Tensor>& logits_gradient,
                         const std::optional<at::Tensor>& attention_gradient, at::TensorList weights,
                         const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                         at::TensorList masks, const at::Tensor& attention, const at::Tensor& tokens_read,
                         const at::Tensor& operands, const at::Tensor& states, bool bf16) {
  const SpellerWeights w(weights);
  const EncoderMemory memory{keys.contiguous(), values.contiguous(), lengths.contiguous()};
  const at::Tensor read = tokens_read.contiguous();
  const std::vector<at::Tensor> dropout = contiguous(masks);
  check(w, memory, read, at::empty(read.sizes(), at::kBool), dropout);
  const UnrollShape shape(w, keys, values, read);
  const RowLayout layout(shape);
  const auto dense_logits = las::contiguous(logits_gradient), dense_attention = las::contiguous(attention_gradient);
  check_like("logits_gradient", dense_logits, {shape.B, shape.U, shape.V}, at::kFloat);
  check_like("attention_gradient", dense_attention, {shape.B, shape.U, shape.T}, at::kFloat);
  check_like("attention", attention, {shape.B, shape.U, shape.T}, at::kFloat);
  check_like("operands", operands, {shape.U, shape.B, layout.operands}, bf16 ? at::kBFloat16 : at::kFloat);
  check_like("states", states, {shape.U, shape.B, layout.states}, at::kFloat);
  const SavedTensors saved{attention, read, operands, states};
  const auto run = bf16 ? &gradients_of<at::BFloat16> : &gradients_of<float>;
  return run(w, memory, shape, dropout, saved, data_or_null<float>(dense_logits), data_or_null<float>(dense_attention));
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("speller_unroll_cpp", &forward);
  m.impl("speller_unroll_backward_cpp", &backward);
}
