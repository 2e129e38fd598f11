// The operations as torch calls them (dtokd_kernels/operations.py has the schemas), each once: what
// they are given is checked here, and a Backend computes. cpu.cpp and cuda.cpp have one each.
//
// A Backend is made of the first tensor of a call, the operation's name and the call's tickets. It
// is the place of all tensors of the call, and ends with it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/prepared.h"

namespace dtokd::ops {

template <class Backend>
struct Operations {
  using Maybe = std::optional<Tensor>;

  static Tensor gram(const TensorList& grads, Ints reach, Ints role, int64_t objectives,
                     Maybe tickets) {
    const char* op = "gram";
    const int K = checked_K(objectives, op);
    const Tensor first = grads.at(0).tensor();
    const Backend backend(first, op, tickets);
    const GradientRows gradients(grads, reach, role, K, nullptr, backend, op);
    Tensor grams = new_grams(first, K);
    backend.gram(gradients.rows, K, static_cast<double*>(grams.mutable_data_ptr()));
    return grams;
  }

  static void combine_(const TensorList& out, const TensorList& grads, Ints reach, Ints role,
                       const Tensor& coefficients) {
    const char* op = "combine_";
    if (out.empty()) return;
    const int K = checked_K(coefficients.numel() / kRoles, op);
    const Backend backend(out[0].tensor(), op, {});
    backend.check(coefficients, op, "coefficients");
    std::vector<Like> likes;
    std::vector<void*> targets;
    for (size_t t = 0; t < out.size(); ++t) {
      backend.check(out[t], op, "out");
      likes.emplace_back(out[t]);
      DTOKD_CHECK(likes[t].is_dense(), op, ": out[", t, "] has gaps in memory");
      targets.push_back(out[t].mutable_data_ptr());
    }
    const GradientRows gradients(grads, reach, role, K, &likes, backend, op);
    backend.combine(gradients.rows, K, doubles(coefficients, kRoles * K, op, "coefficients"),
                    targets);
  }

  static Tensor min_norm_weights(const Tensor& gram, bool clamp, const Maybe& present) {
    const char* op = "min_norm_weights";
    const int K = checked_K(gram.size(0), op);
    const Backend backend(gram, op, {});
    const bool* flags = nullptr;
    if (present) {
      backend.check(*present, op, "present");
      DTOKD_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == K &&
                      present->is_contiguous(),
                  op, ": present must be [K] bool");
      flags = static_cast<const bool*>(present->const_data_ptr());
    }
    Tensor out = torch::stable::new_empty(gram, {K}, ScalarType::Double);
    backend.min_norm_weights(doubles(gram, K * K, op, "gram"), K, flags, clamp,
                             static_cast<double*>(out.mutable_data_ptr()));
    return out;
  }

  static std::tuple<Tensor, Tensor> balance(const Tensor& grams, const Tensor& losses,
                                            const Maybe& weights, const Maybe& losses_before,
                                            const Maybe& squares, int64_t roles, bool log_gradients,
                                            bool clamp, bool rescale_sum, double max_norm,
                                            double loss_floor, double limit) {
    const char* op = "balance";
    const int K = checked_K(losses.numel(), op);
    const Backend backend(grams, op, {});
    doubles(grams, kRoles * K * K, op, "grams");
    const auto numbers = [&](const Tensor& tensor, const char* name) {
      backend.check(tensor, op, name);
      return doubles(tensor, K, op, name);
    };
    const auto maybe = [&](const Maybe& tensor, const char* name) {
      return tensor ? numbers(*tensor, name) : nullptr;
    };
    const RecordTensors record(grams, K);
    backend.balance(
        K, numbers(losses, "losses"), maybe(weights, "weights"),
        {maybe(losses_before, "losses_before"), maybe(squares, "squares"), unsigned(roles)},
        {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit}, record);
    return {record.values, record.flags};
  }

  static std::tuple<Tensor, Tensor, Tensor> gram_balance(const TensorList& grads, Ints reach,
                                                         Ints role, const Tensor& losses,
                                                         bool log_gradients, bool clamp,
                                                         bool rescale_sum, double max_norm,
                                                         double loss_floor, double limit,
                                                         Maybe tickets) {
    const char* op = "gram_balance";
    const int K = checked_K(losses.numel(), op);
    const Tensor first = grads.at(0).tensor();
    const Backend backend(first, op, tickets);
    backend.check(losses, op, "losses");
    const GradientRows gradients(grads, reach, role, K, nullptr, backend, op);
    const RecordTensors record(new_grams(first, K), K);
    backend.gram_balance(gradients.rows, K, doubles(losses, K, op, "losses"),
                         {log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit}, record);
    return {record.grams, record.values, record.flags};
  }

  // One call's rows and hyper-parameters.
  struct Update {
    const std::shared_ptr<Prepared> plan;
    const Tensor first;
    const Backend backend;
    const std::vector<Group> groups;
    std::unique_ptr<GradientRows> gradients;
    const std::vector<UpdateRow> rows;

    Update(int64_t prepared, const TensorList& grads, int K, const TensorList& lrs,
           const Ints& lr_of, const std::vector<double>& numbers, const Maybe& tickets,
           const char* op)
        : plan(Registry::get().at(prepared, op)),
          first(plan->like()),
          backend(first, op, tickets),
          groups(groups_of(plan->rule, lrs, lr_of, numbers, backend, op)),
          rows(plan->rows(grads, K, groups.size(), op, gradients)) {}
  };

  // -> the Gram matrices of the gradients from the same pass if `measure`, else nothing.
  static Tensor update_(int64_t prepared, const TensorList& grads, const Tensor& coefficients,
                        const Tensor& skipped, const TensorList& lrs, Ints lr_of,
                        std::vector<double> numbers, bool measure, Maybe tickets) {
    const char* op = "update_";
    const int K = checked_K(coefficients.numel() / kRoles, op);
    const Update update(prepared, grads, K, lrs, lr_of, numbers, tickets, op);
    update.backend.check(coefficients, op, "coefficients");
    update.backend.check(skipped, op, "skipped");
    const double* table = doubles(coefficients, kRoles * K, op, "coefficients");
    const bool* skips = one_flag(skipped, op, "skipped");
    Tensor grams = measure ? new_grams(update.first, K)
                           : torch::stable::new_empty(coefficients, {0}, ScalarType::Double);
    update.backend.update(update, K, table, skips,
                          measure ? static_cast<double*>(grams.mutable_data_ptr()) : nullptr);
    return grams;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("gram", TORCH_BOX(&WithLists<&gram>::call));
    m.impl("combine_", TORCH_BOX(&WithLists<&combine_>::call));
    m.impl("min_norm_weights", TORCH_BOX(&min_norm_weights));
    m.impl("balance", TORCH_BOX(&balance));
    m.impl("gram_balance", TORCH_BOX(&WithLists<&gram_balance>::call));
    m.impl("prepare", TORCH_BOX(&prepare));
    m.impl("release", TORCH_BOX(&release));
    m.impl("update_", TORCH_BOX(&WithLists<&update_>::call));
  }
};

}  // namespace dtokd::ops
