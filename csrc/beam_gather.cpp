// Recurrent states reordered by back-pointers: the C++ backend of las_fast/ops/beam_gather.py, which defines it.
//
// Rows are copied as bytes, whatever the dtype. Each thread copies all states of some hypotheses.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t GRAIN = 1 << 16;  // bytes per thread, at least

// Source and destination of the rows of a state; strides and row size in bytes.
struct StateRows {
  const char* from;
  char* to;
  int64_t utterance_stride, beam_stride, row;
};

// Hypotheses per thread, at least.
int64_t grain(const std::vector<StateRows>& rows) {
  int64_t bytes = 1;
  for (const StateRows& x : rows) bytes += x.row;
  return std::max<int64_t>(1, GRAIN / bytes);
}

void check(at::TensorList states, const at::Tensor& parents) {
  TORCH_CHECK(parents.dim() == 2 && parents.scalar_type() == at::kLong, "parents must be (B, K) int64; got ",
              parents.sizes(), " ", parents.scalar_type());
  for (size_t i = 0; i < states.size(); ++i)
    TORCH_CHECK(states[i].dim() == 3 && states[i].size(0) == parents.size(0) && states[i].size(1) == parents.size(1) &&
                    states[i].device() == parents.device(),
                "states[", i, "] must be (", parents.size(0), ", ", parents.size(1), ", N) on ", parents.device(),
                " like parents; got ", states[i].sizes(), " on ", states[i].device());
}

std::vector<at::Tensor> beam_gather(at::TensorList states, const at::Tensor& parents_in) {
  check(states, parents_in);
  const at::Tensor parents = parents_in.contiguous();
  const int64_t B = parents.size(0), K = parents.size(1);
  std::vector<at::Tensor> sources, gathered;
  std::vector<StateRows> rows;
  for (const at::Tensor& state : states) {
    const at::Tensor& x = sources.emplace_back(state.stride(2) == 1 ? state : state.contiguous());
    at::Tensor& y = gathered.emplace_back(at::empty(x.sizes(), x.options()));
    if (x.numel() == 0) continue;  // its pointers may be null, which memcpy does not allow
    const int64_t size = x.element_size();
    rows.push_back({static_cast<const char*>(x.const_data_ptr()), static_cast<char*>(y.mutable_data_ptr()),
                    x.stride(0) * size, x.stride(1) * size, x.size(2) * size});
  }
  const int64_t* parent = parents.const_data_ptr<int64_t>();
  at::parallel_for(0, B * K, grain(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      TORCH_CHECK(parent[i] >= 0 && parent[i] < K, "parents must be from 0 to ", K - 1, "; got ", parent[i],
                  " in utterance ", i / K);
    for (const StateRows& x : rows)
      for (int64_t i = begin; i < end; ++i)
        std::memcpy(x.to + i * x.row, x.from + i / K * x.utterance_stride + parent[i] * x.beam_stride, x.row);
  });
  return gathered;
}

}  // namespace

TORCH_LIBRARY_IMPL(las_fast, CPU, m) { m.impl("beam_gather_cpp", &beam_gather); }
