#include "cuda/launch_gram_update.h"

namespace dtokd::cuda {

int launch_gram_adamw(const std::vector<Target>& targets, const std::vector<AdamWGroup>& groups,
                      const Direction& direction, const Scratch& scratch, double* grams,
                      Stream stream) {
  const Call<AdamWGroup> call(targets, groups, direction, stream, has_extras);
  const Slots slots(call.gradients, call.chunk);
  const GramJob gram = gram_job(call, slots, scratch, grams);
  return for_each_adamw(call, [&](auto rule, auto P, const Kind& kind) {
    return launch_gram_update<typename decltype(rule)::T, P>(call, kind, slots, gram);
  });
}

}  // namespace dtokd::cuda
