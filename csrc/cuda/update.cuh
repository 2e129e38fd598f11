// The combination d = sum_i c_i g_i and what it does to the parameters, in one pass over both. The
// chunks go from the last to the first: the Gram pass came the other way, so that the gradients it
// read last are met while still in the L2 cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/plan.h"
#include "cuda/vector_io.cuh"
#include "dtokd/update_rules.h"

namespace dtokd::cuda {

// M: tensors of one parameter.
template <int P, int M>
struct UpdateEntry {
  const void* grads[P];
  void* tensors[M];
  float* step;
  int64_t size;
  uint8_t role;
  uint8_t group;
  bool aligned;
};

// Hyper-parameters of at most this many groups fit into one launch.
constexpr int kMaxGroups = 16;

struct UpdateJob {
  Direction direction;
  unsigned* ticket;
  Group groups[kMaxGroups];
};

DTOKD_DEVICE double read(const LearningRate& lr) {
  if (!lr.device) return lr.value;
  return lr.type == Type::kFloat64 ? *static_cast<const double*>(lr.device)
                                   : double(*static_cast<const float*>(lr.device));
}

// ---- What is done with the direction: it is stored, or a rule of update_rules.h takes a step.
// Each says which numbers a block makes of a group once (Numbers), how many tensors a parameter
// has, and what happens to N elements of them (Elements): load, update by the direction d, store.
// t: the parameter's tensors.

template <class T_>
struct CombineRule {  // t: out
  using T = T_;
  using V = typename OpMath<T>::V;
  static constexpr int kTensors = 1;
  static constexpr bool kCountsSteps = false;
  static constexpr int kElements = kPerWord<T>;  // of a thread at a time
  static constexpr int kWide = 0;
  struct Numbers {};
  static void set_tensors(const Target& target, void** t) { t[0] = target.param; }
  static DTOKD_DEVICE bool ascends(const Group&) { return false; }
  static DTOKD_DEVICE Numbers numbers(const Group&, double) { return {}; }

  template <int N>
  struct Elements {
    Packed<T, N> out;

    template <class Place>
    DTOKD_DEVICE void load(void* const*, Place) {}
    DTOKD_DEVICE void update(void* const*, const Numbers&, const V (&d)[N]) { out.pack(d); }
    template <class Place>
    DTOKD_DEVICE void store(void* const* t, Place place) const {
      out.store(static_cast<T*>(t[0]), place);
    }
  };
};

// N elements of a parameter's tensor, which are read and written once. kNullable: it may be absent.
template <class S, int N, bool kNullable>
struct Streamed {
  Packed<S, N> packed;

  template <class Place>
  DTOKD_DEVICE void load(const void* from, Place place) {
    if (kNullable && !from) return;
    packed.template load<Cache::kEvictFirst>(static_cast<const S*>(from), place);
  }
  template <class V>
  DTOKD_DEVICE void unpack(const void* from, V (&x)[N]) const {
    if (!kNullable || from) packed.unpack(x);
  }
  template <class V>
  DTOKD_DEVICE void pack(const void* to, const V (&x)[N]) {
    if (!kNullable || to) packed.pack(x);
  }
  template <class Place>
  DTOKD_DEVICE void store(void* to, Place place) const {
    if (!kNullable || to) packed.store(static_cast<S*>(to), place);
  }
};

// A parameter. kMaster: it may be the rounding of a float32 master copy, which then is what counts.
template <class T, int N, bool kMaster>
struct Parameter {
  Packed<T, N> rounded;
  Packed<std::conditional_t<kMaster, float, T>, N> exact;

  template <class Place>
  DTOKD_DEVICE void load(const void* param, const void* master, Place place) {
    if constexpr (kMaster) {
      if (master) {
        exact.template load<Cache::kEvictFirst>(static_cast<const float*>(master), place);
        return;
      }
    }
    rounded.template load<Cache::kEvictFirst>(static_cast<const T*>(param), place);
  }
  template <class V>
  DTOKD_DEVICE void unpack(const void* master, V (&p)[N]) const {
    if (kMaster && master) {
      exact.unpack(p);
    } else {
      rounded.unpack(p);
    }
  }
  template <class V>
  DTOKD_DEVICE void pack(const void* master, const V (&p)[N]) {
    if (kMaster && master) exact.pack(p);
    rounded.pack(p);
  }
  template <class Place>
  DTOKD_DEVICE void store(void* param, void* master, Place place) const {
    if constexpr (kMaster) {
      if (master) exact.store(static_cast<float*>(master), place);
    }
    rounded.store(static_cast<T*>(param), place);
  }
};

// A thread takes a word of the narrower type at a time.
template <class T, class S>
constexpr int kElementsOf = kPerWord<T> > kPerWord<S> ? kPerWord<T> : kPerWord<S>;

// S: type of the state. t: parameter, the rule's state, and with kExtras the master copy; those
// that are optional, and the master copy, may be null. A rule whose kernels are not apart has
// kExtras only.
template <template <class> class Formula, class T_, class S, bool kExtras>
struct StepRule {
  using T = T_;
  using V = typename OpMath<T>::V;
  using Numbers = Formula<V>;
  static constexpr int kRequired = Numbers::kRequired;
  static constexpr int kStates = kExtras ? Numbers::kStates : kRequired;
  static constexpr int kTensors = 1 + kStates + kExtras;
  static_assert(kStates - kRequired <= 1);
  static constexpr bool kCountsSteps = Numbers::kCountsSteps;
  static constexpr int kElements = kElementsOf<T, S>;
  static constexpr int kWide =
      (sizeof(T) != sizeof(S) || sizeof(T) == 8) + 2 * (kExtras && Numbers::kApart);

  static void set_tensors(const Target& target, void** t) {
    t[0] = target.param;
    std::copy(target.state, target.state + kStates, t + 1);
    if constexpr (kExtras) t[1 + kStates] = target.master;
  }
  static DTOKD_DEVICE bool ascends(const Group& g) {
    return Numbers::Numbers::of(g.numbers).maximize != 0;
  }
  static DTOKD_DEVICE Numbers numbers(const Group& g, double step) {
    return Numbers::of(Numbers::Numbers::of(g.numbers), read(g.lr), int64_t(step),
                       [](double x) { return V(x); });
  }
  static DTOKD_DEVICE void* master(void* const* t) { return kExtras ? t[kTensors - 1] : nullptr; }

  template <int N>
  struct Elements {
    Parameter<T, N, kExtras && sizeof(T) == 2> param;
    Streamed<S, N, false> required[kRequired ? kRequired : 1];
    Streamed<S, N, true> optional[kStates > kRequired ? kStates - kRequired : 1];

    // f(state, its number): of all the rule's.
    template <class Self, class F>
    static DTOKD_DEVICE void for_each(Self& self, const F& f) {
#pragma unroll
      for (int i = 0; i < kRequired; ++i) f(self.required[i], i);
#pragma unroll
      for (int i = kRequired; i < kStates; ++i) f(self.optional[i - kRequired], i);
    }
    template <class Place>
    DTOKD_DEVICE void load(void* const* t, Place place) {
      param.load(t[0], master(t), place);
      for_each(*this, [&](auto& state, int i) { state.load(t[1 + i], place); });
    }
    DTOKD_DEVICE void update(void* const* t, const Numbers& rule, const V (&d)[N]) {
      V p[N], s[kStates ? kStates : 1][N];
      param.unpack(master(t), p);
      for_each(*this, [&](auto& state, int i) { state.unpack(t[1 + i], s[i]); });
#pragma unroll
      for (int e = 0; e < N; ++e) {
        // both ways apart, so that addresses are known when compiling and `s` stays in registers
        V* values[Numbers::kStates] = {};
#pragma unroll
        for (int i = 0; i < kRequired; ++i) values[i] = &s[i][e];
        if (kStates > kRequired && t[kStates]) {
          V* all[Numbers::kStates] = {};
#pragma unroll
          for (int i = 0; i < kStates; ++i) all[i] = &s[i][e];
          rule(d[e], p[e], all);
        } else {
          rule(d[e], p[e], values);
        }
      }
      param.pack(master(t), p);
      for_each(*this, [&](auto& state, int i) { state.pack(t[1 + i], s[i]); });
    }
    template <class Place>
    DTOKD_DEVICE void store(void* const* t, Place place) const {
      param.store(t[0], master(t), place);
      for_each(*this, [&](auto& state, int i) { state.store(t[1 + i], place); });
    }
  };
};

// ---- Kernel

// What the threads of a block share: made once, in float64, for all elements of a chunk.
template <class Rule, int P>
struct Shared {
  typename Rule::Numbers numbers;
  typename Rule::V coefficients[P];
  const typename Rule::T* grads[P];  // null if absent or of coefficient 0: not read
};

// By one thread.
template <class Rule, int P>
DTOKD_DEVICE void set_numbers(const UpdateEntry<P, Rule::kTensors>& entry, const Group& group,
                              Shared<Rule, P>& shared) {
  shared.numbers = Rule::numbers(group, entry.step ? double(*entry.step) + 1 : 0);
}

// By one thread for each of the P objectives.
template <class Rule, int P>
DTOKD_DEVICE void set_coefficient(const UpdateEntry<P, Rule::kTensors>& entry, const Group& group,
                                  const Direction& direction, int k, Shared<Rule, P>& shared) {
  double c = 0;
  if (k < direction.K) c = direction.coefficients[entry.role * direction.K + k];
  shared.coefficients[k] = typename Rule::V(Rule::ascends(group) ? -c : c);
  shared.grads[k] = c != 0 ? static_cast<const typename Rule::T*>(entry.grads[k]) : nullptr;
}

// N elements: their gradients `packed` to d, the tensors updated by it if `stored`.
template <class Rule, int P, int N, class Place>
DTOKD_DEVICE void update_elements(const Packed<typename Rule::T, N> (&packed)[P],
                                  typename Rule::template Elements<N>& elements,
                                  const typename Rule::V (&coefficients)[P], void* const* tensors,
                                  const typename Rule::Numbers& numbers, Place place,
                                  bool stored = true) {
  using V = typename Rule::V;
  V d[N] = {0};
#pragma unroll
  for (int k = 0; k < P; ++k) {
    V x[N];
    packed[k].unpack(x);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = fma(coefficients[k], x[i], d[i]);
  }
  elements.update(tensors, numbers, d);
  if (stored) elements.store(tensors, place);
}

// The same, with the gradients from memory: all loads before the first use.
template <class Rule, int P, int N, class Place>
DTOKD_DEVICE void load_and_update(const typename Rule::T* const (&g)[P],
                                  const typename Rule::V (&coefficients)[P], void* const* tensors,
                                  const typename Rule::Numbers& numbers, Place place) {
  typename Rule::template Elements<N> elements;
  Packed<typename Rule::T, N> packed[P];
  elements.load(tensors, place);
  load_gradients<typename Rule::T, P, N>(g, place, packed);
  update_elements<Rule, P, N>(packed, elements, coefficients, tensors, numbers, place);
}

// Single elements that a thread takes at a time: each of every tensor has a register of its own, of
// those that are left for them.
template <class Rule, int P>
constexpr int kSingles = Rule::kElements * (P + Rule::kTensors) <= (Rule::kWide == 0 ? 32 : 64)
                             ? Rule::kElements
                             : std::min(Rule::kElements, 4);

// Elements [begin, end) as single ones, because they are not aligned or fewer than a word. At every
// step neighbouring threads access neighbouring elements.
template <class Rule, int P>
DTOKD_OUT_OF_LINE void update_ragged(const UpdateEntry<P, Rule::kTensors>& entry,
                                     const Shared<Rule, P>& shared, int64_t begin, int64_t end) {
  constexpr int N = kSingles<Rule, P>;
  const typename Rule::T* grads[P];
  void* tensors[Rule::kTensors];  // a copy, or they are read again after every store
#pragma unroll
  for (int k = 0; k < P; ++k) grads[k] = shared.grads[k];
#pragma unroll
  for (int m = 0; m < Rule::kTensors; ++m) tensors[m] = entry.tensors[m];
  int64_t at = begin + threadIdx.x;
#pragma unroll 1
  for (; at + (N - 1) * kThreads < end; at += N * kThreads) {
    load_and_update<Rule, P, N>(grads, shared.coefficients, tensors, shared.numbers,
                                Singles<kThreads, true>{at, N * kThreads});
  }
  if (at < end) {
    load_and_update<Rule, P, N>(grads, shared.coefficients, tensors, shared.numbers,
                                Singles<kThreads, false>{at, int(end - at)});
  }
}

// Blocks that must fit on a multiprocessor: what bounds the registers of a thread. A rule that
// holds more words of 16 bytes at a time has fewer blocks, with as many loads in flight.
template <class Rule, int P>
constexpr int kUpdateBlocks = std::max(2, (P == 2   ? 4
                                           : P == 4 ? 3
                                                    : 2) -
                                              Rule::kWide);

// Counts up the steps of all tensors of a table, empty ones too.
template <class Table>
DTOKD_DEVICE void count_steps(const Table& table) {
  for (int i = threadIdx.x; i < table.count; i += kThreads) *table.entries[i].step += 1;
}

// One block per chunk. The last block, when all have read their step counters, counts up all of the
// table's.
template <class Rule, int P>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<Rule, P>)
    update_kernel(DTOKD_PARAMETER(Table<UpdateEntry<P, Rule::kTensors>>) table,
                  DTOKD_PARAMETER(UpdateJob) job) {
  DTOKD_SHARED(shared, Shared<Rule, P>);
  DTOKD_SHARED(last, bool);
  if (job.direction.skipped && *job.direction.skipped) return;
  if (table.chunks() == 0) {
    if constexpr (Rule::kCountsSteps) count_steps(table);
    return;
  }
  const unsigned chunk = table.chunks() - 1 - blockIdx.x;
  const int e = table.find(chunk);
  const UpdateEntry<P, Rule::kTensors>& entry = table.entries[e];
  const Group& group = job.groups[entry.group];
  if (threadIdx.x < P) set_coefficient<Rule, P>(entry, group, job.direction, threadIdx.x, shared);
  if (threadIdx.x == 0) set_numbers<Rule, P>(entry, group, shared);
  __syncthreads();

  const typename Rule::Numbers numbers = shared.numbers;
  typename Rule::V coefficients[P];
  const typename Rule::T* grads[P];
#pragma unroll
  for (int k = 0; k < P; ++k) {
    coefficients[k] = shared.coefficients[k];
    grads[k] = shared.grads[k];
  }
  constexpr int N = Rule::kElements;
  int64_t at = table.begin(chunk, e);
  const int64_t end = table.end(at, e);
  if (entry.aligned) {
    const int64_t words_end = at + (end - at) / N * N;
#pragma unroll 1
    for (int64_t i = at + threadIdx.x * N; i < words_end; i += kThreads * N) {
      load_and_update<Rule, P, N>(grads, coefficients, entry.tensors, numbers, Words{i, N});
    }
    at = words_end;
  }
  if (at < end) update_ragged<Rule, P>(entry, shared, at, end);
  if constexpr (Rule::kCountsSteps) {
    // at the end: its fences would keep a block's first loads waiting
    if (threadIdx.x == 0) last = is_last(job.ticket, table.chunks());
    __syncthreads();
    if (last) count_steps(table);
  }
}

}  // namespace dtokd::cuda
