// CAGrad: near the mean gradient, the best for the worst objective.     Source: NeurIPS 2021,
// Algorithm 1. The same steps as weighting/cagrad.py, which derives them.
#pragma once

#include "faces.h"

namespace dtokd {

// gram: [K, K]; c: how far from the mean, in its length; weights: [K].
inline void cagrad_weights(const double* gram, int K, double c, double* weights) {
  const UnitGram unit(gram, K);
  double mean[kMaxObjectives], products[kMaxObjectives], right[kMaxObjectives][2];
  double square = 0;
  for (int i = 0; i < K; ++i) mean[i] = unit.norms[i] / K;
  for (int i = 0; i < K; ++i) {
    products[i] = 0;
    for (int j = 0; j < K; ++j) products[i] += unit.cosines[i][j] * mean[j];
    square += mean[i] * products[i];
    right[i][0] = unit.inverse[i];
    right[i][1] = products[i];
  }
  const double distance2 = c * c * (square < 0 ? 0 : square);
  double best_step[kMaxObjectives] = {};
  BestCandidate best;
  // d = g_0 + sum_i step_i u_i, u_i the unit gradients
  const auto offer = [&](unsigned candidate, const double* step) {
    for (int i = 0; i < K; ++i) {
      if (!(step[i] >= 0)) return;
    }
    double worst = INFINITY;
    for (int i = 0; i < K; ++i) {
      if (!(unit.norms[i] > 0)) continue;
      double gain = products[i];
      for (int j = 0; j < K; ++j) gain += unit.cosines[i][j] * step[j];
      gain *= unit.norms[i];
      worst = gain < worst ? gain : worst;
    }
    if (!best.offer(candidate, worst)) return;
    for (int i = 0; i < K; ++i) best_step[i] = step[i];
  };
  solve_on_faces<2>(unit.cosines, K, right, [&](unsigned set, const double (*x)[2]) {
    double a = 0, b = 0, length2 = 0;
    for (int i = 0; i < K; ++i) {
      a += x[i][0] * unit.inverse[i];
      b += x[i][1] * unit.inverse[i];
      length2 += x[i][1] * products[i];
    }
    const double radicand = b * b - a * (length2 - distance2);
    double step[kMaxObjectives];
    if (radicand >= 0) {
      const double lambda = a > 0 ? (b + dtokd::sqrt(radicand)) / a : 0;
      for (int i = 0; i < K; ++i) step[i] = lambda * x[i][0] - x[i][1];
      offer(set, step);
    }
    if (length2 <= distance2) {
      for (int i = 0; i < K; ++i) step[i] = -x[i][1];
      offer(set + (1u << K), step);
    }
  });
  for (int i = 0; i < K; ++i) weights[i] = 1.0 / K + best_step[i] * unit.inverse[i];
}

}  // namespace dtokd
