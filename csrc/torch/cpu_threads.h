// Torch's threads for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/lists.h"

namespace dtokd::ops {

inline cpu::Threads cpu_threads() {
  return {int(torch::stable::get_num_threads()),
          [](int tasks, const std::function<void(int)>& task) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t k = begin; k < end; ++k) task(int(k));
            });
          }};
}

}  // namespace dtokd::ops
