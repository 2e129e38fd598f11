// Weights and coefficients on the device, by one block: every face of the simplex has a thread.
#pragma once

#include "cuda/device.h"

namespace dtokd::cuda {

// P, as in all kernels: how many objectives they are compiled for, at least K. What a thread keeps
// in arrays is multiplied by all threads a GPU could run, so it is sized by P.
constexpr int kGramSize = kMaxObjectives * kMaxObjectives;
static_assert(kThreads >= 1 << kMaxObjectives, "a thread for every face");

// NOTE [K in the code]: one block makes the weights while the others have nothing left to do, and
// its instructions are in no cache. N is K where that is known as the code is compiled, which makes
// it several times shorter, else 0.

// dtokd::min_norm_weights, to the bit. gram, weights: shared; for all threads of a block to call.
template <int P, int N>
DTOKD_OUT_OF_LINE void block_min_norm_weights(const double* gram, int objectives, unsigned present,
                                              bool clamp, double* weights) {
  const int K = N ? N : objectives;
  DTOKD_SHARED(value, double[1 << P]);
  DTOKD_SHARED(solved, bool[1 << P]);
  DTOKD_SHARED(chosen, unsigned);
  DTOKD_SHARED(inverse, double[P]);
  const unsigned face = threadIdx.x;
  double solution[P] = {0};
  if (face < unsigned(K)) inverse[face] = inverse_length(gram, K, face);
  __syncthreads();
  if (face < 1u << K) {
    solved[face] = face != 0 && !(face & ~present) &&
                   solve_face<P>(gram, inverse, K, present, face, clamp, solution, &value[face]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BestFace best;
    for (unsigned f = 1; f < 1u << K; ++f) {
      if (solved[f]) best.offer(f, value[f]);
    }
    chosen = best.mask;
  }
  __syncthreads();
  // thread 0 has the empty face: no weight for anyone
  if (face == chosen) share_equally<P>(gram, K, present, solution, weights);
  __syncthreads();
}

template <int P, int N>
DTOKD_OUT_OF_LINE void balance_of(const double (*grams)[kGramSize], const double* losses,
                                  const double* given, int objectives,
                                  const BalanceOptions& options, const Record& record,
                                  const double* weighed) {
  const int K = N ? N : objectives;
  DTOKD_SHARED(scaled, double[kGramSize]);
  DTOKD_SHARED(weights, double[kMaxObjectives]);
  DTOKD_SHARED(balance, Balance);
  if (given) {
    for (int i = threadIdx.x; i < K; i += kThreads) weights[i] = given[i];
  } else {
    for (int i = threadIdx.x; i < K * K; i += kThreads) {
      scaled[i] = scaled_entry(grams[kShared], weighed, K, options, i / K, i % K);
    }
    __syncthreads();
    block_min_norm_weights<P, N>(scaled, K, present_objectives(grams[kShared], K), options.clamp,
                                 weights);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const double* roles[kRoles];
    for (int role = 0; role < kRoles; ++role) roles[role] = grams[role];
    finish_balance(roles, losses, weights, K, options, balance);
    write_record(balance, K, record.values, record.flags);
  }
}

// dto_weights (unless weights are given) and finish_balance. grams: shared, [kRoles][K * K];
// weighed: the losses by which weights are made, null for `losses`; for all threads of a block to
// call.
template <int P>
DTOKD_DEVICE void block_balance(const double (*grams)[kGramSize], const double* losses,
                                const double* given, int K, const BalanceOptions& options,
                                const Record& record, const double* weighed = nullptr) {
  if (!weighed) weighed = losses;
  if constexpr (P == 2) {
    if (K == 2) {
      balance_of<P, 2>(grams, losses, given, K, options, record, weighed);
    } else {
      balance_of<P, 1>(grams, losses, given, K, options, record, weighed);
    }
  } else {
    balance_of<P, 0>(grams, losses, given, K, options, record, weighed);
  }
}

}  // namespace dtokd::cuda
