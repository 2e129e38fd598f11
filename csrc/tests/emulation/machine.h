// Blocks, warps and threads, and the machine that runs them one at a time.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "fibers.h"
#include "sanitizers.h"
#include "schedule.h"
#include "shared_memory.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxBlockThreads = 1024;
// Rounds in which nobody does anything but ask again whether something has changed.
constexpr unsigned kMaxIdleRounds = 10000;

// A mistake of the kernel; thrown out of `launch`.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The line of code where threads meet.
struct Site {
  const char* file = "";
  unsigned line = 0;

  Site() = default;
  Site(const char* file, unsigned line) : file(file), line(line) {}
  Site(const std::source_location& at) : Site(at.file_name(), at.line()) {}
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

inline unsigned volume(const dim3& d) { return d.x * d.y * d.z; }
inline uint3 unflatten(unsigned i, const dim3& d) {
  return {i % d.x, i / d.x % d.y, i / d.x / d.y};
}
inline std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// Lanes of a warp that wait for one another, each with a value for the others. Two sets of
// values: a lane may come to the next meeting before another has read the values of this one.
struct Meeting {
  Site site;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  std::array<std::array<uint64_t, kWarpSize>, 2> values;
  char tokens[2];
};

struct Warp {
  uint32_t present = 0;                  // lanes that have not left the kernel
  std::map<uint32_t, Meeting> meetings;  // by mask
};

struct Block {
  uint3 index;
  unsigned threads = 0;
  unsigned present = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
  Site barrier;
  char tokens[2];
  std::vector<Warp> warps;
  SharedMemory shared;
  std::unique_ptr<SharedArray> dynamic_shared;
};

struct Thread {
  enum class State { kReady, kWaiting, kDone };

  uint3 index;
  unsigned rank = 0;  // in the block
  Block* block = nullptr;
  State state = State::kReady;
  bool spins = false;
  Site waits_at;
  Fences fences;
  Fiber fiber;

  unsigned lane() const { return rank % kWarpSize; }
  Warp& warp() const { return block->warps[rank / kWarpSize]; }
};

class Machine {
 public:
  Schedule schedule = Schedule::from_environment();

  static Machine& get() {
    static Machine machine;
    return machine;
  }
  Thread& thread() const { return *current_; }
  const dim3& grid() const { return grid_; }
  const dim3& block() const { return block_; }

  template <class Kernel>
  void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, bool cooperative,
              const Kernel& kernel) {
    const Quiet quiet;
    check_launch(grid, block, dynamic_shared_bytes);
    const Running running(*this);
    grid_ = grid;
    block_ = block;
    kernel_ = &kernel;
    call_ = [](const void* kernel) { (*static_cast<const Kernel*>(kernel))(); };
    host_.adopt();
    schedule.restart();

    std::vector<unsigned> blocks(volume(grid));
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
    schedule.order_blocks(blocks);
    const size_t together = cooperative ? blocks.size() : schedule.blocks_together();
    for (size_t first = 0; first < blocks.size(); first += together) {
      const size_t last = std::min(first + together, blocks.size());
      run({blocks.begin() + first, blocks.begin() + last}, dynamic_shared_bytes);
    }
  }

  // Waits for every thread of the block.
  void barrier(const Site& site) {
    const Quiet quiet;
    Block& block = *current_->block;
    if (block.present != block.threads) {
      fail("waits at the barrier " + site.text() +
           ", but a thread of its block has left the kernel");
    }
    if (block.arrived != 0 && !(block.barrier == site)) {
      fail("waits at the barrier " + site.text() + ", others of its block at " +
           block.barrier.text());
    }
    block.barrier = site;
    const char* token = &block.tokens[block.generation % 2];
    publish(token);
    if (++block.arrived == block.threads) {
      block.arrived = 0;
      ++block.generation;
      for (unsigned rank = 0; rank < block.threads; ++rank) wake(neighbor(rank));
    } else {
      wait(site);
    }
    observe(token);
  }

  // Waits for the lanes of `mask`; returns what each brought along, by lane. orders_memory: what
  // they did before happens before what they do next.
  const std::array<uint64_t, kWarpSize>& meet(uint32_t mask, uint64_t value, const Site& site,
                                              bool orders_memory) {
    const Quiet quiet;
    Thread& self = *current_;
    Warp& warp = self.warp();
    check_meeting(warp, mask, site);
    Meeting& meeting = warp.meetings[mask];
    const unsigned parity = meeting.generation % 2;
    meeting.site = site;
    meeting.values[parity][self.lane()] = value;
    meeting.arrived |= 1u << self.lane();
    if (orders_memory) publish(&meeting.tokens[parity]);
    if (meeting.arrived == mask) {
      meeting.arrived = 0;
      ++meeting.generation;
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (mask >> lane & 1) wake(neighbor(self.rank - self.lane() + lane));
      }
    } else {
      wait(site);
    }
    if (orders_memory) observe(&meeting.tokens[parity]);
    return meeting.values[parity];
  }

  // Lets the others run, in a loop that waits for one of them.
  void spin() {
    const Quiet quiet;
    current_->spins = true;
    host_.run_from(current_->fiber);
    current_->spins = false;
  }

  void fence() { current_->fences.fence(); }
  void atomic_operation(const void* location) {
    const Quiet quiet;
    current_->fences.atomic_operation(location, host_.sanitizer_state());
  }

  void* shared_variable(const void* key, size_t bytes, size_t alignment) {
    const Quiet quiet;
    SharedMemory& shared = current_->block->shared;
    void* data = shared.variable(key, bytes, alignment);
    if (shared.static_bytes() > SharedMemory::kMaxStaticBytes) {
      fail("has " + std::to_string(shared.static_bytes()) + " bytes of static shared memory, of " +
           std::to_string(SharedMemory::kMaxStaticBytes));
    }
    return data;
  }
  void* dynamic_shared() {
    const Quiet quiet;
    return current_->block->dynamic_shared->data();
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error("block " + text(current_->block->index) + " thread " + text(current_->index) + " " +
                what);
  }

 private:
  // A launch within a launch would run on the stacks in use.
  struct Running {
    Machine& machine;
    explicit Running(Machine& machine) : machine(machine) { machine.running_ = true; }
    ~Running() {
      // a thread that was given up did not get to this
      for (const Thread& thread : machine.threads_) {
        if (thread.state == Thread::State::kDone) continue;
        publish_as(thread.fiber.sanitizer_state(), machine.host_.sanitizer_state(), &machine);
      }
      // only now: blocks that did not run side by side are not ordered either
      observe(&machine);
      machine.running_ = false;
      machine.threads_ = std::vector<Thread>();
      machine.earlier_threads_.clear();
      machine.blocks_ = std::vector<Block>();
      machine.error_ = nullptr;
    }
  };

  void check_launch(const dim3& grid, const dim3& block, size_t dynamic_shared_bytes) const {
    if (running_) throw Error("a kernel is launched while another runs");
    if (volume(grid) == 0 || volume(block) == 0) throw Error("a launch of no threads");
    if (volume(block) > kMaxBlockThreads) {
      throw Error("a block of " + std::to_string(volume(block)) + " threads, of " +
                  std::to_string(kMaxBlockThreads));
    }
    if (dynamic_shared_bytes > SharedMemory::kMaxBytes) {
      throw Error(std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory, of " +
                  std::to_string(SharedMemory::kMaxBytes));
    }
  }

  void check_meeting(const Warp& warp, uint32_t mask, const Site& site) const {
    const unsigned lane = current_->lane();
    if (!(mask >> lane & 1)) fail("calls " + site.text() + " with a mask that leaves it out");
    if (mask & ~warp.present) {
      fail("calls " + site.text() +
           " with a mask of lanes that have left the kernel or never were in it");
    }
    for (const auto& [other, meeting] : warp.meetings) {
      if (meeting.arrived == 0) continue;
      if (other == mask ? !(meeting.site == site)
                        : (other >> lane & 1) || (meeting.arrived & mask)) {
        fail("calls " + site.text() + ", but lanes of its mask wait at " + meeting.site.text());
      }
    }
  }

  // Runs some blocks side by side, to their end.
  void run(const std::vector<unsigned>& indices, size_t dynamic_shared_bytes) {
    make_threads(indices, dynamic_shared_bytes);
    std::vector<Thread*> unfinished;
    for (Thread& thread : threads_) unfinished.push_back(&thread);
    unsigned idle_rounds = 0;
    for (bool first_round = true; !unfinished.empty(); first_round = false) {
      schedule.order_threads(unfinished, first_round);
      const uint64_t progress = progress_;
      bool any_ready = false;
      for (Thread* thread : unfinished) {
        if (thread->state != Thread::State::kReady) continue;
        any_ready = true;
        if (!schedule.holds_back()) resume(*thread);
      }
      std::erase_if(unfinished, [](Thread* t) { return t->state == Thread::State::kDone; });
      idle_rounds = progress_ == progress ? idle_rounds + 1 : 0;
      if (!unfinished.empty() && (!any_ready || idle_rounds > kMaxIdleRounds)) {
        throw Error("deadlock: " + where(unfinished));
      }
    }
  }

  void make_threads(const std::vector<unsigned>& indices, size_t dynamic_shared_bytes) {
    const unsigned size = volume(block_);
    // the sanitizer takes a new thread for an old one where the old one is gone
    if (kThreadSanitizer) earlier_threads_.push_back(std::move(threads_));
    threads_ = std::vector<Thread>();
    stacks_.reserve(indices.size() * size);
    blocks_ = std::vector<Block>(indices.size());
    threads_ = std::vector<Thread>(indices.size() * size);
    for (size_t b = 0; b < indices.size(); ++b) {
      Block& block = blocks_[b];
      block.index = unflatten(indices[b], grid_);
      block.threads = block.present = size;
      block.warps.resize((size + kWarpSize - 1) / kWarpSize);
      // nvcc declares it with the alignment of 16-byte vectors
      block.dynamic_shared = std::make_unique<SharedArray>(dynamic_shared_bytes, 16);
      for (unsigned rank = 0; rank < size; ++rank) {
        Thread& thread = threads_[b * size + rank];
        thread.index = unflatten(rank, block_);
        thread.rank = rank;
        thread.block = &block;
        thread.warp().present |= 1u << thread.lane();
        thread.fiber.prepare(stacks_.bottom(b * size + rank), Stacks::bytes(), &Machine::enter);
      }
    }
  }

  void resume(Thread& thread) {
    current_ = &thread;
    thread.fiber.run_from(host_);
    if (error_) std::rethrow_exception(error_);
  }
  void wait(const Site& site) {
    ++progress_;
    current_->waits_at = site;
    current_->state = Thread::State::kWaiting;
    host_.run_from(current_->fiber);
  }
  void wake(Thread& thread) {
    ++progress_;
    if (thread.state == Thread::State::kWaiting) thread.state = Thread::State::kReady;
  }

  // The whole life of a fiber.
  static void enter() {
    Machine& machine = get();
    Fiber::entered(machine.host_);
    machine.run_thread();
    machine.host_.run_from(machine.current_->fiber, true);
  }
  void run_thread() {
    try {
      call_(kernel_);
      const Quiet quiet;
      leave();
    } catch (...) {
      error_ = std::current_exception();
    }
    publish(this);
  }
  void leave() {
    ++progress_;
    Thread& self = *current_;
    Block& block = *self.block;
    Warp& warp = self.warp();
    --block.present;
    warp.present &= ~(1u << self.lane());
    self.state = Thread::State::kDone;
    if (block.arrived != 0) {
      fail("leaves the kernel, but others of its block wait at the barrier " +
           block.barrier.text());
    }
    for (const auto& [mask, meeting] : warp.meetings) {
      if (meeting.arrived != 0 && (mask >> self.lane() & 1)) {
        fail("leaves the kernel, but lanes of its warp wait for it at " + meeting.site.text());
      }
    }
  }

  // A thread of the same block: they lie side by side.
  Thread& neighbor(unsigned rank) const { return current_[int(rank) - int(current_->rank)]; }

  // Where threads hang, for a message.
  static std::string where(const std::vector<Thread*>& unfinished) {
    std::map<std::string, unsigned> counts;
    for (const Thread* thread : unfinished) {
      ++counts[thread->state == Thread::State::kWaiting ? "at " + thread->waits_at.text()
                                                        : "in a loop without progress"];
    }
    std::string result;
    for (const auto& [place, count] : counts) {
      result += (result.empty() ? "" : ", ") + std::to_string(count) + " threads wait " + place;
    }
    return result;
  }

  dim3 grid_, block_;
  const void* kernel_ = nullptr;
  void (*call_)(const void*) = nullptr;
  bool running_ = false;
  Thread* current_ = nullptr;
  Fiber host_;
  Stacks stacks_;
  std::vector<Block> blocks_;
  std::vector<Thread> threads_;
  std::vector<std::vector<Thread>> earlier_threads_;  // of the same launch
  uint64_t progress_ = 0;
  std::exception_ptr error_;
};

inline Thread& thread() { return Machine::get().thread(); }

// Runs `kernel`, any callable, once per thread. cooperative: all blocks of the grid are alive
// together, as a grid-wide barrier needs.
//
// Raises:
//   Error: the kernel made a mistake that can be seen without a sanitizer.
template <class Kernel>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, bool cooperative,
            const Kernel& kernel) {
  Machine::get().launch(grid, block, dynamic_shared_bytes, cooperative, kernel);
}

}  // namespace emulation
