// Weights of the shortest convex combination of K gradients.     Source: DTO-KD, Eq. 9-12.
//
// argmin over the simplex of 1/2 pi^T G pi. The minimum lies inside some face of the simplex, where
// it is the projection of the origin on the affine hull of the face's gradients: solve every face,
// and of those without a negative weight keep the one that fulfils the condition of the minimum
// best, <g_i, d> >= ||d||^2 for all i. How exact that is: reference.min_norm_weights. K <= 8: at
// most 255 faces. The same steps as reference.min_norm_weights. P: at least K, what arrays are
// sized for, as they cost a GPU memory.
#pragma once

#include "numbers.h"

namespace dtokd {

// ||g_i - g_j||^2 below this share of ||g_i||^2 + ||g_j||^2 is rounding of the float64 Gram.
constexpr double kEqual = 1e-13;

// The corner in `mask` with the shortest gradient, the first of equal ones.
DTOKD_HD int shortest_corner(const double* gram, int K, unsigned mask) {
  int shortest = -1;
  for (int i = 0; i < K; ++i) {
    if (!(mask >> i & 1)) continue;
    if (shortest < 0 || gram[i * K + i] < gram[shortest * K + shortest]) shortest = i;
  }
  return shortest;
}

// Weights of the point nearest the origin in the affine hull of the corners in `mask`; false if its
// corners coincide. With the shortest corner r as base and d_j = g_j - g_r the condition
// <d_j, g_r + sum_k t_k d_k> = 0 is a linear system, solved by elimination without pivoting, as the
// matrix is positive definite. d_j is about as long as g_j, so entries and pivots err by a share of
// their own size. gram: [K, K], weights: [K].
template <int P = kMaxObjectives>
DTOKD_HD bool project_on_affine_hull(const double* gram, int K, unsigned mask, int base,
                                     double* weights) {
  int corners[P];
  int n = 0;  // corners besides the base
  for (int i = 0; i < K; ++i) {
    weights[i] = 0;
    if ((mask >> i & 1) && i != base) corners[n++] = i;
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

// (G x)_i
DTOKD_HD double row_product(const double* gram, int K, int i, const double* x) {
  double sum = 0;
  for (int j = 0; j < K; ++j) sum += gram[i * K + j] * x[j];
  return sum;
}

// x^T G x
DTOKD_HD double quadratic(const double* gram, int K, const double* x) {
  double sum = 0;
  for (int i = 0; i < K; ++i) sum += x[i] * row_product(gram, K, i, x);
  return sum;
}

// What a gradient's products are divided with, to be in units of its length.
DTOKD_HD double inverse_length(const double* gram, int K, int i) {
  return 1 / dtokd::sqrt(gram[i * K + i]);
}

// By how much the condition of the minimum is missed, the largest over the objectives, in units of
// ||g_i||: <g_i, d> is to be ||d||^2 for the corners in `mask`, and not less for the others.
// ||d||^2 is taken as <g_base, d>, which errs least. inverse: [K], of the gradients' lengths.
DTOKD_HD double shortfall(const double* gram, const double* inverse, int K, unsigned present,
                          unsigned mask, int base, const double* weights) {
  const double square = row_product(gram, K, base, weights);
  double largest = 0;
  for (int i = 0; i < K; ++i) {
    if (!(present >> i & 1)) continue;
    double missed = square - row_product(gram, K, i, weights);
    if ((mask >> i & 1) && missed < 0) missed = -missed;
    if (missed > 0 && missed * inverse[i] > largest) largest = missed * inverse[i];
  }
  return largest;
}

// Weights of the corners in `mask` alone, and the value by which faces compete, smaller is better;
// false if they have no solution or, with clamp, one that leaves the simplex. inverse: [K], of the
// gradients' lengths.
template <int P = kMaxObjectives>
DTOKD_HD bool solve_face(const double* gram, const double* inverse, int K, unsigned present,
                         unsigned mask, bool clamp, double* weights, double* value) {
  const int base = shortest_corner(gram, K, mask);
  if (!project_on_affine_hull<P>(gram, K, mask, base, weights)) return false;
  bool allowed = true;
  *value = 0;
  if (clamp) {
    for (int i = 0; i < K; ++i) allowed = allowed && weights[i] >= 0;
    *value = shortfall(gram, inverse, K, present, mask, base, weights);
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

// Equal gradients share their weights equally, also those that are equal by way of others. best,
// weights: [K].
template <int P = kMaxObjectives>
DTOKD_HD void share_equally(const double* gram, int K, unsigned present, const double* best,
                            double* weights) {
  int leader[P];  // the first of a group
  for (int i = 0; i < K; ++i) {
    leader[i] = present >> i & 1 ? i : -1;
    for (int j = 0; j < i && leader[i] >= 0; ++j) {
      const double squares = gram[i * K + i] + gram[j * K + j];
      if (leader[j] < 0 || !(squares - 2 * gram[i * K + j] <= kEqual * squares)) continue;
      const int first = leader[i] < leader[j] ? leader[i] : leader[j];
      const int other = leader[i] < leader[j] ? leader[j] : leader[i];
      for (int k = 0; k <= i; ++k) leader[k] = leader[k] == other ? first : leader[k];
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
  double inverse[kMaxObjectives];
  for (int i = 0; i < K; ++i) inverse[i] = inverse_length(gram, K, i);
  BestFace best;
  for (unsigned mask = 1; mask < 1u << K; ++mask) {
    double candidate[kMaxObjectives];
    double value;
    if (mask & ~present) continue;
    if (!solve_face(gram, inverse, K, present, mask, clamp, candidate, &value)) continue;
    if (!best.offer(mask, value)) continue;
    for (int i = 0; i < K; ++i) solution[i] = candidate[i];
  }
  share_equally(gram, K, present, solution, weights);
}

}  // namespace dtokd
