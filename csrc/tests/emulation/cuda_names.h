// CUDA's keywords, variables, types and functions, as far as the project's kernels use them.
#pragma once

#include <cmath>
#include <source_location>
#include <type_traits>

#include "machine.h"
#include "memory.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emulation::thread().index)
#define blockIdx (emulation::thread().block->index)
#define blockDim (emulation::Machine::get().block())
#define gridDim (emulation::Machine::get().grid())
constexpr int warpSize = emulation::kWarpSize;

// ---- Vectors, which are loaded and stored whole.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

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
