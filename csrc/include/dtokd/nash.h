// Nash-MTL: the bargaining solution of the objectives.     Source: ICML 2022, Algorithm 1, solved
// by Newton's method. The same steps as weighting/nashmtl.py, which derives them.
#pragma once

#include "units.h"

namespace dtokd {

// Added to the cosines' diagonal: gradients that cancel have no solution, and this bounds their
// weights.
constexpr double kNashRidge = 1e-10;

// x of A x = y, both overwritten, by elimination without pivoting: A [K, K] is positive definite.
inline void solve_positive_definite(double (*A)[kMaxObjectives], double* y, int K) {
  for (int i = 0; i < K; ++i) {
    for (int k = i + 1; k < K; ++k) {
      const double factor = A[k][i] / A[i][i];
      for (int c = i + 1; c < K; ++c) A[k][c] -= factor * A[i][c];
      y[k] -= factor * y[i];
    }
  }
  for (int i = K - 1; i >= 0; --i) {
    for (int k = i + 1; k < K; ++k) y[i] -= A[i][k] * y[k];
    y[i] /= A[i][i];
  }
}

// gram: [K, K]; weights: [K], positive where there is a gradient.
inline void nash_weights(const double* gram, int K, double* weights) {
  UnitGram unit(gram, K);
  double b[kMaxObjectives];
  for (int i = 0; i < K; ++i) {
    // a zero gradient takes no part: as if it were orthogonal to all
    unit.cosines[i][i] += unit.inverse[i] > 0 ? kNashRidge : 1;
    b[i] = 1;
  }
  const int steps = 8 * (K - 1) < 32 ? 8 * (K - 1) : 32;
  for (int n = 0; n < steps; ++n) {
    double A[kMaxObjectives][kMaxObjectives], residual[kMaxObjectives], step[kMaxObjectives];
    for (int i = 0; i < K; ++i) {
      residual[i] = -1;
      for (int j = 0; j < K; ++j) {
        A[i][j] = b[i] * unit.cosines[i][j] * b[j];
        residual[i] += A[i][j];
      }
      A[i][i] += 1;
      step[i] = residual[i];
    }
    solve_positive_definite(A, step, K);
    double decrement2 = 0;
    for (int i = 0; i < K; ++i) decrement2 += residual[i] * step[i];
    const double damping = 1 / (1 + dtokd::sqrt(decrement2));
    for (int i = 0; i < K; ++i) b[i] *= 1 - step[i] * damping;
    double square = 0;
    for (int i = 0; i < K; ++i) {
      double row = 0;
      for (int j = 0; j < K; ++j) row += unit.cosines[i][j] * b[j];
      square += b[i] * row;
    }
    const double length = dtokd::sqrt(K / square);
    for (int i = 0; i < K; ++i) b[i] *= length;
  }
  for (int i = 0; i < K; ++i) weights[i] = b[i] * unit.inverse[i];
}

}  // namespace dtokd
