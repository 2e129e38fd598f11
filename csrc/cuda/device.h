// What kernels need of the machine: CUDA itself, or its emulation on a CPU for tests.
#pragma once

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

}  // namespace dtokd::cuda

#else

#include "tests/emulation/cuda_emulation.h"

#define DTOKD_DEVICE inline
#define DTOKD_OUT_OF_LINE inline
#define DTOKD_PARAMETER(...) const __VA_ARGS__&

namespace dtokd::cuda {

inline const char* runtime_error_name(int error) { return error ? "invalid value" : "no error"; }

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Stream,
                  const Arguments&... arguments) {
  emulation::launch_kernel(kernel, blocks, threads, 0, false, arguments...);
  return 0;
}

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

}  // namespace dtokd::cuda
