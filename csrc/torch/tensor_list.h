// Lists of tensors as torch hands them to an operation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dtokd::ops {

// Throws a RuntimeError of this text. (torch's own macro adds the path of the source file.)
#define DTOKD_CHECK(condition, ...)                              \
  do {                                                           \
    if (!(condition)) [[unlikely]]                               \
      throw std::runtime_error(dtokd::ops::joined(__VA_ARGS__)); \
  } while (false)

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws if a call of torch's C interface failed. torch's own macro has several names.
inline void check_code(int32_t code) {
  DTOKD_CHECK(code == 0, "dtokd: a call of torch's C interface failed");
}

// A tensor of a list that outlives it; the part of torch::stable::Tensor that is needed here.
class ListedTensor {
 public:
  explicit ListedTensor(AtenTensorHandle handle) : handle_(handle) {}

  // torch's number for it: comparing these costs less than scalar types, which are looked up.
  int32_t dtype() const { return read<int32_t>(aoti_torch_get_dtype); }
  int64_t numel() const { return read<int64_t>(aoti_torch_get_numel); }
  int64_t dim() const { return read<int64_t>(aoti_torch_get_dim); }
  int32_t device_type() const { return read<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return read<int32_t>(aoti_torch_get_device_index); }
  bool is_contiguous() const { return read<bool>(aoti_torch_is_contiguous); }
  int64_t size(int64_t d) const {
    int64_t size;
    check_code(aoti_torch_get_size(handle_, d, &size));
    return size;
  }
  int64_t stride(int64_t d) const {
    int64_t stride;
    check_code(aoti_torch_get_stride(handle_, d, &stride));
    return stride;
  }
  const void* const_data_ptr() const { return read<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return read<void*>(torch_get_mutable_data_ptr); }
  torch::stable::Tensor tensor() const {
    AtenTensorHandle copy;
    check_code(aoti_torch_new_tensor_handle(handle_, &copy));
    return torch::stable::Tensor(copy);
  }

 private:
  template <class T, class Getter>
  T read(Getter getter) const {
    T value;
    check_code(getter(handle_, &value));
    return value;
  }
  AtenTensorHandle handle_;
};

// Owns the list and its tensors. A std::vector of stable tensors would allocate once more for each;
// for the hundreds of a model that costs as much as all that is checked of them.
class TensorList {
 public:
  TensorList() = default;
  explicit TensorList(StableListHandle list) {
    size_t size;
    check_code(torch_list_size(list, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      check_code(torch_list_get_item(list, i, &item));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    check_code(torch_delete_list(list));
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  ListedTensor operator[](size_t i) const { return ListedTensor(handles_[i]); }
  ListedTensor at(size_t i) const { return ListedTensor(handles_.at(i)); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// An operation that takes lists, as torch calls it: TORCH_BOX(&WithLists<&operation>::call).
template <class P>
struct Argument {
  using Raw = P;
  static P of(P argument) { return argument; }
};
template <>
struct Argument<const TensorList&> {
  using Raw = StableListHandle;
  static TensorList of(StableListHandle list) { return TensorList(list); }
};
template <auto operation>
struct WithLists;
template <class R, class... P, R (*operation)(P...)>
struct WithLists<operation> {
  static R call(typename Argument<P>::Raw... arguments) {
    return operation(Argument<P>::of(arguments)...);
  }
};

}  // namespace dtokd::ops
