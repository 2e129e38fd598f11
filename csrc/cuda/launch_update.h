// Launches of update.cuh, for each rule in a file of its own: they are what takes long to compile.
#pragma once

#include "cuda/select.h"
#include "cuda/update.cuh"

namespace dtokd::cuda {

// What one launch has in common. groups: index of the first of the kMaxGroups that fit.
struct Kind {
  Type type, state_type;
  bool extras;
  int groups;

  bool operator==(const Kind&) const = default;
};

// One kind of targets, in one launch or as many as the tables need. Launches go from the last
// table to the first, as chunks do.
template <class Rule, int P>
int launch_kind(const std::vector<Target>& targets, const std::vector<Kind>& kinds,
                const Kind& kind, int64_t chunk, const std::vector<typename Rule::Group>& groups,
                const Direction& direction, unsigned* ticket, Stream stream) {
  constexpr int M = Rule::kTensors;
  using Entry = UpdateEntry<P, M>;
  const auto tables = make_tables<Entry>(
      targets, chunk, [&](size_t t) { return kinds[t] == kind; },
      [&](size_t t) {
        const Target& target = targets[t];
        Entry entry{};
        std::copy(target.grads.of, target.grads.of + direction.K, entry.grads);
        Rule::set_tensors(target, entry.tensors);
        entry.step = target.step;
        entry.size = target.grads.size;
        entry.role = uint8_t(target.grads.role);
        entry.group = uint8_t(target.group - kind.groups);
        entry.aligned = is_aligned(entry.grads, P) && is_aligned(entry.tensors, M);
        return entry;
      });
  UpdateJob<typename Rule::Group> job{direction, ticket, {}};
  const size_t last = std::min(groups.size(), size_t(kind.groups + kMaxGroups));
  std::copy(groups.begin() + kind.groups, groups.begin() + last, job.groups);
  for (auto table = tables.rbegin(); table != tables.rend(); ++table) {
    if (table->chunks() == 0 && !Rule::kCountsSteps) continue;
    const unsigned blocks = std::max(1u, table->chunks());
    const int error = launch_kernel(update_kernel<Rule, P>, blocks, kThreads, stream, *table, job);
    if (error) return error;
  }
  return 0;
}

// Calls launch(kinds, kind, chunk) for every kind there is, the last first. has_extras(target).
template <class HasExtras, class Launch>
int for_each_kind(const std::vector<Target>& targets, const HasExtras& has_extras,
                  const Launch& launch) {
  std::vector<Gradients> gradients;
  std::vector<Kind> kinds, distinct;
  for (const Target& t : targets) {
    gradients.push_back(t.grads);
    kinds.push_back({t.grads.type, t.state_type, has_extras(t), t.group / kMaxGroups * kMaxGroups});
    if (std::find(distinct.begin(), distinct.end(), kinds.back()) == distinct.end()) {
      distinct.push_back(kinds.back());
    }
  }
  const int64_t chunk = chunk_size(gradients);
  for (auto kind = distinct.rbegin(); kind != distinct.rend(); ++kind) {
    const int error = launch(kinds, *kind, chunk);
    if (error) return error;
  }
  return 0;
}

}  // namespace dtokd::cuda
