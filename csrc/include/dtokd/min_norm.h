// Weights of the shortest convex combination of K gradients.     Source: DTO-KD, Eq. 9-12.
//
// argmin over the simplex of 1/2 pi^T G pi. The minimum lies inside some face of the simplex, where
// it is the projection of the origin on the affine hull of the face's gradients: solve every face,
// keep the best that has no negative weight. K <= 8: at most 255 faces. The same steps as
// reference.min_norm_weights. P: at least K, what arrays are sized for, as they cost a GPU memory.
#pragma once

#include "host_device.h"

namespace dtokd {

// ||g_i - g_j||^2 below this share of ||g_i||^2 + ||g_j||^2 is rounding of the float64 Gram.
constexpr double kEqual = 1e-13;

// Weights of the point nearest the origin in the affine hull of the corners in `mask`; false if its
// corners coincide. With corner r as base and d_j = g_j - g_r the condition
// <d_j, g_r + sum_k t_k d_k> = 0 is a linear system, solved by elimination without pivoting, as the
// matrix is positive definite. gram: [K, K], weights: [K].
template <int P = kMaxObjectives>
DTOKD_HD bool project_on_affine_hull(const double* gram, int K, unsigned mask, double* weights) {
  int corners[P];
  int n = -1;  // corners besides the base
  int base = 0;
  for (int i = 0; i < K; ++i) {
    weights[i] = 0;
    if (!(mask >> i & 1)) continue;
    if (n < 0) {
      base = i;
      n = 0;
    } else {
      corners[n++] = i;
    }
  }
  double D[P][P + 1];  // the right-hand side is column n
  double floor[P];
  const double* g = gram;
  for (int i = 0; i < n; ++i) {
    const int a = corners[i];
    floor[i] = kEqual * (g[base * K + base] + g[a * K + a]);
    for (int k = 0; k < n; ++k) {
      const int b = corners[k];
      D[i][k] = g[a * K + b] - g[a * K + base] - g[base * K + b] + g[base * K + base];
    }
    D[i][n] = g[base * K + base] - g[a * K + base];
  }
  for (int i = 0; i < n; ++i) {
    if (!(D[i][i] > floor[i])) return false;
    for (int k = i + 1; k < n; ++k) {
      const double factor = D[k][i] / D[i][i];
      for (int c = i; c <= n; ++c) D[k][c] -= factor * D[i][c];
    }
  }
  double rest = 1;
  for (int i = n - 1; i >= 0; --i) {
    double t = D[i][n];
    for (int k = i + 1; k < n; ++k) t -= D[i][k] * D[k][n];
    D[i][n] = t / D[i][i];
    weights[corners[i]] = D[i][n];
    rest -= D[i][n];
  }
  weights[base] = rest;
  return true;
}

// x^T G x
DTOKD_HD double quadratic(const double* gram, int K, const double* x) {
  double sum = 0;
  for (int i = 0; i < K; ++i) {
    double row = 0;
    for (int j = 0; j < K; ++j) row += gram[i * K + j] * x[j];
    sum += x[i] * row;
  }
  return sum;
}

// Weights of the corners in `mask` alone, and the value by which faces compete, smaller is better;
// false if they have no solution or, with clamp, one that leaves the simplex.
template <int P = kMaxObjectives>
DTOKD_HD bool solve_face(const double* gram, int K, unsigned mask, bool clamp, double* weights,
                         double* value) {
  if (!project_on_affine_hull<P>(gram, K, mask, weights)) return false;
  bool allowed = true;
  *value = 0;
  if (clamp) {
    for (int i = 0; i < K; ++i) allowed = allowed && weights[i] >= 0;
    *value = quadratic(gram, K, weights);
  } else {  // the widest face that has a solution
    for (int i = 0; i < K; ++i) *value -= mask >> i & 1;
  }
  return allowed;
}

// The best of the faces offered in ascending order; mask 0 if there was none.
struct BestFace {
  unsigned mask = 0;
  double value = 0;

  DTOKD_HD bool offer(unsigned face, double face_value) {
    if (mask && !(face_value < value)) return false;
    mask = face;
    value = face_value;
    return true;
  }
};

// Equal gradients share their weights equally. best, weights: [K].
template <int P = kMaxObjectives>
DTOKD_HD void share_equally(const double* gram, int K, unsigned present, const double* best,
                            double* weights) {
  // each is grouped with the first that it equals
  int leader[P];
  for (int i = 0; i < K; ++i) {
    leader[i] = -1;
    for (int j = 0; j < K && leader[i] < 0 && (present >> i & 1); ++j) {
      const double squares = gram[i * K + i] + gram[j * K + j];
      const bool equal = i == j || squares - 2 * gram[i * K + j] <= kEqual * squares;
      if (equal && (present >> j & 1)) leader[i] = j;
    }
  }
  for (int i = 0; i < K; ++i) {
    double sum = 0;
    int count = 0;
    for (int j = 0; j < K; ++j) {
      if (leader[i] < 0 || leader[j] != leader[i]) continue;
      sum += best[j];
      ++count;
    }
    weights[i] = count ? sum / count : 0;
  }
}

// gram: [K, K] symmetric; present: bit i set if objective i may have a weight; clamp: stay on the
// simplex (false: the affine solution, Eq. 11 as printed); weights: [K], all zero if nothing is
// present.
DTOKD_HD void min_norm_weights(const double* gram, int K, unsigned present, bool clamp,
                               double* weights) {
  double solution[kMaxObjectives] = {0};
  BestFace best;
  for (unsigned mask = 1; mask < 1u << K; ++mask) {
    double candidate[kMaxObjectives];
    double value;
    if (mask & ~present || !solve_face(gram, K, mask, clamp, candidate, &value)) continue;
    if (!best.offer(mask, value)) continue;
    for (int i = 0; i < K; ++i) solution[i] = candidate[i];
  }
  share_equally(gram, K, present, solution, weights);
}

}  // namespace dtokd
