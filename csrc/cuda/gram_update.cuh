// An update by coefficients that are known beforehand, and the Gram matrices of the gradients that
// it reads: one pass over memory. The functions of gram.cuh and update.cuh in the same order, so
// the same bits; but for bfloat16 state of float32 parameters, where a thread takes two words of
// gradients at a time and its sums have another order (not so in parts).
#pragma once

#include "cuda/gram.cuh"
#include "cuda/update.cuh"

namespace dtokd::cuda {

template <int P, int M>
struct MeasuredEntry : UpdateEntry<P, M> {
  unsigned first_slot;
};

// gram.blocks: chunks of all launches together. update.ticket: another than the Gram's.
struct MeasuringJob {
  UpdateJob update;
  GramJob gram;
};

// The update of N elements and their products, added to `sums`.
template <class Rule, int P, int N, class Place>
DTOKD_DEVICE void update_and_add(const typename Rule::T* const (&g)[P],
                                 const typename Rule::V (&coefficients)[P], void* const* tensors,
                                 const typename Rule::Numbers& numbers, Place place, bool stored,
                                 Sums<P>& sums) {
  using T = typename Rule::T;
  typename Rule::template Elements<N> elements;
  Packed<T, N> packed[P];
  elements.load(tensors, place);
  load_gradients<T, P, N>(g, place, packed);
  add_products<T, P, N>(packed, sums.of);
  update_elements<Rule, P, N>(packed, elements, coefficients, tensors, numbers, place, stored);
}

// What a thread has of a chunk from `at` on, as single elements in the order of words.
template <class Rule, int P>
DTOKD_OUT_OF_LINE Sums<P> update_and_sum_ragged(const UpdateEntry<P, Rule::kTensors>& entry,
                                                const Shared<Rule, P>& shared, int64_t at,
                                                int64_t end, bool stored, Sums<P> sums) {
  constexpr int N = kSingles<Rule, P>;
  const typename Rule::T* g[P];
  void* tensors[Rule::kTensors];
#pragma unroll
  for (int k = 0; k < P; ++k) g[k] = static_cast<const typename Rule::T*>(entry.grads[k]);
#pragma unroll
  for (int m = 0; m < Rule::kTensors; ++m) tensors[m] = entry.tensors[m];
  const auto add = [&](auto place) {
    update_and_add<Rule, P, N>(g, shared.coefficients, tensors, shared.numbers, place, stored,
                               sums);
  };
  int i = 0;  // in the word
#pragma unroll 1
  for (; at + N <= end; at += i == 0 ? (kThreads - 1) * Rule::kElements + N : N) {
    add(Singles<1, true>{at, N});
    i = (i + N) % Rule::kElements;
  }
  if (at < end) add(Singles<1, false>{at, int(end - at)});
  return sums;
}

// A whole tile's products. Out of line, as it is long and the same for all rules.
template <class T, int P>
DTOKD_OUT_OF_LINE Sums<P> add_whole_tile(const void* const* grads, int64_t tile, Sums<P> sums) {
  add_tile<T, P, Words>(grads, tile, tile + kTile, sums);
  return sums;
}

// A chunk's update and sums in parts, tile by tile: first the sums, then the update, which reads
// the gradients again, from the L1 cache. Registers do not hold what both need.
template <class Rule, int P>
DTOKD_DEVICE Sums<P> update_and_sum_in_parts(const UpdateEntry<P, Rule::kTensors>& entry,
                                             const Shared<Rule, P>& shared, int64_t begin,
                                             int64_t end, bool stored) {
  using T = typename Rule::T;
  constexpr int N = Rule::kElements;
  Sums<P> sums{};
#pragma unroll 1
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t tile_end = tile + kTile < end ? tile + kTile : end;
    if (entry.aligned && tile_end - tile == kTile) {
      sums = add_whole_tile<T, P>(entry.grads, tile, sums);
    } else {
      sums = add_ragged_tile<T, P>(entry.grads, tile, tile_end, sums);
    }
    if (!stored) continue;
    const int64_t words_end = entry.aligned ? tile + (tile_end - tile) / N * N : tile;
#pragma unroll 1
    for (int64_t at = tile + threadIdx.x * N; at < words_end; at += kThreads * N) {
      load_and_update<Rule, P, N>(shared.grads, shared.coefficients, entry.tensors, shared.numbers,
                                  Words{at, N});
    }
    if (words_end < tile_end) update_ragged<Rule, P>(entry, shared, words_end, tile_end);
  }
  return sums;
}

// A chunk's update, if `stored`, and the calling thread's part of its sums. All gradients are read,
// those of coefficient 0 too.
template <class Rule, int P>
DTOKD_DEVICE void update_and_sum(const UpdateEntry<P, Rule::kTensors>& entry,
                                 const Shared<Rule, P>& shared, int64_t begin, int64_t end,
                                 bool stored, double (&sums)[triangle(P)]) {
  using T = typename Rule::T;
  if constexpr (kInParts<T>) {
    const Sums<P> total = update_and_sum_in_parts<Rule, P>(entry, shared, begin, end, stored);
#pragma unroll
    for (int p = 0; p < triangle(P); ++p) sums[p] = total.of[p];
    drop_absent<P>(entry.grads, sums);
    return;
  }
  constexpr int N = Rule::kElements;
  const typename Rule::Numbers numbers = shared.numbers;
  typename Rule::V coefficients[P];
  const T* g[P];
#pragma unroll
  for (int k = 0; k < P; ++k) {
    coefficients[k] = shared.coefficients[k];
    g[k] = static_cast<const T*>(entry.grads[k]);
  }
  Sums<P> total{};
  const int64_t words_end = entry.aligned ? begin + (end - begin) / N * N : begin;
  int64_t at = begin + threadIdx.x * N;
#pragma unroll 1
  for (; at < words_end; at += kThreads * N) {
    update_and_add<Rule, P, N>(g, coefficients, entry.tensors, numbers, Words{at, N}, stored,
                               total);
  }
  if (at < end) total = update_and_sum_ragged<Rule, P>(entry, shared, at, end, stored, total);
#pragma unroll
  for (int p = 0; p < triangle(P); ++p) sums[p] = total.of[p];
  drop_absent<P>(entry.grads, sums);
}

// Fewer blocks than an update alone: sums take registers too, in parts those of a group.
template <class Rule, int P>
constexpr int kMeasuringBlocks =
    kInParts<typename Rule::T> ? (P == 2 ? 2 : 1)
                               : std::max(P <= 4 ? 2 : 1, kUpdateBlocks<Rule, P> - 1);

// One block per chunk, the last chunk first. The last block of the launch counts up the table's
// steps, the last of all launches makes the Gram matrices: in any case, also of a skipped step.
template <class Rule, int P>
__global__ void __launch_bounds__(kThreads, kMeasuringBlocks<Rule, P>)
    gram_update_kernel(DTOKD_PARAMETER(Table<MeasuredEntry<P, Rule::kTensors>>) table,
                       DTOKD_PARAMETER(MeasuringJob) job) {
  DTOKD_SHARED(shared, Shared<Rule, P>);
  DTOKD_SHARED(last_of_launch, bool);
  DTOKD_SHARED(last, bool);
  const Direction& direction = job.update.direction;
  const bool stored = !(direction.skipped && *direction.skipped);
  if (table.chunks() > 0) {
    const unsigned chunk = table.chunks() - 1 - blockIdx.x;
    const int e = table.find(chunk);
    const MeasuredEntry<P, Rule::kTensors>& entry = table.entries[e];
    const Group& group = job.update.groups[entry.group];
    if (threadIdx.x < P) set_coefficient<Rule, P>(entry, group, direction, threadIdx.x, shared);
    if (threadIdx.x == 0) set_numbers<Rule, P>(entry, group, shared);
    __syncthreads();
    const int64_t begin = table.begin(chunk, e);
    double sums[triangle(P)];
    update_and_sum<Rule, P>(entry, shared, begin, table.end(begin, e), stored, sums);
    put_sums(sums, job.gram, entry.first_slot + (chunk - table.first_chunk[e]));
    __syncthreads();
    if (threadIdx.x == 0) {
      last_of_launch = Rule::kCountsSteps && is_last(job.update.ticket, table.chunks());
      last = is_last(job.gram.scratch.tickets, job.gram.blocks);
    }
  } else if (threadIdx.x == 0) {
    last_of_launch = true;
    last = job.gram.blocks == 0;  // no tensor has elements: somebody has to write zeros
  }
  __syncthreads();
  if constexpr (Rule::kCountsSteps) {
    if (last_of_launch && stored) count_steps(table);
  }
  if (!last) return;
  DTOKD_SHARED(grams, double[kRoles][kGramSize]);
  finish_grams<P>(job.gram, grams);
}

}  // namespace dtokd::cuda
