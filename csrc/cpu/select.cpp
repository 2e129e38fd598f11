#include "cpu/kernels.h"

namespace dtokd::cpu {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

static const Kernels* select() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return avx512_kernels();
  return avx2 ? avx2_kernels() : plain_kernels();
}

bool walk_side_by_side() {
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
}

#else

static const Kernels* select() { return plain_kernels(); }
bool walk_side_by_side() { return false; }

#endif

const Kernels& best_kernels() {
  static const Kernels& kernels = *select();
  return kernels;
}

}  // namespace dtokd::cpu
