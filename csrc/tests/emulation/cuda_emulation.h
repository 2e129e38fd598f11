// Runs CUDA kernels on the CPU, for tests: from the same source as nvcc compiles, built by any
// C++20 compiler with -ffp-contract=off, so that every operation rounds as it does in the kernel's
// text.
//
// Each CUDA thread is a fiber, and one operating system thread runs them all. A launch repeats
// itself bit for bit under one schedule (DTOKD_EMULATION_SCHEDULE or Machine::schedule: forward,
// reverse, or a seed), and a correct kernel gives the same bits under all.
//
// An Error comes out of `launch` when
//   - threads of a block wait at different barriers, or one leaves the kernel that others wait for
//   - a warp operation's mask leaves out who calls, names who has left, or meets another one
//   - a shuffle reads from a lane that its mask leaves out
//   - nobody can go on (deadlock), or everybody spins
//   - a vector is read or written at an address that is no multiple of its size
//   - a block has too many threads, or too much shared memory
// and a sanitizer reports
//   - address: what goes past the end of a shared array or of a tensor
//   - undefined: what nvcc may compile into anything, such as a shift by 32
//   - thread: two threads that touch the same memory without barriers, fences or atomics to order
//     them; a missing __syncthreads, __syncwarp or __threadfence is found though the results agree
// Shared memory starts as NaN, so what is read before it is written shows in the results.
//
// Not modelled: several threads in the same instruction (so no timing, no bank conflicts and no
// coalescing), accesses that become visible in another order than they were made in, scopes
// narrower than the device, registers, caches, __constant__ and texture memory, asynchronous
// copies, dynamic parallelism. Where the hardware forgives, the emulation does not: a thread that
// returned early counts as missing at barriers. When a launch fails, its other threads are given
// up where they stand, so a kernel must not own anything that only a destructor would release.
#pragma once

#include "cuda_names.h"
#include "fibers.h"
#include "machine.h"
#include "memory.h"
#include "sanitizers.h"
#include "schedule.h"
#include "shared_memory.h"
#include "substitutes.h"
#include "warp.h"

// What kernels say in the project's own words where CUDA's keywords have no place in C++.
// csrc/cuda/device.h defines the same for nvcc.

// A variable or array of a block, such as DTOKD_SHARED(sums, double[8][4]);
#define DTOKD_SHARED(name, ...) \
  static char name##_key;       \
  auto& name = emulation::shared<__VA_ARGS__>(&name##_key)
// The memory whose size the launch gives.
#define DTOKD_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulation::Machine::get().dynamic_shared())
// In a loop that waits for another thread.
#define DTOKD_SPIN() emulation::Machine::get().spin()
