// The operations as torch sees them: schemas, checks, and tensors turned into pointers. Written to
// torch's stable ABI, so that one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/lists.h"
#include "dtokd/balance.h"
#include "torch/checks.h"
#include "torch/tensor_list.h"

namespace dtokd::ops {
namespace {

// What the lists of one call have in common: the tensors at one position are of one dtype and lie
// in memory element by element alike.
struct Kind {
  const char* op;
  const TensorList& like;
  int32_t dtype;
  Type type;
  std::vector<int64_t> sizes;
  std::vector<bool> contiguous;

  Kind(const char* op, const TensorList& like, size_t count)
      : op(op), like(like), dtype(like[0].dtype()), type(type_of(dtype)) {
    sizes.reserve(count);
    contiguous.reserve(count);
    for (size_t t = 0; t < count; ++t) {
      sizes.push_back(like[t].numel());
      contiguous.push_back(like[t].is_contiguous());
      DTOKD_CHECK_FIT(contiguous[t] || is_dense(like[t]), op, ": tensor ", t, " is not dense");
    }
  }
  void check(ListedTensor tensor, const char* name, size_t t) const {
    DTOKD_CHECK_FIT(tensor.dtype() == dtype, op, ": ", name, "[", t, "] has another dtype");
    DTOKD_CHECK_SHAPE(tensor, like[t], op, name, t);
    DTOKD_CHECK_FIT(contiguous[t] ? tensor.is_contiguous() : same_strides(tensor, like[t]), op,
                    ": ", name, "[", t, "] is laid out otherwise");
  }
  std::vector<void*> pointers(const TensorList& tensors, const char* name) const {
    DTOKD_CHECK(tensors.size() == sizes.size(), op, ": ", name, " has ", tensors.size(),
                " tensors, expected ", sizes.size());
    std::vector<void*> result(tensors.size());
    for (size_t t = 0; t < tensors.size(); ++t) {
      check(tensors[t], name, t);
      result[t] = tensors[t].mutable_data_ptr();
    }
    return result;
  }
  cpu::GradientLists gradients(const TensorList& grads, int64_t K) const {
    DTOKD_CHECK(K >= 1 && K <= kMaxObjectives, op, ": ", K, " objectives, expected 1 to ",
                kMaxObjectives);
    DTOKD_CHECK(grads.size() == sizes.size() * K, op, ": grads has ", grads.size(),
                " tensors, expected ", sizes.size(), " for each of ", K, " objectives");
    cpu::GradientLists lists{type, int(K), {}, sizes};
    lists.grads.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      check(grads[i], "grads", i % sizes.size());
      lists.grads.push_back(grads[i].const_data_ptr());
    }
    return lists;
  }
};

cpu::Threads threads() {
  return {int(torch::stable::get_num_threads()),
          [](int tasks, const std::function<void(int)>& task) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t k = begin; k < end; ++k) task(int(k));
            });
          }};
}

bool is_set(const Tensor& flag, const char* op) {
  DTOKD_CHECK(flag.scalar_type() == ScalarType::Bool && flag.numel() == 1, op,
              ": skipped must be one bool");
  return *static_cast<const bool*>(flag.const_data_ptr());
}

Tensor gram(const TensorList& grads, int64_t K) {
  DTOKD_CHECK(K >= 1 && !grads.empty() && grads.size() % K == 0,
              "gram: grads must hold as many tensors for each of K objectives");
  const Kind kind("gram", grads, grads.size() / K);
  const cpu::GradientLists lists = kind.gradients(grads, K);
  Tensor out = torch::stable::new_empty(grads[0].tensor(), {K, K}, ScalarType::Double);
  cpu::gram(cpu::best_kernels(), threads(), lists, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

Tensor min_norm_weights(const Tensor& gram, bool clamp, const std::optional<Tensor>& present) {
  const int K = objectives_of(gram, "min_norm_weights");
  const double* G = doubles(gram, K * K, "min_norm_weights", "gram");
  unsigned mask = (1u << K) - 1;
  if (present) {
    DTOKD_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == K &&
                    present->is_contiguous(),
                "min_norm_weights: present must be [K] bool");
    const bool* flags = static_cast<const bool*>(present->const_data_ptr());
    for (int i = 0; i < K; ++i) {
      if (!flags[i]) mask &= ~(1u << i);
    }
  }
  Tensor out = torch::stable::new_empty(gram, {K}, ScalarType::Double);
  dtokd::min_norm_weights(G, K, mask, clamp, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

// -> values and flags as write_record lays them out.
std::tuple<Tensor, Tensor> balance(const Tensor& gram, const std::optional<Tensor>& private_gram,
                                   const std::optional<Tensor>& plain_gram, const Tensor& losses,
                                   const std::optional<Tensor>& weights, bool log_gradients,
                                   bool clamp, bool rescale_sum, double max_norm, double loss_floor,
                                   double limit) {
  const int K = objectives_of(gram, "balance");
  const double zeros[kMaxObjectives * kMaxObjectives] = {0};
  const auto matrix = [&](const std::optional<Tensor>& tensor, const char* name) {
    return tensor ? doubles(*tensor, K * K, "balance", name) : zeros;
  };
  const double* grams[3] = {doubles(gram, K * K, "balance", "gram"),
                            matrix(private_gram, "private_gram"), matrix(plain_gram, "plain_gram")};
  const double* L = doubles(losses, K, "balance", "losses");
  const BalanceOptions options{log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit};
  double chosen[kMaxObjectives];
  if (weights) {
    const double* given = doubles(*weights, K, "balance", "weights");
    for (int i = 0; i < K; ++i) chosen[i] = given[i];
  } else {
    dto_weights(grams[0], L, K, options, chosen);
  }
  Balance result;
  finish_balance(grams, L, chosen, K, options, result);
  Tensor values = torch::stable::new_empty(gram, {values_size(K)}, ScalarType::Double);
  Tensor flags = torch::stable::new_empty(gram, {2}, ScalarType::Bool);
  write_record(result, K, static_cast<double*>(values.mutable_data_ptr()),
               static_cast<bool*>(flags.mutable_data_ptr()));
  return {values, flags};
}

void combine_(const TensorList& out, const TensorList& grads, const Tensor& coefficients) {
  if (out.empty()) return;
  const int64_t K = coefficients.numel();
  const Kind kind("combine_", out, out.size());
  cpu::combine(cpu::best_kernels(), threads(), kind.gradients(grads, K),
               doubles(coefficients, K, "combine_", "coefficients"), kind.pointers(out, "out"));
}

// What an update descends: K gradient lists and their coefficients, turned around for maximize. At
// a vertex of the simplex a coefficient is 0; that list is not read at all, unless `all` are.
struct Descent {
  cpu::GradientLists lists;
  std::vector<double> coefficients;

  Descent(const Kind& kind, const TensorList& grads, const Tensor& coefficients, bool maximize,
          bool all)
      : lists(kind.gradients(grads, coefficients.numel())) {
    const double* c = doubles(coefficients, lists.K, kind.op, "coefficients");
    const size_t T = lists.sizes.size();
    std::vector<const void*> read;
    for (int k = 0; k < lists.K; ++k) {
      if (!all && c[k] == 0 && !(k == lists.K - 1 && read.empty())) continue;
      this->coefficients.push_back(maximize ? -c[k] : c[k]);
      read.insert(read.end(), lists.grads.begin() + k * T, lists.grads.begin() + (k + 1) * T);
    }
    lists.K = int(this->coefficients.size());
    lists.grads = std::move(read);
  }
};

Tensor new_gram(const Tensor& coefficients) {
  const int64_t K = coefficients.numel();
  return torch::stable::new_empty(coefficients, {K, K}, ScalarType::Double);
}

// One of state_steps.
class Count {
 public:
  Count(ListedTensor step, const char* op)
      : is_double_(step.dtype() == aoti_torch_dtype_float64()) {
    DTOKD_CHECK_FIT(step.numel() == 1 && (is_double_ || step.dtype() == aoti_torch_dtype_float32()),
                    op, ": state_steps must hold float32 or float64 scalars");
    value_ = step.mutable_data_ptr();
  }
  double up() {
    return is_double_ ? *static_cast<double*>(value_) += 1 : *static_cast<float*>(value_) += 1;
  }

 private:
  void* value_;
  bool is_double_;
};

// products: [K, K] or null; where to put the Gram matrix of the gradients.
void adamw(const char* op, const TensorList& params, const TensorList& grads,
           const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& max_exp_avg_sqs, const TensorList& state_steps,
           const Tensor& coefficients, double lr, double beta1, double beta2, double weight_decay,
           double eps, bool maximize, double* products) {
  const Kind kind(op, params, params.size());
  const Descent descent(kind, grads, coefficients, maximize, products);
  const std::vector<void*> p = kind.pointers(params, "params");
  const std::vector<void*> m = kind.pointers(exp_avgs, "exp_avgs");
  const std::vector<void*> v = kind.pointers(exp_avg_sqs, "exp_avg_sqs");
  std::vector<void*> largest;
  if (!max_exp_avg_sqs.empty()) largest = kind.pointers(max_exp_avg_sqs, "max_exp_avg_sqs");
  DTOKD_CHECK(state_steps.size() == params.size(), op,
              ": state_steps must hold one scalar for each of params");
  std::vector<Count> counts;
  counts.reserve(state_steps.size());
  for (size_t t = 0; t < state_steps.size(); ++t) counts.emplace_back(state_steps[t], op);
  std::vector<cpu::AdamWScalars> scalars;
  scalars.reserve(counts.size());
  for (Count& count : counts) {
    scalars.push_back({lr, beta1, beta2, weight_decay, eps, int64_t(count.up())});
  }
  cpu::adamw_step(cpu::best_kernels(), threads(), descent.lists, descent.coefficients.data(),
                  scalars, p, m, v, largest, products);
}

void adamw_step_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                 const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                 const TensorList& state_steps, const Tensor& coefficients, const Tensor& skipped,
                 double lr, double beta1, double beta2, double weight_decay, double eps,
                 bool maximize) {
  const char* op = "adamw_step_";
  if (params.empty() || is_set(skipped, op)) return;
  adamw(op, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, coefficients, lr,
        beta1, beta2, weight_decay, eps, maximize, nullptr);
}

Tensor gram_adamw_step_(const TensorList& params, const TensorList& grads,
                        const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                        const TensorList& max_exp_avg_sqs, const TensorList& state_steps,
                        const Tensor& coefficients, const Tensor& skipped, double lr, double beta1,
                        double beta2, double weight_decay, double eps, bool maximize) {
  const char* op = "gram_adamw_step_";
  if (params.empty() || is_set(skipped, op)) return gram(grads, coefficients.numel());
  Tensor products = new_gram(coefficients);
  adamw(op, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, coefficients, lr,
        beta1, beta2, weight_decay, eps, maximize,
        static_cast<double*>(products.mutable_data_ptr()));
  return products;
}

void sgd(const char* op, const TensorList& params, const TensorList& grads,
         const TensorList& momentum_buffers, const Tensor& coefficients, double lr, double momentum,
         double dampening, double weight_decay, bool nesterov, bool maximize, bool first,
         double* products) {
  const Kind kind(op, params, params.size());
  const Descent descent(kind, grads, coefficients, maximize, products);
  const std::vector<void*> p = kind.pointers(params, "params");
  std::vector<void*> buffers;
  if (!momentum_buffers.empty()) buffers = kind.pointers(momentum_buffers, "momentum_buffers");
  cpu::sgd_step(cpu::best_kernels(), threads(), descent.lists, descent.coefficients.data(),
                {lr, momentum, dampening, weight_decay, nesterov, first}, p, buffers, products);
}

void sgd_step_(const TensorList& params, const TensorList& grads,
               const TensorList& momentum_buffers, const Tensor& coefficients,
               const Tensor& skipped, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool first) {
  const char* op = "sgd_step_";
  if (params.empty() || is_set(skipped, op)) return;
  sgd(op, params, grads, momentum_buffers, coefficients, lr, momentum, dampening, weight_decay,
      nesterov, maximize, first, nullptr);
}

Tensor gram_sgd_step_(const TensorList& params, const TensorList& grads,
                      const TensorList& momentum_buffers, const Tensor& coefficients,
                      const Tensor& skipped, double lr, double momentum, double dampening,
                      double weight_decay, bool nesterov, bool maximize, bool first) {
  const char* op = "gram_sgd_step_";
  if (params.empty() || is_set(skipped, op)) return gram(grads, coefficients.numel());
  Tensor products = new_gram(coefficients);
  sgd(op, params, grads, momentum_buffers, coefficients, lr, momentum, dampening, weight_decay,
      nesterov, maximize, first, static_cast<double*>(products.mutable_data_ptr()));
  return products;
}

// The name of the vector instructions in use, as bytes: torch's stable ABI of 2.10 returns no
// string.
Tensor instructions(const Tensor& like) {
  const std::string name = cpu::best_kernels().name;
  Tensor out = torch::stable::new_empty(like, {int64_t(name.size())}, ScalarType::Byte);
  name.copy(static_cast<char*>(out.mutable_data_ptr()), name.size());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(dtokd, m) {
  m.def("gram(Tensor[] grads, int K) -> Tensor");
  m.def("min_norm_weights(Tensor gram, bool clamp, Tensor? present) -> Tensor");
  m.def(
      "balance(Tensor gram, Tensor? private_gram, Tensor? plain_gram, Tensor losses, "
      "Tensor? weights, bool log_gradients, bool clamp, bool rescale_sum, float max_norm, "
      "float loss_floor, float limit) -> (Tensor, Tensor)");
  m.def("combine_(Tensor(a!)[] out, Tensor[] grads, Tensor coefficients) -> ()");
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, "
      "Tensor coefficients, Tensor skipped, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize) -> ()");
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor coefficients, Tensor skipped, *, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, bool first) -> ()");
  m.def(
      "gram_adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, "
      "Tensor coefficients, Tensor skipped, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize) -> Tensor");
  m.def(
      "gram_sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor coefficients, Tensor skipped, *, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, bool first) -> Tensor");
  m.def("instructions(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dtokd, CPU, m) {
  m.impl("gram", TORCH_BOX(&WithLists<&gram>::call));
  m.impl("min_norm_weights", TORCH_BOX(&min_norm_weights));
  m.impl("balance", TORCH_BOX(&balance));
  m.impl("combine_", TORCH_BOX(&WithLists<&combine_>::call));
  m.impl("adamw_step_", TORCH_BOX(&WithLists<&adamw_step_>::call));
  m.impl("sgd_step_", TORCH_BOX(&WithLists<&sgd_step_>::call));
  m.impl("gram_adamw_step_", TORCH_BOX(&WithLists<&gram_adamw_step_>::call));
  m.impl("gram_sgd_step_", TORCH_BOX(&WithLists<&gram_sgd_step_>::call));
  m.impl("instructions", TORCH_BOX(&instructions));
}

}  // namespace dtokd::ops
