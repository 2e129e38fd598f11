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
using namespace dtokd;
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

// grads: objective by objective.
std::vector<GradientRow> rows(const std::string& dtype, const Addresses& grads,
                              const std::vector<int64_t>& sizes) {
  const std::vector<void*> p = pointers(grads);
  std::vector<GradientRow> result;
  for (size_t t = 0; t < sizes.size(); ++t) {
    result.push_back({type(dtype), 0, sizes[t], {}});
    for (size_t k = 0; k < p.size() / sizes.size(); ++k) {
      result[t].of[k] = p[k * sizes.size() + t];
    }
  }
  return result;
}

// Of shared parameters; the other roles have none.
std::vector<double> table(const std::vector<double>& coefficients) {
  std::vector<double> result = coefficients;
  result.resize(kRoles * coefficients.size());
  return result;
}

}  // namespace

PYBIND11_MODULE(dtokd_core_python, m) {
  m.def("names", &names);
  m.attr("chunk") = kChunk;
  m.def("gram", [](const std::string& name, int threads, const std::string& dtype,
                   const Addresses& grads, const std::vector<int64_t>& sizes) {
    const int K = int(grads.size() / sizes.size());
    std::vector<double> out(kRoles * K * K);
    gram(kernels(name), test_threads(threads), rows(dtype, grads, sizes), K, out.data());
    return std::vector<double>(out.begin(), out.begin() + K * K);
  });
  m.def("combine", [](const std::string& name, int threads, const std::string& dtype,
                      const Addresses& grads, const std::vector<int64_t>& sizes,
                      const std::vector<double>& coefficients, const Addresses& out) {
    combine(kernels(name), test_threads(threads), rows(dtype, grads, sizes),
            int(coefficients.size()), table(coefficients).data(), pointers(out));
  });
  // states: lists of as many addresses as there are tensors, in the rule's order; step: before.
  m.def("update", [](const std::string& name, int threads, int rule, const std::string& dtype,
                     const Addresses& grads, const std::vector<int64_t>& sizes,
                     const std::vector<double>& coefficients, const std::vector<double>& numbers,
                     float step, const Addresses& params, const std::vector<Addresses>& states) {
    std::vector<UpdateRow> updates;
    std::vector<float> steps(sizes.size(), step);
    for (const GradientRow& row : rows(dtype, grads, sizes)) {
      const size_t t = updates.size();
      updates.push_back({row, row.type, pointers(params)[t], nullptr, {}, &steps[t], 0});
      for (size_t i = 0; i < states.size(); ++i) updates[t].state[i] = pointers(states[i])[t];
    }
    Group group{{numbers.at(0)}, {}};
    std::copy(numbers.begin(), numbers.end(), group.numbers);
    update(kernels(name), test_threads(threads), rule, updates, {group}, int(coefficients.size()),
           table(coefficients).data(), nullptr);
  });
}
