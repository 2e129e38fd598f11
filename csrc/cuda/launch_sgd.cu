#include "cuda/launch_update.h"

namespace dtokd::cuda {
namespace {

bool no_extras(const Target&) { return false; }

}  // namespace

int launch_sgd(const std::vector<Target>& targets, const std::vector<SGDGroup>& groups,
               const Direction& direction, Stream stream) {
  return for_each_kind(targets, no_extras, [&](const auto& kinds, const Kind& kind, auto chunk) {
    return by_types(kind.type, kind.state_type, [&](auto t, auto s) {
      using Rule = SGDRule<typename decltype(t)::T, typename decltype(s)::T>;
      return by_objectives(direction.K, [&](auto P) {
        return launch_kind<Rule, P>(targets, kinds, kind, chunk, groups, direction, nullptr,
                                    stream);
      });
    });
  });
}

int launch_combine(const std::vector<Gradients>& tensors, const std::vector<void*>& out,
                   const Direction& direction, Stream stream) {
  std::vector<Target> targets;
  for (size_t t = 0; t < tensors.size(); ++t) {
    targets.push_back({tensors[t], tensors[t].type, out[t], nullptr, {}, nullptr, 0});
  }
  return for_each_kind(targets, no_extras, [&](const auto& kinds, const Kind& kind, auto chunk) {
    return by_type(kind.type, [&](auto t) {
      using Rule = CombineRule<typename decltype(t)::T>;
      return by_objectives(direction.K, [&](auto P) {
        return launch_kind<Rule, P>(targets, kinds, kind, chunk, {{false}}, direction, nullptr,
                                    stream);
      });
    });
  });
}

}  // namespace dtokd::cuda
