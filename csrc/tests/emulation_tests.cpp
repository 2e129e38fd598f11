// The emulation by itself: what it must run, and what it must find. Without arguments: everything
// that shows without a sanitizer. With the name of a mistake: that one alone, for a sanitizer.
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/check.h"
#include "tests/emulation/cuda_emulation.h"

using emulation::launch;

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- What it must run

void test_indices() {
  const dim3 grid(3, 2), block(4, 2, 3);
  std::vector<int> seen(6 * 24, 0);
  launch(grid, block, 0, false, [&] {
    const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    ++seen[b * 24 + t];
  });
  for (int count : seen) CHECK(count == 1);
}

void test_shared_memory() {
  std::vector<int> out(2 * 64);
  int fresh = 0;
  launch(2, 64, 64 * sizeof(int), false, [&] {
    DTOKD_SHARED(fixed, int[64]);
    DTOKD_SHARED(untouched, float);
    DTOKD_DYNAMIC_SHARED(int, dynamic);
    const unsigned t = threadIdx.x;
    fixed[t] = int(blockIdx.x * 64 + t);
    __syncthreads();
    dynamic[t] = fixed[63 - t];
    __syncthreads();
    out[blockIdx.x * 64 + t] = dynamic[(t + 1) % 64];
    if (t == 0) atomicAdd(&fresh, std::isnan(untouched) ? 1 : 0);
  });
  for (int b = 0; b < 2; ++b) {
    for (int t = 0; t < 64; ++t) CHECK(out[b * 64 + t] == b * 64 + 63 - (t + 1) % 64);
  }
  CHECK(fresh == 2);
}

void test_warp_operations() {
  launch(1, 64, 0, false, [] {
    const unsigned lane = threadIdx.x % 32;
    double sum = lane;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    CHECK(sum == 496);
    CHECK(__shfl_sync(kAll, lane, 5) == 5);
    CHECK(__shfl_sync(kAll, lane, 5, 8) == lane / 8 * 8 + 5);
    CHECK(__shfl_down_sync(kAll, lane, 3) == (lane < 29 ? lane + 3 : lane));
    CHECK(__shfl_down_sync(kAll, lane, 3, 16) == (lane % 16 < 13 ? lane + 3 : lane));
    CHECK(__shfl_up_sync(kAll, lane, 3) == (lane >= 3 ? lane - 3 : lane));
    CHECK(__shfl_up_sync(kAll, lane, 3, 16) == (lane % 16 >= 3 ? lane - 3 : lane));
    CHECK(__ballot_sync(kAll, lane % 4 == 1) == 0x22222222u);
    CHECK(__any_sync(kAll, lane == 7) && !__all_sync(kAll, lane != 7));
    // both halves of a warp, each by itself
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    unsigned count = 1;
    for (int step = 8; step > 0; step /= 2) count += __shfl_xor_sync(half, count, step);
    CHECK(count == 16);
  });
}

void test_syncwarp_orders_memory() {
  launch(1, 32, 0, false, [] {
    DTOKD_SHARED(x, unsigned[32]);
    x[threadIdx.x] = threadIdx.x;
    __syncwarp();
    CHECK(x[31 - threadIdx.x] == 31 - threadIdx.x);
  });
}

void test_atomics() {
  unsigned count = 0, wrapped = 0, largest = 0, first = 0;
  float sum = 0;
  double wide = 0;
  launch(3, 32, 0, false, [&] {
    const unsigned id = blockIdx.x * 32 + threadIdx.x;
    atomicAdd(&count, 1u);
    atomicAdd(&sum, 0.5f);
    atomicAdd(&wide, 0.25);
    atomicInc(&wrapped, 95u);
    atomicMax(&largest, id);
    atomicCAS(&first, 0u, id + 1);
  });
  CHECK(count == 96 && sum == 48 && wide == 24 && wrapped == 0 && largest == 95);
  CHECK(first >= 1 && first <= 96);
  CHECK([&] {
    unsigned last = 7;
    launch(1, 1, 0, false, [&] { CHECK(atomicExch(&last, 9u) == 7); });
    return last;
  }() == 9);
}

// The block that finishes last adds up what all have written.
void last_block_sum(unsigned* ticket, double* partial, double* out, bool fence_before,
                    bool fence_after) {
  DTOKD_SHARED(last, bool);
  if (threadIdx.x < 2) partial[2 * blockIdx.x + threadIdx.x] = blockIdx.x + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fence_before) __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    if (fence_after) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  *out = 0;
  for (unsigned i = 0; i < 2 * gridDim.x; ++i) *out += __ldcg(partial + i);
}

void test_last_block() {
  std::vector<double> partial(10, NAN);
  unsigned ticket = 0;
  double out = 0;
  launch(5, 32, 0, false, [&] { last_block_sum(&ticket, partial.data(), &out, true, true); });
  CHECK(out == 30 && ticket == 0);
}

// state: blocks that have arrived, and how often all of them have.
void grid_barrier(unsigned* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned generation = emulation::load_acquire(state + 1);
    __threadfence();
    if (atomicInc(state, gridDim.x - 1) == gridDim.x - 1) {
      __threadfence();
      emulation::store_release(state + 1, generation + 1);
    } else {
      while (emulation::load_acquire(state + 1) == generation) DTOKD_SPIN();
    }
  }
  __syncthreads();
}

void test_grid_barrier() {
  unsigned state[2] = {0, 7};
  std::vector<int> x(4 * 32), y(4 * 32);
  launch(4, 32, 0, true, [&] {
    const unsigned id = blockIdx.x * 32 + threadIdx.x;
    x[id] = int(id);
    grid_barrier(state);
    y[id] = x[127 - id];
    grid_barrier(state);
  });
  for (int i = 0; i < 128; ++i) CHECK(y[i] == 127 - i);
  CHECK(state[0] == 0 && state[1] == 9);
}

void test_vectors() {
  alignas(16) float from[64], to[64];
  for (int i = 0; i < 64; ++i) from[i] = float(i), to[i] = 0;
  launch(1, 16, 0, false, [&] {
    const float4* words = reinterpret_cast<const float4*>(from);
    __stcs(reinterpret_cast<float4*>(to) + threadIdx.x, __ldcs(words + threadIdx.x));
  });
  CHECK(std::memcmp(from, to, sizeof(to)) == 0);
}

// Which thread comes when: repeats itself, and is not the same for all schedules.
std::vector<unsigned> order_of_arrival(const std::string& schedule) {
  emulation::Machine::get().schedule = emulation::Schedule(schedule);
  std::vector<unsigned> order(6 * 8);
  unsigned next = 0;
  launch(6, 8, 0, false, [&] { order[atomicAdd(&next, 1u)] = blockIdx.x * 8 + threadIdx.x; });
  return order;
}

void test_schedules() {
  const std::vector<unsigned> forward = order_of_arrival("forward");
  for (unsigned i = 0; i < forward.size(); ++i) CHECK(forward[i] == i);
  const std::vector<unsigned> reverse = order_of_arrival("reverse");
  for (unsigned i = 0; i < reverse.size(); ++i) CHECK(reverse[i] == 47 - i);
  CHECK(order_of_arrival("1") == order_of_arrival("1"));
  CHECK(order_of_arrival("1") != order_of_arrival("2") && order_of_arrival("1") != forward);
}

// ---- What it must find

// One thread of 32 goes its own way.
bool odd_one() { return threadIdx.x == 5; }

struct Mistake {
  std::string name;
  std::string message;
  std::function<void()> run;
};

const std::vector<Mistake> kErrors{
    {"different barriers", "waits at the barrier",
     [] {
       launch(1, 32, 0, false, [] {
         if (odd_one()) {
           __syncthreads();
         } else {
           __syncthreads();
         }
       });
     }},
    {"a barrier that a thread never comes to", "the kernel",
     [] {
       launch(1, 32, 0, false, [] {
         if (odd_one()) return;
         __syncthreads();
       });
     }},
    {"a mask without the caller", "a mask that leaves it out",
     [] { launch(1, 32, 0, false, [] { __shfl_xor_sync(0xffu, 1, 1); }); }},
    {"a mask with lanes that are not there", "lanes that have left the kernel or never were in it",
     [] { launch(1, 16, 0, false, [] { __shfl_xor_sync(kAll, 1, 1); }); }},
    {"a lane that leaves the others waiting", "the kernel",
     [] {
       launch(1, 32, 0, false, [] {
         if (odd_one()) return;
         __shfl_xor_sync(kAll, 1, 1);
       });
     }},
    {"a shuffle in half of a warp, with the mask of all", "deadlock: ",
     [] {
       launch(1, 64, 0, false, [] {
         if (threadIdx.x % 32 < 16) __shfl_xor_sync(kAll, 1, 1);
         __syncthreads();
       });
     }},
    {"different masks", "but lanes of its mask wait at",
     [] {
       launch(1, 32, 0, false, [] { __shfl_xor_sync(threadIdx.x % 2 ? kAll : 0x7fffffffu, 1, 1); });
     }},
    {"different shuffles", "but lanes of its mask wait at",
     [] {
       launch(1, 32, 0, false, [] {
         if (odd_one()) {
           __shfl_xor_sync(kAll, 1, 1);
         } else {
           __shfl_xor_sync(kAll, 1, 1);
         }
       });
     }},
    {"a read from a lane outside the mask", "which its mask leaves out",
     [] {
       launch(1, 32, 0, false,
              [] { __shfl_xor_sync(threadIdx.x < 16 ? 0xffffu : 0xffff0000u, 1, 16); });
     }},
    {"a loop that waits for nobody", "deadlock: 32 threads wait in a loop without progress",
     [] {
       unsigned flag = 0;
       launch(1, 32, 0, false, [&] {
         while (emulation::load_acquire(&flag) == 0) DTOKD_SPIN();
       });
     }},
    {"blocks that wait for one another without being alive together", "deadlock: ",
     [] {
       unsigned state[2] = {0, 0};
       launch(8, 32, 0, false, [&] { grid_barrier(state); });
     }},
    {"a misaligned vector", "misaligned access: 16 bytes at an address 4 bytes past",
     [] {
       alignas(16) float x[8] = {0};
       launch(1, 1, 0, false, [&] { __ldg(reinterpret_cast<const float4*>(x + 1)); });
     }},
    {"a shared array of floats taken for vectors", "misaligned access",
     [] {
       launch(1, 1, 0, false, [] {
         DTOKD_SHARED(x, float[4]);
         emulation::load(reinterpret_cast<const float4*>(x));
       });
     }},
    {"too much static shared memory", "bytes of static shared memory",
     [] {
       launch(1, 1, 0, false, [] {
         DTOKD_SHARED(x, float[16000]);
         x[0] = 0;
       });
     }},
    {"too much dynamic shared memory", "bytes of dynamic shared memory",
     [] { launch(1, 1, 256 << 10, false, [] {}); }},
    {"a block too large", "a block of 1025 threads", [] { launch(1, 1025, 0, false, [] {}); }},
};

// What an address sanitizer or an undefined-behaviour sanitizer sees; threads of one block each.
const std::map<std::string, std::function<void()>> kAddressMistakes{
    {"static-shared-overrun",
     [] {
       launch(1, 32, 0, false, [] {
         DTOKD_SHARED(array, float[31]);
         float* x = array;
         x[threadIdx.x] = 0;
       });
     }},
    {"static-shared-underrun",
     [] {
       launch(1, 32, 0, false, [] {
         DTOKD_SHARED(array, float[32]);
         float* x = array;
         x[int(threadIdx.x) - 3] = 0;
       });
     }},
    {"dynamic-shared-overrun",
     [] {
       launch(1, 32, 31 * sizeof(float), false, [] {
         DTOKD_DYNAMIC_SHARED(float, x);
         x[threadIdx.x] = 0;
       });
     }},
    {"tensor-overrun",
     [] {
       std::vector<float> x(100);
       launch(4, 32, 0, false, [p = x.data()] { p[blockIdx.x * 32 + threadIdx.x] = 1; });
     }},
    {"misaligned-vector-without-a-load",
     [] {
       alignas(16) float x[8] = {0};
       launch(1, 1, 0, false, [p = x] {
         volatile float sink = reinterpret_cast<const float4*>(p + 1)->y;
         (void)sink;
       });
     }},
};

// What a thread sanitizer sees, though the results may well be right.
const std::map<std::string, std::function<void()>> kThreadMistakes{
    {"no-barrier",
     [] {
       launch(1, 32, 0, false, [] {
         DTOKD_SHARED(x, unsigned);
         if (threadIdx.x == 0) x = 3;
         volatile unsigned sink = x;
         (void)sink;
       });
     }},
    {"shuffle-for-a-barrier",
     [] {
       launch(1, 32, 0, false, [] {
         DTOKD_SHARED(x, unsigned[32]);
         x[threadIdx.x] = threadIdx.x;
         __shfl_xor_sync(kAll, 0, 1);  // the lanes meet, but nothing orders what they wrote
         volatile unsigned sink = x[31 - threadIdx.x];
         (void)sink;
       });
     }},
    {"no-fence-before-ticket",
     [] {
       std::vector<double> partial(6);
       unsigned ticket = 0;
       double out;
       launch(3, 32, 0, false, [&] { last_block_sum(&ticket, partial.data(), &out, false, true); });
     }},
    {"no-fence-after-ticket",
     [] {
       std::vector<double> partial(6);
       unsigned ticket = 0;
       double out;
       launch(3, 32, 0, false, [&] { last_block_sum(&ticket, partial.data(), &out, true, false); });
     }},
    {"plain-counter",
     [] {
       unsigned count = 0;
       launch(3, 1, 0, false, [&] { ++count; });
     }},
    {"plain-read-of-an-atomic",
     [] {
       unsigned count = 0;
       launch(2, 1, 0, false, [&] {
         atomicAdd(&count, 1u);
         volatile unsigned sink = count;
         (void)sink;
       });
     }},
    {"blocks-without-a-grid-barrier",
     [] {
       std::vector<unsigned> x(4);
       launch(4, 1, 0, true, [p = x.data()] {
         p[blockIdx.x] = 1;
         __syncthreads();
         volatile unsigned sink = p[3 - blockIdx.x];
         (void)sink;
       });
     }},
};

void check_error(const Mistake& mistake) {
  try {
    mistake.run();
  } catch (const emulation::Error& error) {
    if (std::string(error.what()).find(mistake.message) != std::string::npos) return;
    std::printf("%s: got '%s', expected '%s'\n", mistake.name.c_str(), error.what(),
                mistake.message.c_str());
    std::exit(1);
  }
  std::printf("%s: not found\n", mistake.name.c_str());
  std::exit(1);
}

void test_all(const std::string& schedule) {
  emulation::Machine::get().schedule = emulation::Schedule(schedule);
  test_indices();
  test_shared_memory();
  test_warp_operations();
  test_syncwarp_orders_memory();
  test_atomics();
  test_last_block();
  test_grid_barrier();
  test_vectors();
  for (const Mistake& mistake : kErrors) check_error(mistake);
  std::printf("%s: passed\n", schedule.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    for (const auto* mistakes : {&kAddressMistakes, &kThreadMistakes}) {
      const auto mistake = mistakes->find(argv[1]);
      if (mistake != mistakes->end()) mistake->second();
    }
    return 0;
  }
  for (const char* schedule : {"forward", "reverse", "1", "2"}) test_all(schedule);
  test_schedules();
  return 0;
}
