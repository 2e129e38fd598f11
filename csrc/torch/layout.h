// Rows of tensors, checked before they are turned into pointers: the same for every device.
//
// Which dtypes, layouts and states a backend takes Python has decided when it made the plan
// (dtokd_kernels/plan.py); what is refused here is a mistake.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "dtokd/rows.h"
#include "torch/tensor_list.h"

namespace dtokd::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// dtype: torch's number for it.
inline Type type_of(int32_t dtype, const char* op) {
  if (dtype == aoti_torch_dtype_float32()) return Type::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return Type::kFloat64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Type::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Type::kFloat16;
  DTOKD_CHECK(false, op, ": expected float32, float64, bfloat16 or float16");
}

// Whether the elements fill one stretch of memory, each once.
inline bool is_dense(const ListedTensor& tensor) {
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

inline bool same_shape(const ListedTensor& a, const ListedTensor& b) {
  const int64_t dim = a.dim();
  if (dim != b.dim()) return false;
  for (int64_t d = 0; d < dim; ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline bool same_strides(const ListedTensor& a, const ListedTensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.stride(d) != b.stride(d) && a.size(d) != 1) return false;
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

inline const double* doubles(const Tensor& tensor, int64_t n, const char* op, const char* name) {
  DTOKD_CHECK(
      tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == n,
      op, ": ", name, " must hold ", n, " contiguous float64 numbers");
  return static_cast<const double*>(tensor.const_data_ptr());
}

inline const bool* one_flag(const Tensor& flag, const char* op, const char* name) {
  DTOKD_CHECK(flag.scalar_type() == ScalarType::Bool && flag.numel() == 1, op, ": ", name,
              " must be one bool");
  return static_cast<const bool*>(flag.const_data_ptr());
}

inline int checked_K(int64_t K, const char* op) {
  DTOKD_CHECK(K >= 1 && K <= kMaxObjectives, op, ": ", K, " objectives, expected 1 to ",
              kMaxObjectives);
  return int(K);
}

// Where all tensors of a call are.
struct Place {
  int32_t type, index;

  explicit Place(const ListedTensor& like) : type(like.device_type()), index(like.device_index()) {}
  explicit Place(const Tensor& like) : Place(ListedTensor(like.get())) {}
  void check(const ListedTensor& tensor, const char* op, const char* name) const {
    DTOKD_CHECK(tensor.device_type() == type && tensor.device_index() == index, op, ": ", name,
                " must be on the device of the first tensor, number ", index);
  }
  void check(const Tensor& tensor, const char* op, const char* name) const {
    check(ListedTensor(tensor.get()), op, name);
  }
};

// What the tensors of one row have in common: they lie in memory element by element alike.
struct Like {
  ListedTensor tensor;
  int64_t size;
  int32_t dtype;
  bool contiguous;

  explicit Like(ListedTensor tensor)
      : tensor(tensor),
        size(tensor.numel()),
        dtype(tensor.dtype()),
        contiguous(tensor.is_contiguous()) {}
  bool is_dense() const { return contiguous || ops::is_dense(tensor); }
  bool has_layout_of(const ListedTensor& other) const {
    return contiguous ? other.is_contiguous() : same_strides(other, tensor) && is_dense();
  }
  // Nothing else would notice: kernels walk memory, and another shape may have as many elements.
  void check_shape(const ListedTensor& other, const char* op, const char* name, size_t t) const {
    DTOKD_CHECK(same_shape(other, tensor), op, ": ", name, "[", t, "] has shape ", shape_of(other),
                ", expected ", shape_of(tensor),
                " as its parameter; gradients and state must be those of the same parameters, in "
                "the same order");
  }
};

// The gradients of T rows. Those that are laid out otherwise than their row, or have gaps, are
// copied; the copies live as long as this.
class GradientRows {
 public:
  std::vector<GradientRow> rows;

  // grads: row by row, of each row those of its objectives. reach: bit i of a row's number is set
  // if objective i has a gradient there; role: of each row. likes: what rows must be laid out as;
  // null: as the first gradient.
  GradientRows(const TensorList& grads, const Ints& reach, const Ints& role, int K,
               const std::vector<Like>* likes, const Place& place, const char* op) {
    DTOKD_CHECK(reach.size() == role.size() && (!likes || likes->size() == reach.size()), op,
                ": reach and role must have one number for each row");
    rows.reserve(reach.size());
    size_t next = 0;
    for (size_t t = 0; t < reach.size(); ++t) {
      DTOKD_CHECK(reach[t] >= 1 && reach[t] >> K == 0 && role[t] >= 0 && role[t] < kRoles, op,
                  ": reach[", t, "] is ", reach[t], " and role[", t, "] is ", role[t],
                  ", expected bits of ", K, " objectives and 0 to ", kRoles - 1);
      const size_t there = size_t(__builtin_popcountll(reach[t]));
      DTOKD_CHECK(next + there <= grads.size(), op, ": grads has ", grads.size(),
                  " tensors, expected more, as reach says");
      if (likes) {
        add((*likes)[t], grads, next, reach[t], int(role[t]), t, place, op);
      } else {
        Like first(grads[next]);
        if (!first.is_dense()) {
          copies_.push_back(torch::stable::contiguous(grads[next].tensor()));
          first = Like(ListedTensor(copies_.back().get()));
        }
        add(first, grads, next, reach[t], int(role[t]), t, place, op);
      }
      next += there;
    }
    DTOKD_CHECK(next == grads.size(), op, ": grads has ", grads.size(), " tensors, expected ", next,
                ", as reach says");
  }

 private:
  void add(const Like& like, const TensorList& grads, size_t next, int64_t reach, int role,
           size_t t, const Place& place, const char* op) {
    GradientRow row{type_of(like.dtype, op), role, like.size, {}};
    for (int i = 0; reach >> i; ++i) {
      if (!(reach >> i & 1)) continue;
      const ListedTensor g = grads[next++];
      place.check(g, op, "grads");
      DTOKD_CHECK(g.dtype() == like.dtype, op, ": grads of row ", t,
                  " have another dtype than their parameter");
      like.check_shape(g, op, "grads", t);
      if (like.has_layout_of(g)) {
        row.of[i] = g.const_data_ptr();
      } else {
        Tensor copy = torch::stable::empty_like(like.tensor.tensor());
        torch::stable::copy_(copy, g.tensor());
        row.of[i] = copy.const_data_ptr();
        copies_.push_back(std::move(copy));
      }
    }
    rows.push_back(row);
  }

  std::vector<Tensor> copies_;
};

// The record of a balance: Gram matrices [kRoles, K, K], values and flags as write_record lays
// them out.
struct RecordTensors {
  Tensor grams, values, flags;

  RecordTensors(const Tensor& grams, int K)
      : grams(grams),
        values(torch::stable::new_empty(grams, {values_size(K)}, ScalarType::Double)),
        flags(torch::stable::new_empty(grams, {2}, ScalarType::Bool)) {}
  double* grams_pointer() const { return static_cast<double*>(grams.mutable_data_ptr()); }
  double* values_pointer() const { return static_cast<double*>(values.mutable_data_ptr()); }
  bool* flags_pointer() const { return static_cast<bool*>(flags.mutable_data_ptr()); }
};

inline Tensor new_grams(const Tensor& like, int K) {
  return torch::stable::new_empty(like, {kRoles, K, K}, ScalarType::Double);
}

}  // namespace dtokd::ops
