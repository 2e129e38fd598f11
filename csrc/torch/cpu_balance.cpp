// Weights and balance on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/lists.h"
#include "torch/cpu_threads.h"
#include "torch/layout.h"

namespace dtokd::ops {
namespace {

Tensor min_norm_weights(const Tensor& gram, bool clamp, const std::optional<Tensor>& present) {
  const char* op = "min_norm_weights";
  const int K = checked_K(gram.size(0), op);
  unsigned mask = (1u << K) - 1;
  if (present) {
    DTOKD_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == K &&
                    present->is_contiguous(),
                op, ": present must be [K] bool");
    const bool* flags = static_cast<const bool*>(present->const_data_ptr());
    for (int i = 0; i < K; ++i) {
      if (!flags[i]) mask &= ~(1u << i);
    }
  }
  Tensor out = torch::stable::new_empty(gram, {K}, ScalarType::Double);
  dtokd::min_norm_weights(doubles(gram, K * K, op, "gram"), K, mask, clamp,
                          static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

// weights: [K], or null for DTO-KD's.
void finish(const RecordTensors& record, const double* losses, const double* weights, int K,
            const BalanceOptions& options) {
  const double* grams[kRoles];
  for (int role = 0; role < kRoles; ++role) grams[role] = record.grams_pointer() + role * K * K;
  double chosen[kMaxObjectives];
  if (!weights) dto_weights(grams[0], losses, K, options, chosen);
  Balance result;
  finish_balance(grams, losses, weights ? weights : chosen, K, options, result);
  write_record(result, K, record.values_pointer(), record.flags_pointer());
}

std::tuple<Tensor, Tensor> balance(const Tensor& grams, const Tensor& losses,
                                   const std::optional<Tensor>& weights, bool log_gradients,
                                   bool clamp, bool rescale_sum, double max_norm, double loss_floor,
                                   double limit) {
  const char* op = "balance";
  const int K = checked_K(losses.numel(), op);
  doubles(grams, kRoles * K * K, op, "grams");
  const RecordTensors record(grams, K);
  finish(record, doubles(losses, K, op, "losses"),
         weights ? doubles(*weights, K, op, "weights") : nullptr, K,
         {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit});
  return {record.values, record.flags};
}

std::tuple<Tensor, Tensor, Tensor> gram_balance(const TensorList& grads, Ints reach, Ints role,
                                                const Tensor& losses, bool log_gradients,
                                                bool clamp, bool rescale_sum, double max_norm,
                                                double loss_floor, double limit,
                                                std::optional<Tensor>) {
  const char* op = "gram_balance";
  const int K = checked_K(losses.numel(), op);
  const GradientRows gradients(grads, reach, role, K, nullptr, Place(grads.at(0)), op);
  const RecordTensors record(new_grams(grads[0].tensor(), K), K);
  cpu::gram(cpu::best_kernels(), cpu_threads(), gradients.rows, K, record.grams_pointer());
  finish(record, doubles(losses, K, op, "losses"), nullptr, K,
         {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit});
  return {record.grams, record.values, record.flags};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtokd, CPU, m) {
  m.impl("min_norm_weights", TORCH_BOX(&min_norm_weights));
  m.impl("balance", TORCH_BOX(&balance));
  m.impl("gram_balance", TORCH_BOX(&WithLists<&gram_balance>::call));
}

}  // namespace dtokd::ops
