// What is done with the direction by all rules but AdamW, and the choice among all.
#include "cuda/launch_update.h"

namespace dtokd::cuda {

extern template int launch_rule<AdamW>(const Call&, unsigned*);  // in launch_adamw.cu

int launch_update(int rule, const std::vector<Target>& targets, const std::vector<Group>& groups,
                  const Direction& direction, const Scratch& scratch, Stream stream) {
  switch (rule) {
#define DTOKD_CASE(Rule)                                                   \
  case k##Rule: {                                                          \
    const Call call(targets, groups, direction, stream, has_extras<Rule>); \
    return launch_rule<Rule>(call, scratch.tickets);                       \
  }
    DTOKD_RULES(DTOKD_CASE)
#undef DTOKD_CASE
  }
  return kInvalidValue;
}

int launch_combine(const std::vector<Gradients>& tensors, const std::vector<void*>& out,
                   const Direction& direction, Stream stream) {
  std::vector<Target> targets;
  for (size_t t = 0; t < tensors.size(); ++t) {
    targets.push_back({tensors[t], tensors[t].type, out[t], nullptr, {}, nullptr, 0});
  }
  const std::vector<Group> groups(1);
  const Call call(targets, groups, direction, stream, [](const Target&) { return false; });
  return call.for_each_kind([&](const Kind& kind) {
    return by_type(kind.type, [&](auto t) {
      using Rule = CombineRule<typename decltype(t)::T>;
      return by_objectives(direction.K,
                           [&](auto P) { return launch_update<Rule, P>(call, kind, nullptr); });
    });
  });
}

}  // namespace dtokd::cuda
