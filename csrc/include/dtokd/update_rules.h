// One element's update by each rule, given its combined gradient g. V is a number or a vector of
// numbers: any type with + - *, fma, sqrt, maximum and division.
//
// A new rule is a list of numbers, an entry in DTOKD_RULES and a class template: the kernels of the
// CPU and of CUDA are made from these. dtokd_kernels/rules.py has the same lists.
#pragma once

#include "numbers.h"

namespace dtokd {

// The hyper-parameters of each rule, in the order in which Python passes them. Flags are 0 or 1.
#define DTOKD_NUMBERS_AdamW(X) X(lr) X(beta1) X(beta2) X(weight_decay) X(eps) X(maximize) X(amsgrad)
#define DTOKD_NUMBERS_SGD(X) \
  X(lr) X(momentum) X(dampening) X(weight_decay) X(nesterov) X(maximize) X(first)
#define DTOKD_NUMBERS_Lion(X) X(lr) X(beta1) X(beta2) X(weight_decay) X(maximize)

// The rules, in the order of their numbers there.
#define DTOKD_RULES(X) X(AdamW) X(SGD) X(Lion)

constexpr int kMaxNumbers = 8;
constexpr int kMaxStates = 3;

#define DTOKD_RULE_NAME(Rule) k##Rule,
enum RuleNumber : int { DTOKD_RULES(DTOKD_RULE_NAME) kRules };
#undef DTOKD_RULE_NAME

// AdamWNumbers, SGDNumbers, ...: the hyper-parameters by name, and how many there are.
#define DTOKD_NUMBER(name) double name;
#define DTOKD_TAKEN(name) *from++,
#define DTOKD_RULE_NUMBERS(Rule)                                                              \
  struct Rule##Numbers {                                                                      \
    DTOKD_NUMBERS_##Rule(DTOKD_NUMBER) static DTOKD_HD Rule##Numbers of(const double* from) { \
      return {DTOKD_NUMBERS_##Rule(DTOKD_TAKEN)};                                             \
    }                                                                                         \
  };                                                                                          \
  constexpr int kNumbersOf##Rule = int(sizeof(Rule##Numbers) / sizeof(double));               \
  static_assert(kNumbersOf##Rule <= kMaxNumbers);
DTOKD_RULES(DTOKD_RULE_NUMBERS)
#undef DTOKD_RULE_NUMBERS
#undef DTOKD_TAKEN
#undef DTOKD_NUMBER

// Whether the rule's numbers say that it ascends.
inline bool maximizes(int rule, const double* numbers) {
  switch (rule) {
#define DTOKD_CASE(Rule) \
  case k##Rule:          \
    return Rule##Numbers::of(numbers).maximize != 0;
    DTOKD_RULES(DTOKD_CASE)
#undef DTOKD_CASE
  }
  return false;
}

// How many numbers a rule has; 0 if there is no such rule.
inline int numbers_of(int rule) {
  switch (rule) {
#define DTOKD_CASE(Rule) \
  case k##Rule:          \
    return kNumbersOf##Rule;
    DTOKD_RULES(DTOKD_CASE)
#undef DTOKD_CASE
  }
  return 0;
}

// What a rule is, with the scalars as V:
//   kStates        tensors of state that a parameter may have, and kRequired, the first so many,
//                  that it always has; at most one is optional
//   kCountsSteps   whether the number of the step counts
//   kApart         whether parameters with an optional state or a master copy take CUDA kernels of
//                  their own, so that the others keep more registers
//   of             the scalars, made in float64. lr: a number that may come from a device; step: 1
//                  for the first; number: from double to V
//   ()             the update. state: kStates pointers, null where a tensor has none

// AdamW (Loshchilov and Hutter, 2019), with torch's placement of the bias corrections:
//   m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2,
//   p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
// state: exp_avg (m), exp_avg_sq (v), with amsgrad max_exp_avg_sq, the running maximum of v.
template <class V>
struct AdamW {
  using Numbers = AdamWNumbers;
  static constexpr int kStates = 3, kRequired = 2;
  static constexpr bool kCountsSteps = true, kApart = true;

  V decay;  // 1 - lr * weight_decay
  V one_minus_beta1;
  V beta2;
  V one_minus_beta2;
  V negative_step_size;  // -lr / (1 - beta1^t)
  V root_correction;     // 1 / sqrt(1 - beta2^t)
  V eps;

  template <class Number>
  static DTOKD_HD AdamW of(const Numbers& n, double lr, int64_t step, const Number& number) {
    return {number(1 - lr * n.weight_decay),
            number(1 - n.beta1),
            number(n.beta2),
            number(1 - n.beta2),
            number(-lr / (1 - power(n.beta1, step))),
            number(1 / dtokd::sqrt(1 - power(n.beta2, step))),
            number(n.eps)};
  }

  DTOKD_HD void operator()(V g, V& p, V* const (&state)[kStates]) const {
    V& m = *state[0];
    V& v = *state[1];
    V* const largest = state[2];
    m = fma(one_minus_beta1, g - m, m);
    v = fma(one_minus_beta2 * g, g, beta2 * v);
    V second = v;
    if (largest) second = *largest = maximum(*largest, v);
    const V denominator = fma(sqrt(second), root_correction, eps);
    p = fma(negative_step_size, m / denominator, p * decay);
  }
};

// SGD as torch does it: momentum, dampening, Nesterov, L2 weight decay.
// state: with momentum momentum_buffer. first: it holds nothing yet.
template <class V>
struct SGD {
  using Numbers = SGDNumbers;
  static constexpr int kStates = 1, kRequired = 0;
  static constexpr bool kCountsSteps = false, kApart = false;

  V weight_decay;
  V momentum;
  V one_minus_dampening;
  V negative_lr;
  bool decays, nesterov, first;

  template <class Number>
  static DTOKD_HD SGD of(const Numbers& n, double lr, int64_t, const Number& number) {
    return {number(n.weight_decay),
            number(n.momentum),
            number(1 - n.dampening),
            number(-lr),
            n.weight_decay != 0,
            n.nesterov != 0,
            n.first != 0};
  }

  DTOKD_HD void operator()(V g, V& p, V* const (&state)[kStates]) const {
    V* const buffer = state[0];
    if (decays) g = fma(weight_decay, p, g);  // 0 times an infinite parameter would be NaN
    if (buffer) {
      *buffer = first ? g : fma(momentum, *buffer, one_minus_dampening * g);
      g = nesterov ? fma(momentum, *buffer, g) : *buffer;
    }
    p = fma(negative_lr, g, p);
  }
};

// Lion (Chen et al., 2023): c <- m + (1 - beta1) (g - m),
//   p <- p (1 - lr wd) - lr sign(c),   m <- m + (1 - beta2) (g - m)
// sign(c) is c / |c|; below the smallest normal float32 number, where that may be 0 / 0, c is
// divided by this number. state: exp_avg (m).
template <class V>
struct Lion {
  using Numbers = LionNumbers;
  static constexpr int kStates = 1, kRequired = 1;
  static constexpr bool kCountsSteps = false, kApart = false;

  V decay;  // 1 - lr * weight_decay
  V one_minus_beta1;
  V one_minus_beta2;
  V negative_lr;
  V minus_one;
  V smallest;

  template <class Number>
  static DTOKD_HD Lion of(const Numbers& n, double lr, int64_t, const Number& number) {
    return {number(1 - lr * n.weight_decay),
            number(1 - n.beta1),
            number(1 - n.beta2),
            number(-lr),
            number(-1),
            number(1.1754943508222875e-38)};
  }

  DTOKD_HD void operator()(V g, V& p, V* const (&state)[kStates]) const {
    V& m = *state[0];
    // g - m: the compiler must not take the product that g may be into the difference unrounded
    const V change = fma(minus_one, m, g);
    const V c = fma(one_minus_beta1, change, m);
    const V size = maximum(maximum(c, minus_one * c), smallest);
    p = fma(negative_lr, c / size, p * decay);
    m = fma(one_minus_beta2, change, m);
  }
};

}  // namespace dtokd
