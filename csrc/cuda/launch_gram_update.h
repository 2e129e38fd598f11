// Launches of gram_update.cuh.
#pragma once

#include "cuda/gram_update.cuh"
#include "cuda/launch_update.h"

namespace dtokd::cuda {

// A call's Gram matrices: where their parts go. grams: device, [kRoles, K, K].
inline GramJob gram_job(const Call& call, const Slots& slots, const Scratch& scratch,
                        double* grams) {
  GramJob job{};
  job.K = call.direction.K;
  job.blocks = slots.count();
  std::copy(slots.begin, slots.begin + kRoles + 1, job.slots);
  job.scratch = scratch;
  job.record.grams = grams;
  return job;
}

template <class Rule, int P>
int launch_gram_update(const Call& call, const Kind& kind, const Slots& slots,
                       const GramJob& gram) {
  using Entry = MeasuredEntry<P, Rule::kTensors>;
  const auto tables = tables_of<Rule, P, Entry>(
      call, kind, [&](Entry& entry, size_t t) { entry.first_slot = slots.first[t]; });
  const MeasuringJob job{update_job(call, kind, gram.scratch.tickets + 1), gram};
  return launch_tables(gram_update_kernel<Rule, P>, tables, job, true, call.stream);
}

// All launches of a step by one rule that measures.
template <template <class> class Formula>
int launch_gram_rule(const Call& call, const Scratch& scratch, double* grams) {
  const Slots slots(call.gradients, call.chunk);
  const GramJob gram = gram_job(call, slots, scratch, grams);
  return for_each_kind_of<Formula>(call, [&](auto rule, auto P, const Kind& kind) {
    return launch_gram_update<typename decltype(rule)::T, P>(call, kind, slots, gram);
  });
}

}  // namespace dtokd::cuda
