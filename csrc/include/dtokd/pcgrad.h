// PCGrad: each gradient without the parts that point against another.     Source: gradient surgery,
// NeurIPS 2020, Algorithm 1, on the Gram matrix. The same steps as weighting/pcgrad.py.
#pragma once

#include "numbers.h"
#include "random.h"

namespace dtokd {

// The order in which K numbers ascend.
inline void ascending(const double* numbers, int K, int* order) {
  for (int i = 0; i < K; ++i) {
    int place = i;
    for (; place > 0 && numbers[order[place - 1]] > numbers[i]; --place) {
      order[place] = order[place - 1];
    }
    order[place] = i;
  }
}

// gram: [K, K]; seed, step: of the random orders; weights: [K].
inline void pcgrad_weights(const double* gram, int K, int64_t seed, int64_t step, double* weights) {
  SplitMix64 random(seed, step, int64_t(K) * K);
  for (int i = 0; i < K; ++i) weights[i] = 0;
  for (int i = 0; i < K; ++i) {
    double drawn[kMaxObjectives];
    int partners[kMaxObjectives];
    for (int k = 0; k < K; ++k) drawn[k] = random.uniform();
    ascending(drawn, K, partners);
    double row[kMaxObjectives] = {};  // what the projected g_i takes of each gradient
    row[i] = 1;
    for (int k = 0; k < K; ++k) {
      const double* other = gram + partners[k] * K;
      double product = 0;
      for (int j = 0; j < K; ++j) product += other[j] * row[j];
      const double square = other[partners[k]];
      if (partners[k] == i || !(product < 0) || !(square > 0)) continue;
      row[partners[k]] -= product * (1 / square);
    }
    for (int j = 0; j < K; ++j) weights[j] += row[j];
  }
}

}  // namespace dtokd
