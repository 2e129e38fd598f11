// Updates on a GPU, and whole steps in one launch.
#include <tuple>

#include "torch/cuda_device.h"
#include "torch/prepared.h"

namespace dtokd::ops {
namespace {

// One call's rows and hyper-parameters.
struct Call {
  const std::shared_ptr<Prepared> plan;
  const Tensor first;
  const Device device;
  const std::vector<Group> groups;
  std::unique_ptr<GradientRows> held;
  const std::vector<UpdateRow> rows;

  Call(int64_t prepared, const TensorList& grads, int K, const TensorList& lrs, const Ints& lr_of,
       const std::vector<double>& numbers, const char* op)
      : plan(Registry::get().at(prepared, op)),
        first(plan->like()),
        device(first),
        groups(groups_of(plan->rule, lrs, lr_of, numbers, device, op)),
        rows(plan->rows(grads, K, groups.size(), op, held)) {}
};

// -> the Gram matrices of the gradients from the same pass if `measure`, else nothing.
Tensor update_(int64_t prepared, const TensorList& grads, const Tensor& coefficients,
               const Tensor& skipped, const TensorList& lrs, Ints lr_of,
               std::vector<double> numbers, bool measure, std::optional<Tensor> tickets) {
  const char* op = "update_";
  const int K = checked_K(coefficients.numel() / kRoles, op);
  const Call call(prepared, grads, K, lrs, lr_of, numbers, op);
  call.device.check(coefficients, op, "coefficients");
  call.device.check(skipped, op, "skipped");
  const cuda::Direction direction{K, doubles(coefficients, kRoles * K, op, "coefficients"),
                                  one_flag(skipped, op, "skipped")};
  if (!measure) {
    const CallScratch scratch(call.first, 0, tickets, op);
    check_launch(cuda::launch_update(call.plan->rule, call.rows, call.groups, direction,
                                     scratch.pointers, call.device.stream),
                 op);
    return torch::stable::new_empty(coefficients, {0}, ScalarType::Double);
  }
  const CallScratch scratch(call.first, cuda::scratch_size(call.held->rows, K), tickets, op);
  Tensor grams = new_grams(call.first, K);
  check_launch(
      cuda::launch_gram_update(call.plan->rule, call.rows, call.groups, direction, scratch.pointers,
                               static_cast<double*>(grams.mutable_data_ptr()), call.device.stream),
      op);
  return grams;
}

// gram_balance and AdamW's update_ in one launch. -> grams, values, flags; empty tensors, with
// nothing changed, where no such launch fits.
std::tuple<Tensor, Tensor, Tensor> resident_(int64_t prepared, const TensorList& grads,
                                             const Tensor& losses, bool log_gradients, bool clamp,
                                             bool rescale_sum, double max_norm, double loss_floor,
                                             double limit, const TensorList& lrs, Ints lr_of,
                                             std::vector<double> numbers,
                                             std::optional<Tensor> tickets) {
  const char* op = "resident_";
  const int K = checked_K(losses.numel(), op);
  const Call call(prepared, grads, K, lrs, lr_of, numbers, op);
  call.device.check(losses, op, "losses");
  const RecordTensors record(new_grams(call.first, K), K);
  const CallScratch scratch(call.first, cuda::scratch_size(call.held->rows, K), tickets, op);
  const int error = call.plan->rule != kAdamW
                        ? cuda::kUnfit
                        : cuda::launch_resident_adamw(
                              call.rows, call.groups, K, doubles(losses, K, op, "losses"),
                              {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit},
                              scratch.pointers, pointers_of(record), call.device.stream);
  if (error == cuda::kUnfit) {
    const auto none = [&] { return torch::stable::new_empty(losses, {0}, ScalarType::Double); };
    return {none(), none(), none()};
  }
  check_launch(error, op);
  return {record.grams, record.values, record.flags};
}

}  // namespace

DTOKD_CUDA_OPERATIONS(m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("release", TORCH_BOX(&release));
  m.impl("update_", TORCH_BOX(&WithLists<&update_>::call));
  m.impl("resident_", TORCH_BOX(&WithLists<&resident_>::call));
}

}  // namespace dtokd::ops
