// What the torch-free headers need to be compiled for the host and for a GPU alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DTOKD_HD __host__ __device__ __forceinline__
#else
#define DTOKD_INLINE __attribute__((always_inline))
#define DTOKD_HD inline DTOKD_INLINE
#endif

namespace dtokd {

constexpr int kMaxObjectives = 8;
// Entries of the upper triangle of a symmetric [K, K] matrix.
DTOKD_HD constexpr int triangle(int K) { return K * (K + 1) / 2; }

}  // namespace dtokd
