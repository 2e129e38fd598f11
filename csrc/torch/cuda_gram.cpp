// Gram matrices and combinations of gradients on a GPU.
#include "torch/cuda_device.h"

namespace dtokd::ops {
namespace {

Tensor gram(const TensorList& grads, Ints reach, Ints role, int64_t objectives,
            std::optional<Tensor> tickets) {
  const char* op = "gram";
  const int K = checked_K(objectives, op);
  const Tensor first = grads.at(0).tensor();
  const Device device(first);
  const GradientRows gradients(grads, reach, role, K, nullptr, device, op);
  const CallScratch scratch(first, cuda::scratch_size(gradients.rows, K), tickets, op);
  Tensor grams = new_grams(first, K);
  check_launch(cuda::launch_gram(gradients.rows, K, scratch.pointers,
                                 static_cast<double*>(grams.mutable_data_ptr()), device.stream),
               op);
  return grams;
}

void combine_(const TensorList& out, const TensorList& grads, Ints reach, Ints role,
              const Tensor& coefficients) {
  const char* op = "combine_";
  if (out.empty()) return;
  const int K = checked_K(coefficients.numel() / kRoles, op);
  const Device device(out[0].tensor());
  device.check(coefficients, op, "coefficients");
  std::vector<Like> likes;
  std::vector<void*> targets;
  for (size_t t = 0; t < out.size(); ++t) {
    device.check(out[t], op, "out");
    likes.emplace_back(out[t]);
    DTOKD_CHECK(likes[t].is_dense(), op, ": out[", t, "] has gaps in memory");
    targets.push_back(out[t].mutable_data_ptr());
  }
  const GradientRows gradients(grads, reach, role, K, &likes, device, op);
  const double* table = doubles(coefficients, kRoles * K, op, "coefficients");
  check_launch(cuda::launch_combine(gradients.rows, targets, {K, table, nullptr}, device.stream),
               op);
}

}  // namespace

DTOKD_CUDA_OPERATIONS(m) {
  m.impl("gram", TORCH_BOX(&WithLists<&gram>::call));
  m.impl("combine_", TORCH_BOX(&WithLists<&combine_>::call));
}

}  // namespace dtokd::ops
