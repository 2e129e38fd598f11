// Threads for tests: one std::thread per task.
#pragma once

#include <thread>
#include <vector>

#include "cpu/lists.h"

namespace dtokd::cpu {

inline Threads test_threads(int count) {
  return {count, [](int tasks, const std::function<void(int)>& task) {
            std::vector<std::thread> threads;
            for (int k = 0; k < tasks; ++k) threads.emplace_back(task, k);
            for (std::thread& thread : threads) thread.join();
          }};
}

}  // namespace dtokd::cpu
