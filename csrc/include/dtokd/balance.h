// From the Gram matrix to the numbers that multiply the raw gradients. The same steps as
// reference.balance; log-gradients are g_i / L_i (DTO-KD, Eq. 8), so log L is never differentiated.
#pragma once

#include "min_norm.h"
#include "numbers.h"

namespace dtokd {

// What a parameter is to the balance: reached by all objectives, by some only, or kept out of it.
enum Role { kShared, kPrivate, kPlain };
constexpr int kRoles = 3;

struct BalanceOptions {
  bool log_gradients;
  bool clamp;
  bool rescale_sum;
  double max_norm;  // <= 0: no clipping
  double loss_floor;
  double limit;  // of a direction's elements and, squared, of coefficients: beyond it the step is
                 // skipped, as the update might overflow
};

struct Balance {
  double weights[kMaxObjectives];
  double coefficients[kRoles][kMaxObjectives];
  double cosine[kMaxObjectives * kMaxObjectives];
  double norms[kMaxObjectives];
  double norm;
  bool vertex;
  bool skipped;
};

// What a gradient is multiplied with before it is weighed: 1 / L for log-gradients.
DTOKD_HD double objective_scale(double loss, const BalanceOptions& options) {
  if (!options.log_gradients) return 1;
  return 1 / (loss > options.loss_floor ? loss : options.loss_floor);
}

// Bit i set if objective i has a gradient.
DTOKD_HD unsigned present_objectives(const double* gram, int K) {
  unsigned present = 0;
  for (int i = 0; i < K; ++i) present |= unsigned(gram[i * K + i] > 0) << i;
  return present;
}

// Everything after the weights. grams: raw [K, K], one for each role; losses, weights: [K].
DTOKD_HD void finish_balance(const double* const* grams, const double* losses,
                             const double* weights, int K, const BalanceOptions& options,
                             Balance& out) {
  const unsigned present = present_objectives(grams[0], K);
  double total = 0;
  bool finite = true;
  bool positive = true;
  for (int i = 0; i < K; ++i) {
    const double scale = objective_scale(losses[i], options);
    out.weights[i] = present >> i & 1 ? weights[i] : 0;
    out.coefficients[0][i] = out.weights[i] * scale;
    out.coefficients[1][i] = options.rescale_sum ? 1 : scale;
    out.coefficients[2][i] = 1;
    total += out.coefficients[0][i] < 0 ? -out.coefficients[0][i] : out.coefficients[0][i];
    finite = finite && is_finite(losses[i]) && is_finite(out.weights[i]);
    positive = positive && losses[i] > 0;
  }
  if (options.rescale_sum && total > 0) {
    for (int i = 0; i < K; ++i) out.coefficients[0][i] /= total;
  }
  double square = 0;
  double anything = 0;
  double reach = 0;    // K times this: no element of a combination or its parts has a larger square
  double largest = 0;  // of the coefficients' sizes
  for (int role = 0; role < kRoles; ++role) {
    const double part = quadratic(grams[role], K, out.coefficients[role]);
    square += part < 0 ? 0 : part;  // NaN stays
    double sum = 0;
    for (int i = 0; i < K; ++i) {
      const double c = out.coefficients[role][i];
      anything += grams[role][i * K + i];
      const double size = c < 0 ? -c : c;
      sum += c * grams[role][i * K + i] * c;  // in this order: the square of a large c may overflow
      largest = size > largest ? size : largest;
    }
    reach = sum > reach ? sum : reach;
  }
  out.norm = dtokd::sqrt(square);
  double clip = 1;
  if (options.max_norm > 0) {  // as torch.nn.utils.clip_grad_norm_
    const double wanted = options.max_norm / (out.norm + 1e-6);
    clip = wanted < 1 ? wanted : 1;
    for (int role = 0; role < kRoles && clip < 1; ++role) {
      for (int i = 0; i < K; ++i) out.coefficients[role][i] *= clip;
    }
  }
  const double bound = options.limit * options.limit;
  const bool fits = K * reach * clip * clip <= bound && largest * clip <= bound;
  out.skipped = !(finite && fits && is_finite(out.norm) && is_finite(anything)) || anything == 0 ||
                (options.log_gradients && !positive);
  out.vertex = false;
  for (int i = 0; i < K; ++i) {
    out.vertex = out.vertex || ((present >> i & 1) && out.weights[i] == 0);
    out.norms[i] = dtokd::sqrt(grams[0][i * K + i]);
  }
  for (int i = 0; i < K; ++i) {
    for (int j = 0; j < K; ++j) {
      const double length = out.norms[i] * out.norms[j];
      out.cosine[i * K + j] = length > 0 ? grams[0][i * K + j] / length : 0;
    }
  }
}

// Entry (i, j) of the Gram matrix that is weighed: of log-gradients, if they are asked for.
DTOKD_HD double scaled_entry(const double* gram, const double* losses, int K,
                             const BalanceOptions& options, int i, int j) {
  return objective_scale(losses[i], options) * gram[i * K + j] *
         objective_scale(losses[j], options);
}

// Gram matrices of an earlier step, which stand for those of gradients whose squares alone are
// known. losses: [K], by which weights are made; null: those of the balance. squares: [K], the
// sums of squares; null: the matrices are the gradients' own. roles: bit i set if parameters of
// role i are updated.
struct Earlier {
  const double* losses;
  const double* squares;
  unsigned roles;
};

// An entry of a Gram matrix, 0 where a gradient is absent now.
DTOKD_HD double entry_of_present(double entry, const Earlier& earlier, int i, int j) {
  const double* squares = earlier.squares;
  return squares && (squares[i] == 0 || squares[j] == 0) ? 0 : entry;
}

// Whether gradients of these squares are finite, not all zero, and their combination stays below
// the limit, whatever their angles. coefficients: [kRoles, K].
DTOKD_HD bool is_bounded(const Earlier& earlier, const double* coefficients, int K, double limit) {
  double total = 0;
  for (int i = 0; i < K; ++i) total += earlier.squares[i];
  double largest = 0;
  for (int i = 0; i < kRoles * K; ++i) {
    if (!(earlier.roles >> (i / K) & 1)) continue;
    const double size = coefficients[i] < 0 ? -coefficients[i] : coefficients[i];
    largest = size > largest ? size : largest;
  }
  return total > 0 && is_finite(total) && largest * dtokd::sqrt(K * total) <= limit;
}

// DTO-KD's own weights: min-norm point of the gradients, scaled by 1 / L for log-gradients.
DTOKD_HD void dto_weights(const double* gram, const double* losses, int K,
                          const BalanceOptions& options, double* weights) {
  double scaled[kMaxObjectives * kMaxObjectives];
  for (int i = 0; i < K; ++i) {
    for (int j = 0; j < K; ++j) scaled[i * K + j] = scaled_entry(gram, losses, K, options, i, j);
  }
  min_norm_weights(scaled, K, present_objectives(gram, K), options.clamp, weights);
}

DTOKD_HD constexpr int values_size(int K) { return 5 * K + K * K + 1; }

// values: weights [K], coefficients [kRoles, K], norms [K], cosine [K, K], norm; flags: vertex,
// skipped.
DTOKD_HD void write_record(const Balance& balance, int K, double* values, bool* flags) {
  for (int i = 0; i < K; ++i) {
    values[i] = balance.weights[i];
    for (int role = 0; role < kRoles; ++role) {
      values[(1 + role) * K + i] = balance.coefficients[role][i];
    }
    values[(1 + kRoles) * K + i] = balance.norms[i];
  }
  for (int i = 0; i < K * K; ++i) values[(2 + kRoles) * K + i] = balance.cosine[i];
  values[values_size(K) - 1] = balance.norm;
  flags[0] = balance.vertex;
  flags[1] = balance.skipped;
}

}  // namespace dtokd
