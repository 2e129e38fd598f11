#include "cuda/launch_gram_update.h"

namespace dtokd::cuda {

int launch_gram_sgd(const std::vector<Target>& targets, const std::vector<SGDGroup>& groups,
                    const Direction& direction, const Scratch& scratch, double* grams,
                    Stream stream) {
  const Call<SGDGroup> call(targets, groups, direction, stream, no_extras);
  const Slots slots(call.gradients, call.chunk);
  const GramJob gram = gram_job(call, slots, scratch, grams);
  return for_each_sgd(call, [&](auto rule, auto P, const Kind& kind) {
    return launch_gram_update<typename decltype(rule)::T, P>(call, kind, slots, gram);
  });
}

}  // namespace dtokd::cuda
