// The CPU kernels: one chunk of gradient-sized memory at a time, for each set of vector
// instructions. Loops over tensors and threads are in lists.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtokd/numbers.h"

namespace dtokd::cpu {

using dtokd::size_of;
using dtokd::Type;

// Elements of a chunk. Fixed: sums are taken per chunk, so the partition decides the bits. At a
// chunk's end a core waits for what it has in flight: a quarter of this costs an update 2 %.
constexpr int64_t kChunk = 262144;

// The element at an offset from `base`; null stays null.
template <class Pointer>
Pointer element(Type type, Pointer base, int64_t offset) {
  using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char, const char>;
  return base ? static_cast<Byte*>(base) + offset * size_of(type) : nullptr;
}

// grads: K pointers to the chunk's first elements; coefficients: [K]; n: elements.
struct Gradients {
  const void* const* grads;
  const double* coefficients;
  int K;
  int64_t n;
};

struct Kernels {
  const char* name;
  // sums: [K(K+1)/2], <g_i, g_j> for i <= j, row by row
  void (*gram)(Type, const void* const* grads, int K, int64_t n, double* sums);
  // out may be one of the gradients
  void (*combine)(Type, const Gradients&, void* out);
  // rule: a RuleNumber; numbers: of the rule, in its order; step: this one counted; state:
  // [kMaxStates], null where there is none. products: as gram's sums, or null; the gradients are
  // read from memory once for both
  void (*update)(int rule, Type, const Gradients&, const double* numbers, int64_t step, void* param,
                 void* const* state, double* products);
};

// Null where the machine lacks the instructions or the compiler could not make them.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The widest that this machine can run.
const Kernels& best_kernels();

// How many parts of a chunk are walked side by side. One core is limited by the cache misses it
// keeps in flight; on Intel cores walking several parts at once keeps more (10-20 % faster), on
// AMD's the prefetchers do better with one (5-15 % faster). It never changes a result.
bool walk_side_by_side();

}  // namespace dtokd::cpu
