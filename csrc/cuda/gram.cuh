// The Gram matrices of K gradients, one for each role, in one read of the gradients.
//
// NOTE [Gram sums on a GPU]: products of float32, bf16 and f16 are exact in float64, so that nearly
// parallel gradients keep their difference, as on the CPU. An element costs K conversions and
// K (K + 1) / 2 multiply-adds in float64. A model, not a measurement, of K = 2 in float32, which
// reads 8 bytes: an H100 has 64 multiply-adds and 16 conversions a clock and multiprocessor, and
// memory feeds it 1.8 such elements a clock, so it uses a tenth of the one and a quarter of the
// other; an A100 and a B200 alike. GPUs with 2 a clock take float32 for most of it, as exactly:
// NOTE [Sums in parts].
//
// NOTE [Same bits]: element -> thread is fixed, each thread adds its elements in order, a warp its
// lanes by butterfly, a block its warps in order, into the chunk's slot; the last block to finish
// adds the slots the same way. No atomic operation touches a number.
#pragma once

#include "cuda/parts.cuh"
#include "cuda/plan.h"
#include "cuda/solve.cuh"

namespace dtokd::cuda {

// The pointers beyond K are null.
template <int P>
struct GramEntry {
  const void* grads[P];
  int64_t size;
  unsigned first_slot;
  bool aligned;
};

struct GramJob {
  int K;
  unsigned blocks;  // of all launches together
  unsigned slots[kRoles + 1];
  Scratch scratch;
  Record record;
  const double* losses;  // null: Gram matrices only
  BalanceOptions options;
};

// The sum of s[i] over the lanes of a warp, for all i. At every step the lanes of a pair share the
// sums that are left between them, so that N sums take about N exchanges and not 5 N. Written to
// out[i] by one lane each.
template <int N>
DTOKD_DEVICE void warp_sums(const double (&s)[N], double* out) {
  const int lane = threadIdx.x % 32;
  double mine[N];
#pragma unroll
  for (int i = 0; i < N; ++i) mine[i] = s[i];
  int first = 0;  // mine[i] is of sum first + i, for i < count
  int count = N;
  bool owner = true;
  int n = N;  // the largest count of any lane
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const bool upper = lane & step;
    if (n > 1) {
      const int half = (n + 1) / 2;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i >= half) continue;
        const double low = mine[i];
        const double high = i + half < n ? mine[i + half] : 0;
        mine[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, step);
      }
      first += upper ? half : 0;
      count = upper ? count - half : count < half ? count : half;
      n = half;
    } else {
      mine[0] += __shfl_xor_sync(0xffffffff, mine[0], step);
      owner = owner && !upper;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n && i < count && owner) out[first + i] = mine[i];
  }
}

// The sum of s[i] over the threads of a block: thread i < N gets it. For all threads to call.
template <int N>
DTOKD_DEVICE double block_sum(const double (&s)[N]) {
  DTOKD_SHARED(sums, double[kWarps][N]);
  __syncthreads();  // the last call's sums have been read
  warp_sums(s, sums[threadIdx.x / 32]);
  __syncthreads();
  double total = 0;
  if (threadIdx.x < N) {
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][threadIdx.x];
  }
  return total;
}

// Adds the products of N elements of each gradient.
template <class T, int P, int N>
DTOKD_DEVICE void add_products(const Packed<T, N> (&packed)[P], double (&sums)[triangle(P)]) {
  double x[P][N];
#pragma unroll
  for (int k = 0; k < P; ++k) packed[k].unpack(x[k]);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    int p = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
#pragma unroll
      for (int j = i; j < P; ++j, ++p) sums[p] = fma(x[i][e], x[j][e], sums[p]);
    }
  }
}

// Where in a tile a thread's word number u is.
template <class T>
DTOKD_DEVICE int place_in_tile(int u) {
  return int(u * kThreads + threadIdx.x % kThreads) * kPerWord<T>;
}

template <int P>
struct Sums {
  double of[triangle(P)];
};

// A group that parts cannot do, in float64, read again. By value, as sums that have an address are
// kept in memory.
template <class T, int P>
DTOKD_OUT_OF_LINE Sums<P> add_again(const void* const* grads, int64_t tile, int first, int left,
                                    Sums<P> sums) {
  constexpr int N = kPerWord<T>;
  const T* g[P];
#pragma unroll
  for (int k = 0; k < P; ++k) g[k] = static_cast<const T*>(grads[k]);
#pragma unroll 1
  for (int u = first; u < first + kGroupElements<P> / N; ++u) {
    const int at = place_in_tile<T>(u);
    Packed<T, N> packed[P];
    load_gradients<T, P, N>(g, Singles<1, false>{tile + at, left - at}, packed);
    add_products<T, P, N>(packed, sums.of);
  }
  return sums;
}

// Adds the products of W words of N elements, which are the calling thread's words `first` and
// after of a tile of which `left` elements are there.
template <class T, int P, int N, int W>
DTOKD_DEVICE void add_group(const Packed<T, N> (&packed)[W][P], const void* const* grads,
                            int64_t tile, int first, int left, Sums<P>& sums) {
  if constexpr (kInParts<T>) {
    if (!add_in_parts<T>(packed, sums.of)) {
      sums = add_again<T, P>(grads, tile, first, left, sums);
    }
  } else {
#pragma unroll
    for (int u = 0; u < W; ++u) add_products<T, P, N>(packed[u], sums.of);
  }
}

// Words of each gradient that a thread has of a tile, and how many it loads before it computes.
template <class T>
constexpr int kTileWords = kTile / kThreads / kPerWord<T>;
template <class T, int P>
constexpr int kStageWords = kInParts<T>             ? kGroupElements<P> / kPerWord<T>
                            : kTileWords<T> < 8 / P ? kTileWords<T>
                                                    : 8 / P;

// Adds the products of a tile that ends at `end` or before. Place: Words for a tile that is whole
// and aligned; Singles<1, true> for a whole one, Singles<1, false> for any, with the same bits.
template <class T, int P, class Place>
DTOKD_DEVICE void add_tile(const void* const* grads, int64_t tile, int64_t end, Sums<P>& sums) {
  constexpr int N = kPerWord<T>;
  constexpr int kStage = kStageWords<T, P>;
  const T* g[P];
#pragma unroll
  for (int k = 0; k < P; ++k) g[k] = static_cast<const T*>(grads[k]);
  const int left = end - tile < kTile ? int(end - tile) : kTile;
#pragma unroll 1
  for (int first = 0; first < kTileWords<T>; first += kStage) {
    if (std::is_same_v<Place, Singles<1, false>> && place_in_tile<T>(first) >= left) break;
    Packed<T, N> packed[kStage][P];
#pragma unroll
    for (int u = 0; u < kStage; ++u) {
      const int at = place_in_tile<T>(first + u);
      load_gradients<T, P, N>(g, Place{tile + at, left - at}, packed[u]);
    }
    add_group<T, P>(packed, grads, tile, first, left, sums);
  }
}

// The same, of a tile that is not whole or not aligned. For a gradient that is not there another
// one is read, so that no load depends on a branch: its sums are dropped.
template <class T, int P>
DTOKD_OUT_OF_LINE Sums<P> add_ragged_tile(const void* const* grads, int64_t tile, int64_t end,
                                          Sums<P> sums) {
  const void* any = nullptr;
#pragma unroll
  for (int k = 0; k < P; ++k) any = grads[k] ? grads[k] : any;
  if (!any) return sums;
  const void* there[P];
#pragma unroll
  for (int k = 0; k < P; ++k) there[k] = grads[k] ? grads[k] : any;
  if (end - tile >= kTile) {
    add_tile<T, P, Singles<1, true>>(there, tile, end, sums);
  } else {
    add_tile<T, P, Singles<1, false>>(there, tile, end, sums);
  }
  return sums;
}

// Exactly 0 for a gradient that is not there, whatever the others hold.
template <int P>
DTOKD_DEVICE void drop_absent(const void* const (&g)[P], double (&sums)[triangle(P)]) {
  int p = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
#pragma unroll
    for (int j = i; j < P; ++j, ++p) sums[p] = g[i] && g[j] ? sums[p] : 0;
  }
}

// The calling thread's part of a chunk's sums.
template <class T, int P>
DTOKD_DEVICE void chunk_sums(const GramEntry<P>& entry, int64_t begin, int64_t end,
                             double (&sums)[triangle(P)]) {
  Sums<P> total{};
  int64_t tile = begin;
  if (entry.aligned) {
#pragma unroll 1
    for (; tile + kTile <= end; tile += kTile) add_tile<T, P, Words>(entry.grads, tile, end, total);
  }
#pragma unroll 1
  for (; tile < end; tile += kTile) {
    total = add_ragged_tile<T, P>(entry.grads, tile, end, total);
  }
#pragma unroll
  for (int p = 0; p < triangle(P); ++p) sums[p] = total.of[p];
  drop_absent<P>(entry.grads, sums);
}

// A chunk's sums of all threads into its slot. For all threads of a block to call.
template <int N>
DTOKD_DEVICE void put_sums(const double (&sums)[N], const GramJob& job, unsigned slot) {
  const double total = block_sum(sums);
  if (threadIdx.x < N) job.scratch.partials[size_t(slot) * N + threadIdx.x] = total;
}

// Adds up the slots of every role. grams: shared, [kRoles][K * K]. For all threads of a block.
template <int P>
DTOKD_DEVICE void add_slots(const GramJob& job, double (*grams)[kGramSize]) {
  constexpr int kPairs = triangle(P);
  constexpr int kAhead = P <= 2 ? 4 : 1;  // slots whose loads are on their way together
  const int K = job.K;
  int row = 0;  // of pair number threadIdx.x in the triangle
  int column = threadIdx.x;
  for (int length = P; row < P && column >= length; --length, ++row) column -= length;
  column += row;
  for (int role = 0; role < kRoles; ++role) {
    double sums[kPairs] = {0};
    const unsigned end = job.slots[role + 1];
#pragma unroll 1
    for (unsigned slot = job.slots[role] + threadIdx.x; slot < end; slot += kAhead * kThreads) {
      double parts[kAhead][kPairs];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        // of the last slot where there is none, so that no load depends on a branch
        const unsigned there = slot + a * kThreads < end ? slot + a * kThreads : end - 1;
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          parts[a][p] = __ldcg(job.scratch.partials + size_t(there) * kPairs + p);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          sums[p] += slot + a * kThreads < end ? parts[a][p] : 0;
        }
      }
    }
    const double total = block_sum(sums);
    if (threadIdx.x < kPairs && column < K) {
      grams[role][row * K + column] = grams[role][column * K + row] = total;
    }
  }
  __syncthreads();
}

// The same into the record too: what the last block of all does.
template <int P>
DTOKD_DEVICE void finish_grams(const GramJob& job, double (*grams)[kGramSize]) {
  add_slots<P>(job, grams);
  const int size = job.K * job.K;
  for (int i = threadIdx.x; i < kRoles * size; i += kThreads) {
    job.record.grams[i] = grams[i / size][i % size];
  }
}

// One block per chunk; the last of all to finish makes the Gram matrices and, if there are losses,
// the balance.
template <class T, int P>
__global__ void __launch_bounds__(kThreads, P == 2   ? 4 - kInParts<T>
                                            : P == 4 ? 2
                                                     : 1)
    gram_kernel(DTOKD_PARAMETER(Table<GramEntry<P>>) table, DTOKD_PARAMETER(GramJob) job) {
  DTOKD_SHARED(last, bool);
  if (table.count > 0) {
    const int e = table.find(blockIdx.x);
    const GramEntry<P>& entry = table.entries[e];
    const int64_t begin = table.begin(blockIdx.x, e);
    double sums[triangle(P)];
    chunk_sums<T, P>(entry, begin, table.end(begin, e), sums);
    put_sums(sums, job, entry.first_slot + (blockIdx.x - table.first_chunk[e]));
    __syncthreads();
  }
  if (threadIdx.x == 0) last = is_last(job.scratch.tickets, job.blocks);
  __syncthreads();
  if (!last) return;
  DTOKD_SHARED(grams, double[kRoles][kGramSize]);
  finish_grams<P>(job, grams);
  if (job.losses) {
    block_balance<P>(grams, job.losses, nullptr, job.K, job.options, job.record);
  }
}

}  // namespace dtokd::cuda
