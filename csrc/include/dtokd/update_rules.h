// One element's update, given its combined gradient g. V is a number or a vector of numbers: any
// type with + - *, fma, sqrt, maximum and division. Scalars are of the type that V works in.
#pragma once

#include "numbers.h"

namespace dtokd {

// AdamW (Loshchilov and Hutter, 2019), with torch's placement of the bias corrections:
//   m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2,
//   p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
template <class V>
struct AdamW {
  V decay;  // 1 - lr * weight_decay
  V one_minus_beta1;
  V beta2;
  V one_minus_beta2;
  V negative_step_size;  // -lr / (1 - beta1^t)
  V root_correction;     // 1 / sqrt(1 - beta2^t)
  V eps;

  // step: t, this one counted. number: from double to V.
  template <class Number>
  static DTOKD_HD AdamW of(double lr, double beta1, double beta2, double weight_decay, double eps,
                           int64_t step, const Number& number) {
    return {number(1 - lr * weight_decay),
            number(1 - beta1),
            number(beta2),
            number(1 - beta2),
            number(-lr / (1 - power(beta1, step))),
            number(1 / dtokd::sqrt(1 - power(beta2, step))),
            number(eps)};
  }

  // largest: the running maximum of v (amsgrad), or null.
  DTOKD_HD void operator()(V g, V& p, V& m, V& v, V* largest) const {
    m = fma(one_minus_beta1, g - m, m);
    v = fma(one_minus_beta2 * g, g, beta2 * v);
    V second = v;
    if (largest) second = *largest = maximum(*largest, v);
    const V denominator = fma(sqrt(second), root_correction, eps);
    p = fma(negative_step_size, m / denominator, p * decay);
  }
};

// SGD as torch does it: momentum, dampening, Nesterov, L2 weight decay.
template <class V>
struct SGD {
  V weight_decay;
  V momentum;
  V one_minus_dampening;
  V negative_lr;

  // buffer: the momentum buffer, or null; first: it holds nothing yet.
  DTOKD_HD void operator()(V g, V& p, V* buffer, bool nesterov, bool first) const {
    g = fma(weight_decay, p, g);
    if (buffer) {
      *buffer = first ? g : fma(momentum, *buffer, one_minus_dampening * g);
      g = nesterov ? fma(momentum, *buffer, g) : *buffer;
    }
    p = fma(negative_lr, g, p);
  }
};

}  // namespace dtokd
