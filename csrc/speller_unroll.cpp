// The whole decoder pass of training, and its gradients: the C++ twin of las_fast/ops/speller_unroll.py, which says what
// they mean.
//
// Each thread takes some utterances through all steps, side by side as rows of the products. What a product reads is
// written once, to where it is kept for the gradients: rows of operands (float32 or bfloat16) and of states (float32),
// one for each step and utterance. What tokens add to the gates of the first cell is a table.
//
// Gradients take the steps in blocks from the last one. Threads take their utterances back through a block, and leave
// the gradients of each layer's outputs; then they share out the rows of the weights' gradients, to which a block adds
// one product a layer. A sum is made in one order whoever makes it: any number of threads gives the same results.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "memory.h"
#include "speller.h"
#include "unroll_backward.h"
#include "unroll_forward.h"
#include "unroll_layout.h"

namespace {

using las::check_weights;
using las::Matrix;
using las::padded;
using las::Weights;
using las::Zeros;
using namespace las::unroll;

void check(const Weights& w, const EncoderMemory& memory, const at::Tensor& tokens, const at::Tensor& sampled,
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
  TORCH_CHECK(masks.empty() || masks.size() == w.gates.size(), "masks must be one a cell or none; got ", masks.size());
  for (size_t i = 0; i < masks.size(); ++i)
    TORCH_CHECK(masks[i].sizes() == at::IntArrayRef({B, w.gate_biases[i].numel() / 4}) &&
                    masks[i].scalar_type() == at::kFloat,
                "masks must be (B, H) float32 of each cell; got ", masks[i].sizes(), " ", masks[i].scalar_type());
  const int64_t *token = tokens.const_data_ptr<int64_t>(), V = w.embedding.size(0);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    TORCH_CHECK(token[i] >= 0 && token[i] < V, "tokens must be from 0 to ", V - 1, "; got ", token[i]);
}

std::vector<at::Tensor> contiguous(at::TensorList list) {
  std::vector<at::Tensor> all;
  for (const at::Tensor& x : list) all.push_back(x.contiguous());
  return all;
}

using Unrolled = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
Unrolled unroll(const Weights& w, const EncoderMemory& memory, const at::Tensor& tokens, const at::Tensor& sampled,
                const std::vector<at::Tensor>& masks, bool gradients) {
  const Shape shape(w, memory.keys, memory.values, tokens);
  const Places places(shape);
  const int64_t steps = gradients ? shape.U : std::min<int64_t>(2, shape.U);
  const at::Tensor logits = large<float>({shape.B, shape.U, shape.V});
  const at::Tensor attention = large<float>({shape.B, shape.U, shape.T}), read = at::empty_like(tokens);
  const at::Tensor operands = large<T>({steps, shape.B, places.operands});
  const at::Tensor states = large<float>({steps, shape.B, places.states});
  las::Memory<uint8_t> packed;
  const auto layers = las::shelved(packed, [&](las::Shelf& shelf) { return Layers<T>(w, shape, shelf); });
  const Zeros<> token_gates = token_gates_of<T>(w, shape);
  Forward<T>{shape,
             places,
             layers,
             token_gates,
             memory,
             masks,
             {operands.mutable_data_ptr<T>(), states.mutable_data_ptr<float>(), places.operands, places.states,
              shape.B, steps},
             tokens.const_data_ptr<int64_t>(),
             sampled.const_data_ptr<bool>(),
             logits.mutable_data_ptr<float>(),
             attention.mutable_data_ptr<float>(),
             read.mutable_data_ptr<int64_t>()}
      .run();
  return {logits, attention, read, operands, states};
}

Unrolled forward(at::TensorList weights, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                 const at::Tensor& tokens, const at::Tensor& sampled, at::TensorList masks, bool bf16, bool gradients) {
  const Weights w(weights);
  const EncoderMemory memory{keys.contiguous(), values.contiguous(), lengths.contiguous()};
  const at::Tensor before = tokens.contiguous(), own = sampled.contiguous();
  const std::vector<at::Tensor> dropped = contiguous(masks);
  check(w, memory, before, own, dropped);
  if (bf16) return unroll<at::BFloat16>(w, memory, before, own, dropped, gradients);
  return unroll<float>(w, memory, before, own, dropped, gradients);
}

using Gradients = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor>;

struct Saved {
  at::Tensor attention, read, operands, states;
};

// The gradients of weights, their rows padded to whole panels, those of the first cell behind the token's part.
struct Found {
  at::Tensor embedding, query, project;
  std::vector<at::Tensor> gates;

  explicit Found(const Shape& s)
      : embedding(large<float>({s.V, padded(s.M)})), query(large<float>({s.D, padded(s.H.back())})),
        project(large<float>({s.M, padded(s.spoken())})) {
    for (int64_t i = 0; i < s.cells(); ++i)
      gates.push_back(large<float>({4 * s.H[i], (i == 0 ? s.M : 0) + padded(s.below(i) + s.H[i])}));
  }
  static Matrix<float> matrix(const at::Tensor& x, int64_t from = 0) {
    return {x.mutable_data_ptr<float>() + from, x.size(1), x.size(0)};
  }
  std::vector<Gradient> wanted(const Shape& s, const Places& p) const {
    std::vector<Gradient> all{{p.logits_gradient, s.V, p.features, s.M, matrix(embedding)},
                              {p.query_gradient, s.D, p.spoken, s.H.back(), matrix(query)},
                              {p.projected_gradient, s.M, p.spoken, s.spoken(), matrix(project)}};
    for (int64_t i = 0; i < s.cells(); ++i)
      all.push_back({p.gate_gradients[i], 4 * s.H[i], p.input[i], s.below(i) + s.H[i],
                     matrix(gates[i], i == 0 ? s.M : 0)});
    return all;
  }
};

at::Tensor narrowed(const at::Tensor& x, int64_t columns) { return x.narrow(1, 0, columns).contiguous(); }

at::Tensor vector_of(const std::vector<float>& sums, int64_t from, int64_t count) {
  const at::Tensor x = at::empty({count}, at::kFloat);
  std::copy_n(sums.begin() + from, count, x.mutable_data_ptr<float>());
  return x;
}

template <class T>
Gradients gradients_of(const Weights& w, const EncoderMemory& memory, const Shape& shape, const std::vector<at::Tensor>& masks,
                       const Saved& saved, const float* logits_gradient, const float* weights_gradient) {
  const Places places(shape);
  const Transposed<T> layers(w, shape);
  Backward<T> job(shape, places, layers, memory, masks,
                  {saved.operands.const_data_ptr<T>(), saved.states.const_data_ptr<float>(), places.operands,
                   places.states, shape.B, shape.U},
                  {saved.attention.const_data_ptr<float>(), logits_gradient, weights_gradient,
                   saved.read.const_data_ptr<int64_t>()});
  const Found found(shape);
  job.run(found.wanted(shape, places));
  job.through_tokens(w, Found::matrix(found.gates[0]), Found::matrix(found.embedding));
  const at::Tensor keys = large<float>(memory.keys.sizes()), values = large<float>(memory.values.sizes());
  job.memory_gradients(keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>());
  std::vector<at::Tensor> all{narrowed(found.embedding, shape.M),
                              narrowed(found.query, shape.H.back()),
                              vector_of(job.sums, places.query_gradient, shape.D),
                              narrowed(found.project, shape.spoken()),
                              vector_of(job.sums, places.projected_gradient, shape.M),
                              vector_of(job.sums, places.logits_gradient, shape.V)};
  for (int64_t i = 0; i < shape.cells(); ++i) {
    all.push_back(narrowed(found.gates[i], w.gates[i].size(1)));
    all.push_back(vector_of(job.sums, places.gate_gradients[i], 4 * shape.H[i]));
  }
  return {all, keys, values};
}

void check_like(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(!x || (x->sizes() == shape && x->scalar_type() == dtype && x->is_contiguous()), name, " must be ", shape,
              " ", dtype, "; got ", x->sizes(), " ", x->scalar_type());
}

Gradients backward(const std::optional<at::Tensor>& logits_gradient, const std::optional<at::Tensor>& weights_gradient,
                   at::TensorList weights, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& lengths,
                   at::TensorList masks, const at::Tensor& attention, const at::Tensor& read,
                   const at::Tensor& operands, const at::Tensor& states, bool bf16) {
  const Weights w(weights);
  const EncoderMemory memory{keys.contiguous(), values.contiguous(), lengths.contiguous()};
  const std::vector<at::Tensor> dropped = contiguous(masks);
  check(w, memory, read, at::empty(read.sizes(), at::kBool), dropped);
  const Shape shape(w, keys, values, read);
  const Places places(shape);
  const auto given = [](const std::optional<at::Tensor>& x) { return x ? std::optional(x->contiguous()) : x; };
  const auto of_logits = given(logits_gradient), of_weights = given(weights_gradient);
  check_like("logits_gradient", of_logits, {shape.B, shape.U, shape.V}, at::kFloat);
  check_like("weights_gradient", of_weights, {shape.B, shape.U, shape.T}, at::kFloat);
  check_like("attention", attention, {shape.B, shape.U, shape.T}, at::kFloat);
  check_like("operands", operands, {shape.U, shape.B, places.operands}, bf16 ? at::kBFloat16 : at::kFloat);
  check_like("states", states, {shape.U, shape.B, places.states}, at::kFloat);
  const Saved saved{attention, read, operands, states};
  const auto run = bf16 ? &gradients_of<at::BFloat16> : &gradients_of<float>;
  return run(w, memory, shape, dropped, saved, data<float>(of_logits), data<float>(of_weights));
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("speller_unroll_cpp", &forward);
  m.impl("speller_unroll_backward_cpp", &backward);
}
