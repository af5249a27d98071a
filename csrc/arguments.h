// Checks of the ops' arguments. Messages use the names of the ops' schemas.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace las {

// `like`: the end of the message, such as " like logits".
inline void check_tensor(const char* name, const std::optional<at::Tensor>& x, at::IntArrayRef shape,
                         at::ScalarType dtype, const char* like = "") {
  TORCH_CHECK(!x || (x->sizes() == shape && x->scalar_type() == dtype), name, " must be ", shape, " ", dtype, like,
              "; got ", x->sizes(), " ", x->scalar_type());
}

inline void check_lengths(const char* name, const std::optional<at::Tensor>& x, int64_t B) {
  TORCH_CHECK(!x || (x->dim() == 1 && x->size(0) == B && x->scalar_type() == at::kLong), name, " must be (", B,
              ",) int64; got ", x->sizes(), " ", x->scalar_type());
}

// x: int64, contiguous.
inline void check_range(const char* name, const at::Tensor& x, int64_t end) {
  const int64_t* values = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); ++i)
    TORCH_CHECK(values[i] >= 0 && values[i] < end, name, " must be from 0 to ", end - 1, "; got ", values[i]);
}

inline void check_token(const char* name, int64_t token, int64_t V) {
  TORCH_CHECK(token >= 0 && token < V, name, " must be a token from 0 to ", V - 1, "; got ", token);
}

// The values of rows and arcs are not checked.
inline void check_ngram_model(const at::Tensor& rows, const at::Tensor& arcs, int64_t V, int64_t order) {
  const auto check = [](const char* name, const at::Tensor& x, int64_t width) {
    TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) == width && x.scalar_type() == at::kInt, name,
                " of the n-gram model must be (N, ", width, ") int32; got ", x.sizes(), " ", x.scalar_type());
  };
  TORCH_CHECK(V > 0 && order > 0, "the n-gram model must have at least 1 token and order 1; got ", V, " and ", order);
  check("rows", rows, 2 * ((V + 31) / 32) + 2);
  check("arcs", arcs, 2);
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& x) {
  return x ? std::optional(x->contiguous()) : std::nullopt;
}

template <class T>
const T* data_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

}  // namespace las
