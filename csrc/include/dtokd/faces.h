// Small quadratic programs, exactly: each choice of what may differ from 0 is solved, all 2^K.
// The same steps as weighting/_faces.py, which solves all sets side by side; here they are walked
// depth first, as the elimination of a set is that of the set without its last objective, and one
// pivot more. K = 8: 256 sets cost less than nine eliminations.
#pragma once

#include "min_norm.h"
#include "units.h"

namespace dtokd {

// visit(F, x) for each set F of objectives that has a solution: x [K][R] with
// matrix_FF x_F = right_F, and 0 elsewhere. F: bit i set if objective i is in it. A pivot, sin^2 of
// the angle between a unit gradient and those before it, that is only rounding means no solution.
template <int R, class Visit>
class Faces {
 public:
  // matrix: [K, K] positive semidefinite, its diagonal 1 (or 0: that objective is in no set).
  static void solve(const double (*matrix)[kMaxObjectives], int K, const double (*right)[R],
                    Visit visit) {
    Faces faces(K, visit);
    for (int i = 0; i < K; ++i) {
      for (int j = 0; j < K; ++j) faces.levels[0].A[i][j] = matrix[i][j];
      for (int r = 0; r < R; ++r) faces.levels[0].y[i][r] = right[i][r];
    }
    visit(0u, faces.x);
    faces.descend(0, 0, 0);
  }

 private:
  // What elimination of the first pivots left of the system.
  struct Level {
    double A[kMaxObjectives][kMaxObjectives];
    double y[kMaxObjectives][R];
    int pivot;
  };

  const int K;
  Visit& visit;
  Level levels[kMaxObjectives + 1];
  double x[kMaxObjectives][R] = {};

  Faces(int K, Visit& visit) : K(K), visit(visit) {}

  // The sets that continue `set`, which has `depth` objectives, all below `next`.
  void descend(int depth, unsigned set, int next) {
    Level& level = levels[depth];
    for (int pivot = next; pivot < K; ++pivot) {
      if (!(level.A[pivot][pivot] > kEqual)) continue;
      level.pivot = pivot;
      substitute(depth);
      visit(set | 1u << pivot, x);
      if (pivot + 1 < K) {
        eliminate(depth);
        descend(depth + 1, set | 1u << pivot, pivot + 1);
      }
      for (int r = 0; r < R; ++r) x[pivot][r] = 0;
    }
  }

  void substitute(int last) {
    for (int i = last; i >= 0; --i) {
      const Level& row = levels[i];
      double sum[R];
      for (int r = 0; r < R; ++r) sum[r] = row.y[row.pivot][r];
      for (int k = last; k > i; --k) {
        const double factor = row.A[row.pivot][levels[k].pivot];
        for (int r = 0; r < R; ++r) sum[r] -= factor * x[levels[k].pivot][r];
      }
      for (int r = 0; r < R; ++r) x[row.pivot][r] = sum[r] / row.A[row.pivot][row.pivot];
    }
  }

  void eliminate(int depth) {
    const Level& level = levels[depth];
    Level& rest = levels[depth + 1];
    const int p = level.pivot;
    for (int k = p + 1; k < K; ++k) {
      const double factor = level.A[k][p] / level.A[p][p];
      for (int c = p + 1; c < K; ++c) rest.A[k][c] = level.A[k][c] - factor * level.A[p][c];
      for (int r = 0; r < R; ++r) rest.y[k][r] = level.y[k][r] - factor * level.y[p][r];
    }
  }
};

template <int R, class Visit>
inline void solve_on_faces(const double (*matrix)[kMaxObjectives], int K, const double (*right)[R],
                           Visit visit) {
  Faces<R, Visit>::solve(matrix, K, right, visit);
}

// The candidate of the largest value; of equal ones the first in the order of their numbers,
// whatever order they come in.
struct BestCandidate {
  bool any = false;
  unsigned number = 0;
  double value = 0;

  bool offer(unsigned candidate, double candidate_value) {
    const bool better = candidate_value > value || (candidate_value == value && candidate < number);
    if (any && !better) return false;
    any = true;
    number = candidate;
    value = candidate_value;
    return true;
  }
};

// Weights [K] of the mean of R combinations of unit gradients, each projected on the directions
// that conflict with no gradient: for each row u of lower [R][K] the v >= u of the shortest one.
// Source: UPGrad (Quinton and Rey, 2024), Proposition 1; GEM (NeurIPS 2017), Eq. 11.
template <int R>
inline void project_on_dual_cone(const UnitGram& unit, const double (*lower)[kMaxObjectives],
                                 int rows, double* weights) {
  const int K = unit.K;
  // v = u + x: x >= 0, and where x_i > 0 the combination is orthogonal to g_i
  double right[kMaxObjectives][R] = {};
  double added[R][kMaxObjectives] = {};
  for (int i = 0; i < K; ++i) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < K; ++j) right[i][r] -= unit.cosines[i][j] * lower[r][j];
    }
  }
  BestCandidate best[R];
  solve_on_faces<R>(unit.cosines, K, right, [&](unsigned set, const double (*x)[R]) {
    for (int r = 0; r < rows; ++r) {
      bool allowed = true;
      double gain = 0;  // v^T G v = u^T G u - gain
      for (int i = 0; i < K; ++i) {
        allowed = allowed && x[i][r] >= 0;
        gain += right[i][r] * x[i][r];
      }
      if (!allowed || !best[r].offer(set, gain)) continue;
      for (int i = 0; i < K; ++i) added[r][i] = x[i][r];
    }
  });
  for (int i = 0; i < K; ++i) {
    double sum = 0;
    for (int r = 0; r < rows; ++r) sum += (lower[r][i] + added[r][i]) * unit.inverse[i];
    weights[i] = sum / rows;
  }
}

// gram: [K, K]; each: project each gradient and take the mean (UPGrad), or project the mean
// (DualProj); weights: [K].
inline void dual_cone_weights(const double* gram, int K, bool each, double* weights) {
  const UnitGram unit(gram, K);
  double lower[kMaxObjectives][kMaxObjectives] = {};
  for (int i = 0; i < K; ++i) {
    if (each) {
      lower[i][i] = unit.norms[i];
    } else {
      lower[0][i] = unit.norms[i] / K;
    }
  }
  if (each) {
    project_on_dual_cone<kMaxObjectives>(unit, lower, K, weights);
  } else {
    project_on_dual_cone<1>(unit, lower, 1, weights);
  }
}

}  // namespace dtokd
