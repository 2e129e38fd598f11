#include "cuda/launch_update.h"

namespace dtokd::cuda {

int launch_adamw(const std::vector<Target>& targets, const std::vector<AdamWGroup>& groups,
                 const Direction& direction, const Scratch& scratch, Stream stream) {
  const auto has_extras = [](const Target& t) { return t.state[2] || t.master; };
  return for_each_kind(targets, has_extras, [&](const auto& kinds, const Kind& kind, auto chunk) {
    return by_types(kind.type, kind.state_type, [&](auto t, auto s) {
      using T = typename decltype(t)::T;
      using S = typename decltype(s)::T;
      return by_objectives(direction.K, [&](auto P) {
        const auto launch = [&](auto rule) {
          return launch_kind<typename decltype(rule)::T, P>(targets, kinds, kind, chunk, groups,
                                                            direction, scratch.tickets, stream);
        };
        return kind.extras ? launch(Tag<AdamWRule<T, S, true>>())
                           : launch(Tag<AdamWRule<T, S, false>>());
      });
    });
  });
}

}  // namespace dtokd::cuda
