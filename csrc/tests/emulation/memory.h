// Accesses to memory that are more than C++'s own: checked for alignment, ordered, or atomic.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "machine.h"

namespace emulation {

// The shared variable that `key`, one per declaration, stands for.
template <class T>
T& shared(const void* key) {
  return *static_cast<T*>(Machine::get().shared_variable(key, sizeof(T), alignof(T)));
}

// A GPU reads and writes a value of 2, 4, 8 or 16 bytes at a multiple of its size only.
inline void check_aligned(const volatile void* p, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address % bytes != 0) {
    const Quiet quiet;
    Machine::get().fail("makes a misaligned access: " + std::to_string(bytes) +
                        " bytes at an address " + std::to_string(address % bytes) +
                        " bytes past a multiple of that");
  }
}

template <class T>
T load(const T* p) {
  check_aligned(p, sizeof(T));
  return *p;
}
template <class T>
void store(T* p, const T& value) {
  check_aligned(p, sizeof(T));
  *p = value;
}

// ---- Ordered and atomic. C++'s relaxed operations are what a GPU's are: they race with plain
// accesses, not among themselves, and order nothing unless fences do.

template <class T>
T load_acquire(const T* p) {
  check_aligned(p, sizeof(T));
  return std::atomic_ref<T>(*const_cast<T*>(p)).load(std::memory_order_acquire);
}
template <class T>
void store_release(T* p, std::type_identity_t<T> value) {
  check_aligned(p, sizeof(T));
  std::atomic_ref<T>(*p).store(value, std::memory_order_release);
}
template <class T>
T load_relaxed(const T* p) {
  check_aligned(p, sizeof(T));
  const T value = std::atomic_ref<T>(*const_cast<T*>(p)).load(std::memory_order_relaxed);
  Machine::get().atomic_operation(p);
  return value;
}
template <class T>
void store_relaxed(T* p, std::type_identity_t<T> value) {
  check_aligned(p, sizeof(T));
  std::atomic_ref<T>(*p).store(value, std::memory_order_relaxed);
  Machine::get().atomic_operation(p);
}

// Replaces *p by update(*p); returns what it was.
template <class T, class Update>
T atomic_update(T* p, const Update& update) {
  check_aligned(p, sizeof(T));
  const std::atomic_ref<T> value(*p);
  T old = value.load(std::memory_order_relaxed);
  while (!value.compare_exchange_weak(old, update(old), std::memory_order_relaxed)) {
  }
  Machine::get().atomic_operation(p);
  return old;
}

}  // namespace emulation
