// The weightings that are solved in C++ on the CPU, as torch sees them.
#include <torch/csrc/stable/library.h>

#include "dtokd/cagrad.h"
#include "dtokd/faces.h"
#include "dtokd/nash.h"
#include "dtokd/pcgrad.h"
#include "torch/checks.h"

namespace dtokd::ops {
namespace {

// The weights [K] that solve(gram, K, weights) writes.
template <class Solve>
Tensor weights_of(const Tensor& gram, const char* op, Solve solve) {
  const int K = objectives_of(gram, op);
  const double* G = doubles(gram, K * K, op, "gram");
  Tensor out = torch::stable::new_empty(gram, {K}, ScalarType::Double);
  solve(G, K, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

Tensor dual_cone_weights(const Tensor& gram, bool each) {
  return weights_of(gram, "dual_cone_weights", [&](const double* G, int K, double* out) {
    dtokd::dual_cone_weights(G, K, each, out);
  });
}

Tensor cagrad_weights(const Tensor& gram, double c) {
  return weights_of(gram, "cagrad_weights", [&](const double* G, int K, double* out) {
    dtokd::cagrad_weights(G, K, c, out);
  });
}

Tensor nash_weights(const Tensor& gram) {
  return weights_of(gram, "nash_weights", dtokd::nash_weights);
}

Tensor pcgrad_weights(const Tensor& gram, const Tensor& step, int64_t seed) {
  DTOKD_CHECK(step.scalar_type() == ScalarType::Long && step.numel() == 1,
              "dtokd::pcgrad_weights: step must be one int64");
  const int64_t count = *static_cast<const int64_t*>(step.const_data_ptr());
  return weights_of(gram, "pcgrad_weights", [&](const double* G, int K, double* out) {
    dtokd::pcgrad_weights(G, K, seed, count, out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dtokd, m) {
  m.def("dual_cone_weights(Tensor gram, bool each) -> Tensor");
  m.def("cagrad_weights(Tensor gram, float c) -> Tensor");
  m.def("nash_weights(Tensor gram) -> Tensor");
  m.def("pcgrad_weights(Tensor gram, Tensor step, int seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dtokd, CPU, m) {
  m.impl("dual_cone_weights", TORCH_BOX(&dual_cone_weights));
  m.impl("cagrad_weights", TORCH_BOX(&cagrad_weights));
  m.impl("nash_weights", TORCH_BOX(&nash_weights));
  m.impl("pcgrad_weights", TORCH_BOX(&pcgrad_weights));
}

}  // namespace dtokd::ops
