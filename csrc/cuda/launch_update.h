// Launches of update.cuh, and what those of gram_update.cuh share with them (launch_gram_update.h).
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

// One operation: the kinds of its targets, each of which takes a launch, or as many as the tables
// need. extras(target): whether it takes the kernel with extras.
struct Call {
  const std::vector<Target>& targets;
  const std::vector<Group>& groups;
  Direction direction;
  Stream stream;
  std::vector<Gradients> gradients;
  std::vector<Kind> kinds;  // of each target
  int64_t chunk;

  template <class Extras>
  Call(const std::vector<Target>& targets, const std::vector<Group>& groups,
       const Direction& direction, Stream stream, const Extras& extras)
      : targets(targets), groups(groups), direction(direction), stream(stream) {
    for (const Target& t : targets) {
      gradients.push_back(t.grads);
      kinds.push_back({t.grads.type, t.state_type, extras(t), t.group / kMaxGroups * kMaxGroups});
    }
    chunk = chunk_size(gradients);
  }

  // launch(kind) for every kind there is, the last first, as chunks go.
  template <class Launch>
  int for_each_kind(const Launch& launch) const {
    std::vector<Kind> distinct;
    for (const Kind& kind : kinds) {
      if (std::find(distinct.begin(), distinct.end(), kind) == distinct.end()) {
        distinct.push_back(kind);
      }
    }
    for (auto kind = distinct.rbegin(); kind != distinct.rend(); ++kind) {
      if (const int error = launch(*kind)) return error;
    }
    return 0;
  }
};

// The tables of one kind. extend(entry, t): sets what an Entry has more than an UpdateEntry.
template <class Rule, int P, class Entry, class Extend>
std::vector<Table<Entry>> tables_of(const Call& call, const Kind& kind, const Extend& extend) {
  return make_tables<Entry>(
      call.targets, call.chunk, [&](size_t t) { return call.kinds[t] == kind; },
      [&](size_t t) {
        const Target& target = call.targets[t];
        Entry entry{};
        std::copy(target.grads.of, target.grads.of + call.direction.K, entry.grads);
        Rule::set_tensors(target, entry.tensors);
        entry.step = target.step;
        entry.size = target.grads.size;
        entry.role = uint8_t(target.grads.role);
        entry.group = uint8_t(target.group - kind.groups);
        entry.aligned = is_aligned(entry.grads, P) && is_aligned(entry.tensors, Rule::kTensors);
        extend(entry, t);
        return entry;
      });
}

inline UpdateJob update_job(const Call& call, const Kind& kind, unsigned* ticket) {
  UpdateJob job{call.direction, ticket, {}};
  const size_t last = std::min(call.groups.size(), size_t(kind.groups + kMaxGroups));
  std::copy(call.groups.begin() + kind.groups, call.groups.begin() + last, job.groups);
  return job;
}

// A launch for each table, the last first.
template <class Kernel, class Entry, class Job>
int launch_tables(Kernel* kernel, const std::vector<Table<Entry>>& tables, const Job& job,
                  bool empty_ones, Stream stream) {
  for (auto table = tables.rbegin(); table != tables.rend(); ++table) {
    if (table->chunks() == 0 && !empty_ones) continue;
    const unsigned blocks = std::max(1u, table->chunks());
    if (const int error = launch_kernel(kernel, blocks, kThreads, stream, *table, job)) {
      return error;
    }
  }
  return 0;
}

template <class Rule, int P>
int launch_update(const Call& call, const Kind& kind, unsigned* ticket) {
  using Entry = UpdateEntry<P, Rule::kTensors>;
  const auto tables = tables_of<Rule, P, Entry>(call, kind, [](Entry&, size_t) {});
  return launch_tables(update_kernel<Rule, P>, tables, update_job(call, kind, ticket),
                       Rule::kCountsSteps, call.stream);
}

// Whether a tensor takes the rule's kernel with optional state and master copies.
template <template <class> class Formula>
bool has_extras(const Target& t) {
  using Rule = Formula<float>;
  if (!Rule::kApart || t.master) return true;
  return std::any_of(t.state + Rule::kRequired, t.state + Rule::kStates,
                     [](const void* state) { return state != nullptr; });
}

// launch(rule, P, kind) for every kind of a step by one rule; rule: a Tag.
template <template <class> class Formula, class Launch>
int for_each_kind_of(const Call& call, const Launch& launch) {
  return call.for_each_kind([&](const Kind& kind) {
    return by_types(kind.type, kind.state_type, [&](auto t, auto s) {
      using T = typename decltype(t)::T;
      using S = typename decltype(s)::T;
      return by_objectives(call.direction.K, [&](auto P) {
        if constexpr (Formula<float>::kApart) {
          if (!kind.extras) return launch(Tag<StepRule<Formula, T, S, false>>(), P, kind);
        }
        return launch(Tag<StepRule<Formula, T, S, true>>(), P, kind);
      });
    });
  });
}

// All launches of a step by one rule.
template <template <class> class Formula>
int launch_rule(const Call& call, unsigned* ticket) {
  return for_each_kind_of<Formula>(call, [&](auto rule, auto P, const Kind& kind) {
    return launch_update<typename decltype(rule)::T, P>(call, kind, ticket);
  });
}

}  // namespace dtokd::cuda
