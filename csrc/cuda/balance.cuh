// Kernels of one block, for Gram matrices that are in memory: all-reduced ones, or weights of
// another kind.
#pragma once

#include "cuda/solve.cuh"

namespace dtokd::cuda {

// One block: `block_balance` of Gram matrices that are in memory, those of an earlier step as well.
template <int P>
__global__ void __launch_bounds__(kThreads)
    balance_kernel(int K, const double* losses, const double* weights, Earlier earlier,
                   BalanceOptions options, Record record) {
  DTOKD_SHARED(grams, double[kRoles][kGramSize]);
  for (int i = threadIdx.x; i < kRoles * K * K; i += kThreads) {
    const int entry = i % (K * K);
    grams[i / (K * K)][entry] = entry_of_present(record.grams[i], earlier, entry / K, entry % K);
  }
  __syncthreads();
  block_balance<P>(grams, losses, weights, K, options, record, earlier.losses);
  if (threadIdx.x == 0 && earlier.squares) {  // which has written the record
    record.flags[1] |= !is_bounded(earlier, record.values + K, K, options.limit);
  }
}

// One block. gram: [K, K]; present: [K] or null for all; out: [K].
template <int P>
__global__ void __launch_bounds__(kThreads)
    min_norm_weights_kernel(const double* gram, int K, const bool* present, bool clamp,
                            double* out) {
  DTOKD_SHARED(copy, double[kGramSize]);
  DTOKD_SHARED(weights, double[kMaxObjectives]);
  for (int i = threadIdx.x; i < K * K; i += kThreads) copy[i] = gram[i];
  unsigned mask = 0;
  for (int i = 0; i < K; ++i) mask |= unsigned(!present || present[i]) << i;
  __syncthreads();
  block_min_norm_weights<P, 0>(copy, K, mask, clamp, weights);
  for (int i = threadIdx.x; i < K; i += kThreads) out[i] = weights[i];
}

}  // namespace dtokd::cuda
