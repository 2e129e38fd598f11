#include "cuda/launch_update.h"

namespace dtokd::cuda {

int launch_adamw(const std::vector<Target>& targets, const std::vector<AdamWGroup>& groups,
                 const Direction& direction, const Scratch& scratch, Stream stream) {
  const Call<AdamWGroup> call(targets, groups, direction, stream, has_extras);
  return for_each_adamw(call, [&](auto rule, auto P, const Kind& kind) {
    return launch_update<typename decltype(rule)::T, P>(call, kind, scratch.tickets);
  });
}

}  // namespace dtokd::cuda
