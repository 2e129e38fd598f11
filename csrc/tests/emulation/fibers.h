// Fibers: stacks that one operating system thread switches between, told to the sanitizers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) || defined(DTOKD_EMULATION_UCONTEXT)
#define DTOKD_UCONTEXT
#include <ucontext.h>
#endif

namespace emulation {

// Room for locals. Only touched pages take memory; a page without access ends each stack.
constexpr size_t kStackBytes = 256 << 10;

// Stacks of equal size, kept from launch to launch.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { clear(); }

  void reserve(size_t count) {
    // The thread sanitizer would take a stack used again for a race between its two users.
    if (count <= count_ && !kThreadSanitizer) return;
    clear();
    void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kStackBytes, page(), PROT_NONE);
  }
  char* bottom(size_t i) const { return memory_ + i * kStackBytes + page(); }
  static size_t bytes() { return kStackBytes - page(); }

 private:
  static size_t page() {
    static const size_t bytes = sysconf(_SC_PAGESIZE);
    return bytes;
  }
  void clear() {
    if (memory_) munmap(memory_, count_ * kStackBytes);
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  size_t count_ = 0;
};

#ifndef DTOKD_UCONTEXT
// Saves the registers a callee must keep, and goes on where `to` was left.
// from: rdi, address of the stack pointer to save; to: rsi, stack pointer to take.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void
switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// One line of execution: code that runs on a stack of its own, or the host, which has one already.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    // one that was given up has marks on it that the thread sanitizer does not let go
    if (ended_) destroy_sanitizer_fiber(sanitizer_state_);
  }

  // Makes the running code a fiber that can be switched away from.
  void adopt() { sanitizer_state_ = current_sanitizer_fiber(); }

  // Gets ready to run `entry`, which must never return, at the first switch to this fiber.
  void prepare(char* bottom, size_t bytes, void (*entry)()) {
    bottom_ = bottom;
    bytes_ = bytes;
    unpoison(bottom, bytes);  // frames of a fiber that never came to its end
    sanitizer_state_ = create_sanitizer_fiber();
#ifdef DTOKD_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(bottom + bytes);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer_ = top;
#endif
  }

  // Leaves `from` for this fiber; returns when something switches back to `from`.
  void run_from(Fiber& from, bool from_ends = false) {
    from.ended_ = from_ends;
    start_switch(from_ends ? nullptr : &from.fake_stack_, bottom_, bytes_, sanitizer_state_);
#ifdef DTOKD_UCONTEXT
    swapcontext(&from.context_, &context_);
#else
    switch_stacks(&from.stack_pointer_, stack_pointer_);
#endif
    finish_switch(from.fake_stack_, nullptr, nullptr);
  }

  // The first thing to do on a new fiber: finishes the switch, and notes the stack of `from`.
  static void entered(Fiber& from) { finish_switch(nullptr, &from.bottom_, &from.bytes_); }

  void* sanitizer_state() const { return sanitizer_state_; }

 private:
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* sanitizer_state_ = nullptr;
  bool ended_ = false;
#ifdef DTOKD_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace emulation
