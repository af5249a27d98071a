// A bidirectional LSTM layer over utterances of different lengths, and its gradients: the C++ backend of
// las_fast/ops/bilstm.py, which defines it.
//
// Utterances are sorted from the longest to the shortest. At step s, those longer than s are the rows of the matmuls,
// in both directions: the backward direction reads frame length - 1 - s. So nothing is reversed, and no padding is
// computed. Inputs are multiplied for several steps at once, hidden states step by step, both by weights packed
// beforehand.
//
// A row's sums do not depend on the other rows (matmul.h): an utterance gets the same result alone and in any batch.
// Gradients are summed in the order of the frames, with any number of threads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "bilstm_backward.h"
#include "bilstm_forward.h"
#include "bilstm_frames.h"
#include "memory.h"

namespace {

using las::Matrix;
using las::padded;
using namespace las::bilstm;

BiLstmShape check(const at::Tensor& x, const at::Tensor& lengths, at::TensorList weights) {
  TORCH_CHECK(x.dim() == 3 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "x must be (B, T, I) float32 or bfloat16; got ", x.sizes(), " ", x.scalar_type());
  const int64_t B = x.size(0), I = x.size(2);
  las::check_lengths("lengths", lengths, B);
  TORCH_CHECK(weights.size() == 4 * DIRECTIONS, "weights must be 8 tensors; got ", weights.size());
  TORCH_CHECK(weights[1].dim() == 2, "weight_hh must be (4H, H); got ", weights[1].sizes());
  const int64_t H = weights[1].size(1);
  const std::vector<int64_t> shapes[] = {{4 * H, I}, {4 * H, H}, {4 * H}, {4 * H}};
  for (size_t i = 0; i < weights.size(); ++i)
    TORCH_CHECK(weights[i].sizes() == shapes[i % 4] && weights[i].scalar_type() == at::kFloat, "weights[", i,
                "] must be ", at::IntArrayRef(shapes[i % 4]), " float32; got ", weights[i].sizes(), " ",
                weights[i].scalar_type());
  return {B, x.size(1), I, H};
}

template <class T>
void run_forward(const BiLstmShape& shape, const at::Tensor& x, const at::Tensor& lengths, at::TensorList weights,
                 at::Tensor& output, at::Tensor& saved) {
  const ValidFrames frames(lengths, shape.B, shape.T);
  const at::Tensor inputs = x.contiguous();
  BiLstmForward<T>(shape, frames, BiLstmWeights(weights), inputs.const_data_ptr<T>(), output.mutable_data_ptr<T>(),
                   saved.mutable_data_ptr<T>()).run();  // the pointer is null if `saved` is empty
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& lengths, at::TensorList weights,
                                           bool gradients) {
  const BiLstmShape shape = check(x, lengths, weights);
  const auto [B, T, I, H] = shape;
  at::Tensor output = at::empty({B, T, DIRECTIONS * H}, x.options());
  at::Tensor saved = at::empty({gradients ? B : 0, T, DIRECTIONS, SAVED, H}, x.options());
  if (x.scalar_type() == at::kFloat) run_forward<float>(shape, x, lengths.contiguous(), weights, output, saved);
  else run_forward<at::BFloat16>(shape, x, lengths.contiguous(), weights, output, saved);
  return {output, saved};
}

template <class T>
void run_backward(const BiLstmShape& shape, const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& lengths,
                  at::TensorList list, const at::Tensor& output, const at::Tensor& saved, at::Tensor& x_gradient,
                  std::vector<at::Tensor>& gradients) {
  const ValidFrames frames(lengths, shape.B, shape.T);
  const BiLstmWeights weights(list);
  const at::Tensor output_gradient = gradient.contiguous(), inputs = x.contiguous();
  BiLstmBackward<T> job(shape, frames, weights, output_gradient.const_data_ptr<T>(), inputs.const_data_ptr<T>(),
                        output.const_data_ptr<T>(), saved.const_data_ptr<T>());
  job.backpropagate();
  if (x_gradient.numel()) job.input_gradients(x_gradient.mutable_data_ptr<T>());
  const auto rows = [&](int64_t i) {
    return Matrix<float>{gradients[i].mutable_data_ptr<float>(), gradients[i].stride(0), gradients[i].size(0)};
  };
  job.weight_gradients({{rows(0), rows(1), rows(2).data}, {rows(3), rows(4), rows(5).data}});
}

std::tuple<at::Tensor, std::vector<at::Tensor>> backward(const at::Tensor& gradient, const at::Tensor& x,
                                                         const at::Tensor& lengths, at::TensorList weights,
                                                         const at::Tensor& output, const at::Tensor& saved,
                                                         bool inputs) {
  const BiLstmShape shape = check(x, lengths, weights);
  const auto [B, T, I, H] = shape;
  for (const auto& [name, tensor] : {std::pair("gradient", gradient), std::pair("output", output)})
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef({B, T, DIRECTIONS * H}) && tensor.scalar_type() == x.scalar_type(),
                name, " must be (B, T, 2H) with B=", B, ", T=", T, ", H=", H, " and the dtype of x; got ",
                tensor.sizes(), " ", tensor.scalar_type());
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({B, T, DIRECTIONS, SAVED, H}) && saved.scalar_type() == x.scalar_type(),
              "saved must be the second result of the forward op for these inputs; got ", saved.sizes(), " ",
              saved.scalar_type());
  at::Tensor x_gradient = at::empty({inputs ? B : 0, T, I}, x.options());
  std::vector<at::Tensor> gradients;
  for (int64_t d = 0; d < DIRECTIONS; ++d)
    for (const std::vector<int64_t>& sizes : {std::vector{4 * H, padded(I)}, {4 * H, padded(H)}, {4 * H}})
      gradients.push_back(sizes.size() == 2 ? at::empty(sizes, weights[0].options())
                                            : at::zeros(sizes, weights[0].options()));
  const auto run = x.scalar_type() == at::kFloat ? run_backward<float> : run_backward<at::BFloat16>;
  run(shape, gradient, x, lengths.contiguous(), weights, output.contiguous(), saved.contiguous(), x_gradient,
      gradients);
  for (size_t i = 0; i < gradients.size(); ++i)
    if (gradients[i].dim() == 2) gradients[i] = gradients[i].narrow(1, 0, i % 3 == 0 ? I : H).contiguous();
  return {x_gradient, gradients};
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) {
  m.impl("bilstm_cpp", &forward);
  m.impl("bilstm_backward_cpp", &backward);
}
