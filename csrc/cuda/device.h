// What kernels need of the machine: CUDA itself, or its emulation on a CPU for tests.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/launch.h"

#ifdef __CUDACC__

#define DTOKD_DEVICE __device__ __forceinline__
// Rare paths, kept out of the main loops' instructions. A test that runs PTX without calls
// redefines it.
#ifndef DTOKD_OUT_OF_LINE
#define DTOKD_OUT_OF_LINE __device__ __noinline__
#endif
#define DTOKD_SHARED(name, ...) __shared__ dtokd::cuda::Same<__VA_ARGS__> name
#define DTOKD_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char dtokd_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dtokd_dynamic_shared)
#define DTOKD_SPIN() __nanosleep(20)
// A kernel's parameter that stays in constant memory: no copy per thread.
#define DTOKD_PARAMETER(...) const __grid_constant__ __VA_ARGS__

namespace dtokd::cuda {

// int[3] as a name that can be declared with: Same<int[3]> x.
template <class T>
using Same = T;

DTOKD_DEVICE unsigned ld_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

inline const char* runtime_error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Stream stream,
                  const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return int(cudaGetLastError());
}

// What a device can run of a kernel at one time.
struct Residency {
  int blocks = 0;                // 0: none, or not together
  int dynamic_shared_bytes = 0;  // of each
};

// With so many blocks on a multiprocessor, and all the shared memory that leaves to each.
template <class Kernel>
Residency ask_residency(Kernel* kernel, int threads, int blocks_per_multiprocessor) {
  int device, cooperative, multiprocessors, shared, reserved, most;
  cudaFuncAttributes attributes;
  const auto get = [&](cudaDeviceAttr attribute, int* value) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  if (cudaGetDevice(&device) || cudaFuncGetAttributes(&attributes, kernel) ||
      !get(cudaDevAttrCooperativeLaunch, &cooperative) || !cooperative ||
      !get(cudaDevAttrMultiProcessorCount, &multiprocessors) ||
      !get(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared) ||
      !get(cudaDevAttrReservedSharedMemoryPerBlock, &reserved) ||
      !get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most)) {
    cudaGetLastError();  // other launches do without: forget it
    return {};
  }
  Residency result;
  result.dynamic_shared_bytes = std::min(shared / blocks_per_multiprocessor - reserved, most) -
                                int(attributes.sharedSizeBytes);
  int together = 0;
  if (result.dynamic_shared_bytes < 0 ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           result.dynamic_shared_bytes) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&together, kernel, threads,
                                                    result.dynamic_shared_bytes)) {
    cudaGetLastError();
    return {};
  }
  result.blocks = together * multiprocessors;
  return result;
}

// The same, asked once for each device, kernel and shape: it takes nine calls of the runtime.
template <class Kernel>
Residency residency(Kernel* kernel, int threads, int blocks_per_multiprocessor) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, Residency> known;
  int device = 0;
  if (cudaGetDevice(&device)) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(
      {device, reinterpret_cast<const void*>(kernel), threads, blocks_per_multiprocessor});
  if (is_new) found->second = ask_residency(kernel, threads, blocks_per_multiprocessor);
  return found->second;
}

template <class... Parameters>
int launch_cooperative(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                       size_t dynamic_shared_bytes, Stream stream,
                       const std::remove_cv_t<Parameters>&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const cudaError_t error =
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), blocks, threads, pointers,
                                  dynamic_shared_bytes, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return 0;
  cudaGetLastError();  // said already
  // another process has a part of the device
  return error == cudaErrorCooperativeLaunchTooLarge ? kUnfit : int(error);
}

}  // namespace dtokd::cuda

#else

#include "tests/emulation/cuda_emulation.h"

#define DTOKD_DEVICE inline
#define DTOKD_OUT_OF_LINE inline
#define DTOKD_PARAMETER(...) const __VA_ARGS__&

namespace dtokd::cuda {

// Without launches what is left of an operation is the host's part: benchmarks/host.py measures it.
#ifdef DTOKD_NO_LAUNCHES
constexpr bool kLaunches = false;
#else
constexpr bool kLaunches = true;
#endif

inline const char* runtime_error_name(int error) { return error ? "invalid value" : "no error"; }

// Launches before one that fails; negative: none does. Tests set it.
inline int launches_before_failure{-1};
extern "C" __attribute__((used, visibility("default"))) inline void dtokd_fail_after(int launches) {
  launches_before_failure = launches;
}
inline bool launch_fails() {
  return launches_before_failure >= 0 && launches_before_failure-- == 0;
}

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Stream,
                  const Arguments&... arguments) {
  if (launch_fails()) return 1;
  if (kLaunches) emulation::launch_kernel(kernel, blocks, threads, 0, false, arguments...);
  return 0;
}

struct Residency {
  int blocks;
  int dynamic_shared_bytes;
};

// What the emulated device can run at one time; tests change it.
inline Residency emulated_residency{kLaunches ? 4 : 264, 64 << 10};

template <class Kernel>
Residency residency(Kernel*, int, int) {
  return emulated_residency;
}

template <class... Parameters, class... Arguments>
int launch_cooperative(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                       size_t dynamic_shared_bytes, Stream, const Arguments&... arguments) {
  if (launch_fails()) return 1;
  if (kLaunches) {
    emulation::launch_kernel(kernel, blocks, threads, dynamic_shared_bytes, true, arguments...);
  }
  return 0;
}

inline unsigned ld_acquire(const unsigned* p) { return emulation::load_acquire(p); }

}  // namespace dtokd::cuda

#endif

namespace dtokd::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kWordBytes = 16;  // what one instruction loads or stores at most

// Counts the block among those of one operation's launches; true for the last, which then sees what
// all others did before. The counter wraps to 0 by itself. To be called by one thread, between
// barriers of its block: what the others of the block wrote is passed on only by the fence of the
// thread that counts, and what other blocks wrote is seen by those that meet this thread after its
// second fence (PTX, release and acquire patterns).
DTOKD_DEVICE bool is_last(unsigned* ticket, unsigned total) {
  __threadfence();
  const bool last = atomicInc(ticket, total - 1) == total - 1;
  __threadfence();
  return last;
}

// All blocks of a cooperative launch wait for one another here; once in a launch. words: [3], zero,
// and zero again afterwards.
DTOKD_DEVICE void grid_barrier(unsigned* words) {
  unsigned* const arrived = words;
  unsigned* const open = words + 1;
  unsigned* const left = words + 2;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (is_last(arrived, gridDim.x)) {
      atomicExch(open, 1u);
    } else {
      while (ld_acquire(open) == 0) DTOKD_SPIN();
    }
    if (is_last(left, gridDim.x)) atomicExch(open, 0u);
  }
  __syncthreads();
}

}  // namespace dtokd::cuda
