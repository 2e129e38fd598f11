#include "cuda/launch_update.h"

namespace dtokd::cuda {

int launch_sgd(const std::vector<Target>& targets, const std::vector<SGDGroup>& groups,
               const Direction& direction, Stream stream) {
  const Call<SGDGroup> call(targets, groups, direction, stream, no_extras);
  return for_each_sgd(call, [&](auto rule, auto P, const Kind& kind) {
    return launch_update<typename decltype(rule)::T, P>(call, kind, nullptr);
  });
}

int launch_combine(const std::vector<Gradients>& tensors, const std::vector<void*>& out,
                   const Direction& direction, Stream stream) {
  std::vector<Target> targets;
  for (size_t t = 0; t < tensors.size(); ++t) {
    targets.push_back({tensors[t], tensors[t].type, out[t], nullptr, {}, nullptr, 0});
  }
  const std::vector<CombineGroup> groups{{false}};
  const Call<CombineGroup> call(targets, groups, direction, stream, no_extras);
  return call.for_each_kind([&](const Kind& kind) {
    return by_type(kind.type, [&](auto t) {
      using Rule = CombineRule<typename decltype(t)::T>;
      return by_objectives(direction.K,
                           [&](auto P) { return launch_update<Rule, P>(call, kind, nullptr); });
    });
  });
}

}  // namespace dtokd::cuda
