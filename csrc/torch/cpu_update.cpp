// Updates on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "torch/cpu_threads.h"
#include "torch/prepared.h"

namespace dtokd::ops {
namespace {

// -> the Gram matrices of the gradients if `measure`, else nothing.
Tensor update_(int64_t prepared, const TensorList& grads, const Tensor& coefficients,
               const Tensor& skipped, const TensorList& lrs, Ints lr_of,
               std::vector<double> numbers, bool measure, std::optional<Tensor>) {
  const char* op = "update_";
  const std::shared_ptr<Prepared> plan = Registry::get().at(prepared, op);
  const int K = checked_K(coefficients.numel() / kRoles, op);
  const std::vector<Group> groups = groups_of(plan->rule, lrs, lr_of, numbers, plan->place, op);
  std::unique_ptr<GradientRows> held;
  const std::vector<UpdateRow> rows = plan->rows(grads, K, groups.size(), op, held);
  const double* table = doubles(coefficients, kRoles * K, op, "coefficients");
  const bool skips = *one_flag(skipped, op, "skipped");
  Tensor grams = measure ? new_grams(coefficients, K)
                         : torch::stable::new_empty(coefficients, {0}, ScalarType::Double);
  double* const out = measure ? static_cast<double*>(grams.mutable_data_ptr()) : nullptr;
  if (!skips) {
    for (const UpdateRow& row : rows) {
      DTOKD_CHECK(row.state_type == row.grads.type && !row.master, op,
                  ": on the CPU state is of the parameter's dtype, and there are no master copies");
    }
    cpu::update(cpu::best_kernels(), cpu_threads(), plan->rule, rows, groups, K, table, out);
  } else if (measure) {
    cpu::gram(cpu::best_kernels(), cpu_threads(), held->rows, K, out);
  }
  return grams;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtokd, CPU, m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("release", TORCH_BOX(&release));
  m.impl("update_", TORCH_BOX(&WithLists<&update_>::call));
}

}  // namespace dtokd::ops
