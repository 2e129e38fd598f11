// CUDA's keywords, variables, types and functions, as far as the project's kernels use them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>  // before __noinline__, which it uses
#include <source_location>
#include <type_traits>

#include "machine.h"
#include "memory.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (emulation::thread().index)
#define blockIdx (emulation::thread().block->index)
#define blockDim (emulation::Machine::get().block())
#define gridDim (emulation::Machine::get().grid())
constexpr int warpSize = emulation::kWarpSize;

// ---- Vectors. Loads and stores of 16 bytes need addresses that are multiples of it.
struct alignas(4) ushort2 {
  unsigned short x, y;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z,
                            unsigned short w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- Threads of a block and of a warp.
inline void __syncthreads(std::source_location at = std::source_location::current()) {
  emulation::Machine::get().barrier(at);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       std::source_location at = std::source_location::current()) {
  emulation::Machine::get().meet(mask, 0, at, true);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              std::source_location at = std::source_location::current()) {
  const unsigned c = unsigned(warpSize - width) << 8 | 31;
  return emulation::shuffle(emulation::Shuffle::kIndex, mask, value, source, c, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 std::source_location at = std::source_location::current()) {
  const unsigned c = unsigned(warpSize - width) << 8;
  return emulation::shuffle(emulation::Shuffle::kUp, mask, value, delta, c, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   std::source_location at = std::source_location::current()) {
  const unsigned c = unsigned(warpSize - width) << 8 | 31;
  return emulation::shuffle(emulation::Shuffle::kDown, mask, value, delta, c, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  std::source_location at = std::source_location::current()) {
  const unsigned c = unsigned(warpSize - width) << 8 | 31;
  return emulation::shuffle(emulation::Shuffle::kXor, mask, value, lane_mask, c, at);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate,
                              std::source_location at = std::source_location::current()) {
  return emulation::ballot(mask, predicate, at);
}
inline bool __any_sync(unsigned mask, bool predicate,
                       std::source_location at = std::source_location::current()) {
  return emulation::ballot(mask, predicate, at) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate,
                       std::source_location at = std::source_location::current()) {
  return emulation::ballot(mask, predicate, at) == mask;
}
inline void __nanosleep(unsigned) { emulation::Machine::get().spin(); }

// ---- Memory.
inline void __threadfence() { emulation::Machine::get().fence(); }

template <class T>
T __ldg(const T* p) {
  return emulation::load(p);
}
template <class T>
T __ldca(const T* p) {
  return emulation::load(p);
}
template <class T>
T __ldcg(const T* p) {
  return emulation::load(p);
}
template <class T>
T __ldcs(const T* p) {
  return emulation::load(p);
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  emulation::store(p, value);
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  emulation::store(p, value);
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emulation::atomic_update(p, [&](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return emulation::atomic_update(p, [&](T old) { return value > old ? value : old; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return emulation::atomic_update(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulation::atomic_update(p, [&](T old) { return old == expected ? value : old; });
}
// Counts up to `last`, then begins anew at 0.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return emulation::atomic_update(p, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- Numbers. On the GPU these are the IEEE operations that the compiler must not contract.
using std::max;
using std::min;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
