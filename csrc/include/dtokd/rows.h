// What belongs to one parameter, as kernels take it: a row for each, by addresses. On a GPU every
// address is the device's.
#pragma once

#include <cstdint>

#include "balance.h"
#include "update_rules.h"

namespace dtokd {

// The K gradients of one tensor. role: kShared, kPrivate or kPlain, says to which Gram matrix they
// add and which row of coefficients multiplies them. of: [K] of `type`, dense and laid out alike;
// null where an objective does not reach the tensor.
struct GradientRow {
  Type type;
  int role;
  int64_t size;  // elements; 0 is allowed
  const void* of[kMaxObjectives];
};

// A tensor to update, of the gradients' type, and what belongs to it; all of its size.
struct UpdateRow {
  GradientRow grads;
  Type state_type;
  void* param;
  float* master;            // float32 copy of a half parameter, which then is its rounding; or null
  void* state[kMaxStates];  // of `state_type`; null where the rule has none
  float* step;              // how many steps it has taken: counted up unless skipped; or null
  int group;                // index into the hyper-parameters
};

// lr by value, or read on the device: a scalar of `type`, kFloat32 or kFloat64.
struct LearningRate {
  double value;
  const void* device = nullptr;
  Type type = Type::kFloat32;
};

// The hyper-parameters of a parameter group, in the rule's order (update_rules.h). `lr` counts in
// the place of the first of them.
struct Group {
  LearningRate lr;
  double numbers[kMaxNumbers];
};

}  // namespace dtokd
