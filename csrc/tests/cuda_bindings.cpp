// The CUDA launches for Python tests, emulated. Tensors come as addresses, 0 for null. Scratch
// memory is made here, full of NaN; that every ticket is zero again is checked after each launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace py = pybind11;
using namespace dtokd;
using namespace dtokd::cuda;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Type type(const std::string& name) {
  static const std::map<std::string, Type> types{{"float32", Type::kFloat32},
                                                 {"float64", Type::kFloat64},
                                                 {"bfloat16", Type::kBFloat16},
                                                 {"float16", Type::kFloat16}};
  return types.at(name);
}

// dtype, role, size, the gradients' addresses
using GradientsTuple = std::tuple<std::string, int, int64_t, std::vector<uintptr_t>>;
// gradients, dtype of the state, param, master, states [3], step, group
using TargetTuple = std::tuple<GradientsTuple, std::string, uintptr_t, uintptr_t,
                               std::vector<uintptr_t>, uintptr_t, int>;

Gradients gradients(const GradientsTuple& from) {
  const auto& [dtype, role, size, addresses] = from;
  Gradients result{type(dtype), role, size, {}};
  for (size_t k = 0; k < addresses.size(); ++k) result.of[k] = pointer<const void>(addresses[k]);
  return result;
}

std::vector<Gradients> all(const std::vector<GradientsTuple>& from) {
  std::vector<Gradients> result;
  for (const auto& g : from) result.push_back(gradients(g));
  return result;
}

std::vector<Target> all(const std::vector<TargetTuple>& from) {
  std::vector<Target> result;
  for (const auto& [grads, state_type, param, master, states, step, group] : from) {
    Target target{gradients(grads),
                  type(state_type),
                  pointer<void>(param),
                  pointer<float>(master),
                  {},
                  pointer<float>(step),
                  group};
    for (size_t i = 0; i < states.size(); ++i) target.state[i] = pointer<void>(states[i]);
    result.push_back(target);
  }
  return result;
}

void check(int error) {
  if (error) throw std::invalid_argument(error_name(error));
}

// Runs a launch with scratch memory of `size` numbers.
template <class Launch>
void with_scratch(int64_t size, const Launch& launch) {
  std::vector<double> partials(size, NAN);
  std::vector<unsigned> tickets(kTickets);
  check(launch(Scratch{partials.data(), tickets.data()}));
  for (unsigned ticket : tickets) {
    if (ticket != 0) throw std::logic_error("a launch left a ticket behind");
  }
}

// log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit
using OptionsTuple = std::tuple<bool, bool, bool, double, double, double>;

BalanceOptions options(const OptionsTuple& o) {
  return std::apply([](auto... values) { return BalanceOptions{values...}; }, o);
}

Record record(uintptr_t grams, uintptr_t values, uintptr_t flags) {
  return {pointer<double>(grams), pointer<double>(values), pointer<bool>(flags)};
}

// lr: a number, or the dtype and address of a scalar
LearningRate learning_rate(const py::object& lr) {
  if (!py::isinstance<py::tuple>(lr)) return {lr.cast<double>()};
  const auto [dtype, address] = lr.cast<std::tuple<std::string, uintptr_t>>();
  return {NAN, pointer<void>(address), type(dtype)};
}

// Names of a rule's numbers, in their order.
std::vector<std::string> names(int rule) {
#define DTOKD_NAME(name) #name,
#define DTOKD_NAMES(Rule) \
  if (rule == k##Rule) return {DTOKD_NUMBERS_##Rule(DTOKD_NAME)};
  DTOKD_RULES(DTOKD_NAMES)
#undef DTOKD_NAMES
#undef DTOKD_NAME
  throw std::invalid_argument("no such rule");
}

std::vector<Group> groups_of(int rule, const std::vector<py::dict>& groups) {
  std::vector<Group> result;
  for (const py::dict& g : groups) {
    Group group{learning_rate(g["lr"]), {NAN}};
    const std::vector<std::string> of_rule = names(rule);
    for (size_t i = 1; i < of_rule.size(); ++i) {
      group.numbers[i] = g.contains(of_rule[i]) ? g[of_rule[i].c_str()].cast<double>() : 0.0;
    }
    result.push_back(group);
  }
  return result;
}

std::vector<Gradients> gradients_of(const std::vector<Target>& targets) {
  std::vector<Gradients> result;
  for (const Target& target : targets) result.push_back(target.grads);
  return result;
}

}  // namespace

PYBIND11_MODULE(dtokd_cuda_emulation, m) {
  m.def("set_schedule", [](const std::string& name) {
    emulation::Machine::get().schedule = emulation::Schedule(name);
  });
  m.def("values_size", [](int K) { return values_size(K); });

  m.def("gram", [](const std::vector<GradientsTuple>& tensors, int K, uintptr_t grams) {
    const auto t = all(tensors);
    with_scratch(scratch_size(t, K), [&](const Scratch& scratch) {
      return launch_gram(t, K, scratch, pointer<double>(grams), nullptr);
    });
  });
  m.def("gram_balance",
        [](const std::vector<GradientsTuple>& tensors, int K, uintptr_t losses,
           const OptionsTuple& o, uintptr_t grams, uintptr_t values, uintptr_t flags) {
          const auto t = all(tensors);
          with_scratch(scratch_size(t, K), [&](const Scratch& scratch) {
            return launch_gram_balance(t, K, pointer<double>(losses), options(o), scratch,
                                       record(grams, values, flags), nullptr);
          });
        });
  m.def("balance", [](int K, uintptr_t losses, uintptr_t weights, const OptionsTuple& o,
                      uintptr_t grams, uintptr_t values, uintptr_t flags) {
    check(launch_balance(K, pointer<double>(losses), pointer<double>(weights), {}, options(o),
                         record(grams, values, flags), nullptr));
  });
  m.def("min_norm_weights",
        [](uintptr_t gram, int K, uintptr_t present, bool clamp, uintptr_t weights) {
          check(launch_min_norm_weights(pointer<double>(gram), K, pointer<bool>(present), clamp,
                                        pointer<double>(weights), nullptr));
        });
  m.def("host_min_norm_weights", [](uintptr_t gram, int K, bool clamp, uintptr_t weights) {
    dtokd::min_norm_weights(pointer<double>(gram), K, (1u << K) - 1, clamp,
                            pointer<double>(weights));
  });

  m.def("combine", [](const std::vector<GradientsTuple>& tensors, const std::vector<uintptr_t>& out,
                      int K, uintptr_t coefficients) {
    std::vector<void*> targets;
    for (uintptr_t o : out) targets.push_back(pointer<void>(o));
    check(launch_combine(all(tensors), targets, {K, pointer<double>(coefficients), nullptr},
                         nullptr));
  });
  m.def("names", &names);
  m.def("update",
        [](int rule, const std::vector<TargetTuple>& targets, const std::vector<py::dict>& groups,
           int K, uintptr_t coefficients, uintptr_t skipped) {
          with_scratch(0, [&](const Scratch& scratch) {
            return launch_update(rule, all(targets), groups_of(rule, groups),
                                 {K, pointer<double>(coefficients), pointer<bool>(skipped)},
                                 scratch, nullptr);
          });
        });
  // The same steps as gram_balance and adamw on a device that runs `blocks` at a time; whether it
  // was done.
  m.def("resident_adamw",
        [](const std::vector<TargetTuple>& targets, const std::vector<py::dict>& groups, int K,
           uintptr_t losses, const OptionsTuple& o, uintptr_t grams, uintptr_t values,
           uintptr_t flags, int blocks, int shared_bytes) {
          const auto t = all(targets);
          emulated_residency = {blocks, shared_bytes};
          bool done = true;
          with_scratch(scratch_size(gradients_of(t), K), [&](const Scratch& scratch) {
            const int error =
                launch_resident_adamw(t, groups_of(kAdamW, groups), K, pointer<double>(losses),
                                      options(o), scratch, record(grams, values, flags), nullptr);
            done = error != kUnfit;
            return done ? error : 0;
          });
          return done;
        });
  // An update that also measures.
  m.def("gram_update",
        [](int rule, const std::vector<TargetTuple>& targets, const std::vector<py::dict>& groups,
           int K, uintptr_t coefficients, uintptr_t skipped, uintptr_t grams) {
          const auto t = all(targets);
          with_scratch(scratch_size(gradients_of(t), K), [&](const Scratch& scratch) {
            return launch_gram_update(rule, t, groups_of(rule, groups),
                                      {K, pointer<double>(coefficients), pointer<bool>(skipped)},
                                      scratch, pointer<double>(grams), nullptr);
          });
        });

  // The planner by itself: of sizes, with roles by turns if `roles` is set.
  m.def("plan", [](const std::vector<int64_t>& sizes, bool roles) {
    std::vector<Gradients> tensors;
    for (size_t t = 0; t < sizes.size(); ++t) {
      tensors.push_back({Type::kFloat32, roles ? int(t % kRoles) : 0, sizes[t], {}});
    }
    const int64_t chunk = chunk_size(tensors);
    const Slots slots(tensors, chunk);
    struct Entry {
      int64_t size;
      size_t tensor;
    };
    py::list tables;
    for (const auto& table : make_tables<Entry>(
             tensors, chunk, [](size_t) { return true; },
             [&](size_t t) { return Entry{sizes[t], t}; })) {
      py::list chunks;
      for (unsigned c = 0; c < table.chunks(); ++c) {
        const int e = table.find(c);
        const size_t tensor = table.entries[e].tensor;
        const int64_t begin = table.begin(c, e);
        chunks.append(std::make_tuple(tensor, slots.first[tensor] + c - table.first_chunk[e], begin,
                                      table.end(begin, e)));
      }
      tables.append(chunks);
    }
    return std::make_tuple(chunk, std::vector<unsigned>(slots.begin, slots.begin + kRoles + 1),
                           tables);
  });
  m.attr("TILE") = kTile;
  m.attr("MAX_WHOLE_CHUNKS") = kMaxWholeChunks;
}
