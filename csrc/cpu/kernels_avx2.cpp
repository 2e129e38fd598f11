// The kernels for AVX2, FMA and F16C. Everything from the pragma on is compiled for these
// instructions; what other files share stands above it, so that no copy of it needs them.
#include "cpu/kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "dtokd/host_device.h"
#include "dtokd/numbers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "dtokd/update_rules.h"

namespace dtokd::cpu {
namespace avx2 {

#include "cpu/vec_avx2.h"
#include "cpu/chunk_kernels.h"

}  // namespace avx2

const Kernels* avx2_kernels() {
  static const Kernels kernels{"avx2", avx2::gram, avx2::combine, avx2::update};
  return &kernels;
}

}  // namespace dtokd::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace dtokd::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace dtokd::cpu

#endif
