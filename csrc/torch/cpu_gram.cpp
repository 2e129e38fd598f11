// Gram matrices and combinations of gradients on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "torch/cpu_threads.h"
#include "torch/layout.h"

namespace dtokd::ops {
namespace {

Tensor gram(const TensorList& grads, Ints reach, Ints role, int64_t objectives,
            std::optional<Tensor>) {
  const char* op = "gram";
  const int K = checked_K(objectives, op);
  const GradientRows gradients(grads, reach, role, K, nullptr, Place(grads.at(0)), op);
  Tensor grams = new_grams(grads[0].tensor(), K);
  cpu::gram(cpu::best_kernels(), cpu_threads(), gradients.rows, K,
            static_cast<double*>(grams.mutable_data_ptr()));
  return grams;
}

void combine_(const TensorList& out, const TensorList& grads, Ints reach, Ints role,
              const Tensor& coefficients) {
  const char* op = "combine_";
  if (out.empty()) return;
  const int K = checked_K(coefficients.numel() / kRoles, op);
  const Place place(out[0]);
  std::vector<Like> likes;
  std::vector<void*> targets;
  for (size_t t = 0; t < out.size(); ++t) {
    place.check(out[t], op, "out");
    likes.emplace_back(out[t]);
    DTOKD_CHECK(likes[t].is_dense(), op, ": out[", t, "] has gaps in memory");
    targets.push_back(out[t].mutable_data_ptr());
  }
  const GradientRows gradients(grads, reach, role, K, &likes, place, op);
  cpu::combine(cpu::best_kernels(), cpu_threads(), gradients.rows, K,
               doubles(coefficients, kRoles * K, op, "coefficients"), targets);
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

STABLE_TORCH_LIBRARY_IMPL(dtokd, CPU, m) {
  m.impl("gram", TORCH_BOX(&WithLists<&gram>::call));
  m.impl("combine_", TORCH_BOX(&WithLists<&combine_>::call));
  m.impl("instructions", TORCH_BOX(&instructions));
}

}  // namespace dtokd::ops
