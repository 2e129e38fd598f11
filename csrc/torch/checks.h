// What the operations of every device check about tensors before they turn them into pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "dtokd/numbers.h"
#include "torch/tensor_list.h"

namespace dtokd::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensors that the kernels cannot take together, though they are no mistake of the caller: Python
// copies them or goes through the reference when it sees this text.
#define DTOKD_CHECK_FIT(condition, ...) DTOKD_CHECK(condition, "dtokd: unfit: ", __VA_ARGS__)

// dtype: torch's number for it.
inline Type type_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Type::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return Type::kFloat64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Type::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Type::kFloat16;
  DTOKD_CHECK_FIT(false, "expected float32, float64, bfloat16 or float16");
}

// Whether the elements fill one stretch of memory, each once.
template <class AnyTensor>
bool is_dense(const AnyTensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

template <class AnyTensor>
bool same_shape(const AnyTensor& a, const AnyTensor& b) {
  const int64_t dim = a.dim();
  if (dim != b.dim()) return false;
  for (int64_t d = 0; d < dim; ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// As Python prints it.
inline std::string shape_of(const ListedTensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

// Nothing else would notice: kernels walk memory, and another shape may have as many elements.
#define DTOKD_CHECK_SHAPE(tensor, like, op, name, t)                                              \
  DTOKD_CHECK(same_shape(tensor, like), op, ": ", name, "[", t, "] has shape ", shape_of(tensor), \
              ", expected ", shape_of(like),                                                      \
              " as its parameter; gradients and state must be those of the same parameters, in "  \
              "the same order")

template <class AnyTensor>
bool same_strides(const AnyTensor& a, const AnyTensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.stride(d) != b.stride(d) && a.size(d) != 1)) return false;
  }
  return true;
}

inline const double* doubles(const Tensor& tensor, int64_t n, const char* op, const char* name) {
  DTOKD_CHECK(
      tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == n,
      op, ": ", name, " must hold ", n, " contiguous float64 numbers");
  return static_cast<const double*>(tensor.const_data_ptr());
}

inline int objectives_of(const Tensor& gram, const char* op) {
  DTOKD_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) >= 1 &&
                  gram.size(0) <= kMaxObjectives,
              op, ": gram must be [K, K] with K from 1 to ", kMaxObjectives);
  return int(gram.size(0));
}

}  // namespace dtokd::ops
