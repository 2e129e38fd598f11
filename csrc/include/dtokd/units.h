// The Gram matrix of gradients of length 1, so that no threshold depends on the objectives' scales.
// The same steps as weighting/_units.py.
#pragma once

#include "numbers.h"

namespace dtokd {

struct UnitGram {
  int K;
  double cosines[kMaxObjectives][kMaxObjectives];  // 0 where the Gram matrix is not finite
  double norms[kMaxObjectives];
  double inverse[kMaxObjectives];  // of the norms; 0 for a zero gradient

  // gram: [K, K]
  UnitGram(const double* gram, int K) : K(K) {
    for (int i = 0; i < K; ++i) {
      norms[i] = dtokd::sqrt(gram[i * K + i]);
      inverse[i] = norms[i] > 0 ? 1 / norms[i] : 0;
    }
    for (int i = 0; i < K; ++i) {
      for (int j = 0; j < K; ++j) {
        const double cosine = gram[i * K + j] * inverse[i] * inverse[j];
        cosines[i][j] = is_finite(cosine) ? cosine : 0;
      }
    }
  }
};

}  // namespace dtokd
