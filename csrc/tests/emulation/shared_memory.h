// The shared memory of a block.
#pragma once

#include <cstddef>
#include <cstring>
#include <map>
#include <new>

#include "sanitizers.h"

namespace emulation {

// One shared variable or array: a heap block of exactly its size, so that the address sanitizer
// sees what goes past its end, or more than 8 bytes before its start; aligned to `alignment` but to
// no more, so that an access that needs more is seen; filled with ones (NaN), so that nobody takes
// it for initialised.
class SharedArray {
 public:
  SharedArray(size_t bytes, size_t alignment)
      : offset_(alignment < 16 ? 16 + alignment : alignment),
        start_(static_cast<char*>(::operator new(offset_ + bytes, kHeapAlignment))) {
    std::memset(data(), 0xff, bytes);
    poison(start_, offset_);
  }
  SharedArray(const SharedArray&) = delete;
  SharedArray& operator=(const SharedArray&) = delete;
  ~SharedArray() {
    unpoison(start_, offset_);
    ::operator delete(start_, kHeapAlignment);
  }
  void* data() const { return start_ + offset_; }

 private:
  static constexpr std::align_val_t kHeapAlignment{256};
  size_t offset_;
  char* start_;
};

class SharedMemory {
 public:
  // What nvcc grants variables, and what the largest device, sm_90, grants a block in all.
  static constexpr size_t kMaxStaticBytes = 48 << 10;
  static constexpr size_t kMaxBytes = 227 << 10;

  // The variable whose declaration has address `key`; made when a block's first thread asks.
  void* variable(const void* key, size_t bytes, size_t alignment) {
    auto [at, is_new] = variables_.try_emplace(key, bytes, alignment);
    if (is_new) static_bytes_ += bytes;
    return at->second.data();
  }
  size_t static_bytes() const { return static_bytes_; }

 private:
  std::map<const void*, SharedArray> variables_;
  size_t static_bytes_ = 0;
};

}  // namespace emulation
