// The kernels for AVX-512 (F, BW, DQ, VL). Everything from the pragma on is compiled for these
// instructions; what other files share stands above it, so that no copy of it needs them.
#include "cpu/kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "dtokd/host_device.h"
#include "dtokd/numbers.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "dtokd/update_rules.h"

namespace dtokd::cpu {
namespace avx512 {

#include "cpu/vec_avx512.h"
#include "cpu/chunk_kernels.h"

}  // namespace avx512

const Kernels* avx512_kernels() {
  static const Kernels kernels{"avx512", avx512::gram, avx512::combine, avx512::update};
  return &kernels;
}

}  // namespace dtokd::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace dtokd::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace dtokd::cpu

#endif
