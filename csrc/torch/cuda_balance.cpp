// Weights and balance on a GPU.
#include <tuple>

#include "torch/cuda_device.h"

namespace dtokd::ops {
namespace {

Tensor min_norm_weights(const Tensor& gram, bool clamp, const std::optional<Tensor>& present) {
  const char* op = "min_norm_weights";
  const int K = checked_K(gram.size(0), op);
  const Device device(gram);
  const bool* flags = nullptr;
  if (present) {
    device.check(*present, op, "present");
    DTOKD_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == K &&
                    present->is_contiguous(),
                op, ": present must be [K] bool");
    flags = static_cast<const bool*>(present->const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(gram, {K}, ScalarType::Double);
  check_launch(
      cuda::launch_min_norm_weights(doubles(gram, K * K, op, "gram"), K, flags, clamp,
                                    static_cast<double*>(out.mutable_data_ptr()), device.stream),
      op);
  return out;
}

std::tuple<Tensor, Tensor> balance(const Tensor& grams, const Tensor& losses,
                                   const std::optional<Tensor>& weights, bool log_gradients,
                                   bool clamp, bool rescale_sum, double max_norm, double loss_floor,
                                   double limit) {
  const char* op = "balance";
  const int K = checked_K(losses.numel(), op);
  doubles(grams, kRoles * K * K, op, "grams");
  const Device device(grams);
  device.check(losses, op, "losses");
  if (weights) device.check(*weights, op, "weights");
  const RecordTensors record(grams, K);
  check_launch(
      cuda::launch_balance(K, doubles(losses, K, op, "losses"),
                           weights ? doubles(*weights, K, op, "weights") : nullptr,
                           {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit},
                           pointers_of(record), device.stream),
      op);
  return {record.values, record.flags};
}

std::tuple<Tensor, Tensor, Tensor> gram_balance(const TensorList& grads, Ints reach, Ints role,
                                                const Tensor& losses, bool log_gradients,
                                                bool clamp, bool rescale_sum, double max_norm,
                                                double loss_floor, double limit,
                                                std::optional<Tensor> tickets) {
  const char* op = "gram_balance";
  const int K = checked_K(losses.numel(), op);
  const Tensor first = grads.at(0).tensor();
  const Device device(first);
  device.check(losses, op, "losses");
  const GradientRows gradients(grads, reach, role, K, nullptr, device, op);
  const CallScratch scratch(first, cuda::scratch_size(gradients.rows, K), tickets, op);
  const RecordTensors record(new_grams(first, K), K);
  check_launch(
      cuda::launch_gram_balance(gradients.rows, K, doubles(losses, K, op, "losses"),
                                {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit},
                                scratch.pointers, pointers_of(record), device.stream),
      op);
  return {record.grams, record.values, record.flags};
}

}  // namespace

DTOKD_CUDA_OPERATIONS(m) {
  m.impl("min_norm_weights", TORCH_BOX(&min_norm_weights));
  m.impl("balance", TORCH_BOX(&balance));
  m.impl("gram_balance", TORCH_BOX(&WithLists<&gram_balance>::call));
}

}  // namespace dtokd::ops
