// The core for Python tests: every set of vector instructions and any number of threads can be
// asked for, where the package picks for itself. Tensors come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cpu/lists.h"
#include "dtokd/balance.h"
#include "tests/threads.h"

namespace py = pybind11;
using namespace dtokd::cpu;

namespace {

using Addresses = std::vector<uintptr_t>;

const Kernels& kernels(const std::string& name) {
  for (const Kernels* k : {plain_kernels(), avx2_kernels(), avx512_kernels()}) {
    if (k && name == k->name) return *k;
  }
  throw std::invalid_argument("no kernels are named " + name);
}

// Names that this machine can run, the widest last.
std::vector<std::string> names() {
  std::vector<std::string> result{"plain"};
  const std::string best = best_kernels().name;
  if (best != "plain") result.push_back("avx2");
  if (best == "avx512") result.push_back("avx512");
  return result;
}

Type type(const std::string& name) {
  static const std::map<std::string, Type> types{{"float32", Type::kFloat32},
                                                 {"float64", Type::kFloat64},
                                                 {"bfloat16", Type::kBFloat16},
                                                 {"float16", Type::kFloat16}};
  return types.at(name);
}

std::vector<void*> pointers(const Addresses& addresses) {
  std::vector<void*> result;
  for (uintptr_t a : addresses) result.push_back(reinterpret_cast<void*>(a));
  return result;
}

GradientLists lists(const std::string& dtype, const Addresses& grads,
                    const std::vector<int64_t>& sizes) {
  const std::vector<void*> p = pointers(grads);
  return {type(dtype), int(grads.size() / sizes.size()), {p.begin(), p.end()}, sizes};
}

}  // namespace

PYBIND11_MODULE(dtokd_core_python, m) {
  m.def("names", &names);
  m.attr("chunk") = kChunk;
  m.def("gram", [](const std::string& name, int threads, const std::string& dtype,
                   const Addresses& grads, const std::vector<int64_t>& sizes) {
    const GradientLists l = lists(dtype, grads, sizes);
    std::vector<double> out(l.K * l.K);
    gram(kernels(name), test_threads(threads), l, out.data());
    return out;
  });
  m.def("combine", [](const std::string& name, int threads, const std::string& dtype,
                      const Addresses& grads, const std::vector<int64_t>& sizes,
                      const std::vector<double>& coefficients, const Addresses& out) {
    combine(kernels(name), test_threads(threads), lists(dtype, grads, sizes), coefficients.data(),
            pointers(out));
  });
  m.def("adamw_step",
        [](const std::string& name, int threads, const std::string& dtype, const Addresses& grads,
           const std::vector<int64_t>& sizes, const std::vector<double>& coefficients,
           const std::vector<double>& s, const Addresses& params, const Addresses& exp_avgs,
           const Addresses& exp_avg_sqs, const Addresses& max_exp_avg_sqs) {
          const AdamWScalars scalars{s.at(0), s.at(1), s.at(2), s.at(3), s.at(4), int64_t(s.at(5))};
          adamw_step(kernels(name), test_threads(threads), lists(dtype, grads, sizes),
                     coefficients.data(), std::vector<AdamWScalars>(sizes.size(), scalars),
                     pointers(params), pointers(exp_avgs), pointers(exp_avg_sqs),
                     pointers(max_exp_avg_sqs));
        });
  m.def("sgd_step",
        [](const std::string& name, int threads, const std::string& dtype, const Addresses& grads,
           const std::vector<int64_t>& sizes, const std::vector<double>& coefficients,
           const std::vector<double>& s, bool nesterov, bool first, const Addresses& params,
           const Addresses& momentum_buffers) {
          sgd_step(kernels(name), test_threads(threads), lists(dtype, grads, sizes),
                   coefficients.data(), {s.at(0), s.at(1), s.at(2), s.at(3), nesterov, first},
                   pointers(params), pointers(momentum_buffers));
        });
}
