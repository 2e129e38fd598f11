// What the sanitizers must be told of fibers, of memory, and of what orders two accesses to it.
// Without a sanitizer every function here is empty.
#pragma once

#include <cstddef>

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

// ---- Address sanitizer: which stack is in use, and which memory is out of bounds.
#ifdef __SANITIZE_ADDRESS__
inline void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
inline void finish_switch(void* fake_stack, const void** old_bottom, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
}
#else
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

// ---- Thread sanitizer: each fiber is a thread to it, and a switch orders nothing.
#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;

inline void* current_sanitizer_fiber() { return __tsan_get_current_fiber(); }
inline void* create_sanitizer_fiber() { return __tsan_create_fiber(0); }
inline void destroy_sanitizer_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void switch_sanitizer_fiber(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}

// All that this thread did or saw so far happens before what follows an `observe` of the token.
inline void publish(const void* token) { __tsan_release(const_cast<void*>(token)); }
inline void observe(const void* token) { __tsan_acquire(const_cast<void*>(token)); }

// `publish` in the name of another thread.
inline void publish_as(void* fiber, void* self, const void* token) {
  switch_sanitizer_fiber(fiber);
  publish(token);
  switch_sanitizer_fiber(self);
}

// While one lives, accesses are the emulation's own, and no concern of the sanitizer's.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool kThreadSanitizer = false;

inline void* current_sanitizer_fiber() { return nullptr; }
inline void* create_sanitizer_fiber() { return nullptr; }
inline void destroy_sanitizer_fiber(void*) {}
inline void switch_sanitizer_fiber(void*) {}
inline void publish(const void*) {}
inline void publish_as(void*, void*, const void*) {}
inline void observe(const void*) {}
struct Quiet {
  ~Quiet() {}  // not trivial, so that no compiler calls it unused
};
#endif

inline void start_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                         [[maybe_unused]] size_t bytes, [[maybe_unused]] void* fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#endif
  switch_sanitizer_fiber(fiber);
}

// NOTE [Fences and relaxed atomics]: an atomic operation orders nothing by itself. What a thread
// did before a fence happens before what another does after its own fence, if the first then did
// an atomic operation on a location where the second saw it before that fence (PTX, section 8.7,
// release and acquire patterns). A courier, a thread of the sanitizer that knows nothing of its
// own, carries just that much between a thread's fences and the location.
class Fences {
 public:
  // host: the sanitizer's fiber of the code that launched the kernel.
  void fence() {
    observe(&acquired_);
    publish(&released_);
  }
  void atomic_operation([[maybe_unused]] const void* location, [[maybe_unused]] void* host) {
#ifdef __SANITIZE_THREAD__
    void* self = current_sanitizer_fiber();
    switch_sanitizer_fiber(host);  // a new thread knows what its maker knows
    void* courier = create_sanitizer_fiber();
    switch_sanitizer_fiber(courier);
    observe(location);
    publish(&acquired_);
    observe(&released_);
    publish(location);
    switch_sanitizer_fiber(self);
    destroy_sanitizer_fiber(courier);
#endif
  }

 private:
  char released_ = 0;
  char acquired_ = 0;
};

}  // namespace emulation
