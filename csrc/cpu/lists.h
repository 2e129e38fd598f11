// The CPU operations over lists of tensors: cut into chunks, shared among threads, no memory of
// gradient size.
#pragma once

#include <functional>
#include <vector>

#include "cpu/kernels.h"

namespace dtokd::cpu {

// Runs task(0) ... task(tasks - 1), each once, in any order and on any thread.
struct Threads {
  int count;
  std::function<void(int tasks, const std::function<void(int)>& task)> run;
};

// K gradients of the same T tensors. grads: [K * T], objective by objective; sizes: [T], in
// elements.
struct GradientLists {
  Type type;
  int K;
  std::vector<const void*> grads;
  std::vector<int64_t> sizes;
};

// out: [K, K]. The same bits for any number of threads: sums per chunk, added in the chunks' order.
void gram(const Kernels&, const Threads&, const GradientLists&, double* out);

// out: [T], may be one of the K lists; coefficients: [K].
void combine(const Kernels&, const Threads&, const GradientLists&, const double* coefficients,
             const std::vector<void*>& out);

// scalars: [T]; largests: [T] or empty. products: [K, K] or null; where to put the Gram matrix of
// the gradients, taken as these are read for the update: the same bits as gram's.
void adamw_step(const Kernels&, const Threads&, const GradientLists&, const double* coefficients,
                const std::vector<AdamWScalars>& scalars, const std::vector<void*>& params,
                const std::vector<void*>& exp_avgs, const std::vector<void*>& exp_avg_sqs,
                const std::vector<void*>& max_exp_avg_sqs, double* products = nullptr);

// momentum_buffers: [T] or empty.
void sgd_step(const Kernels&, const Threads&, const GradientLists&, const double* coefficients,
              const SGDScalars& scalars, const std::vector<void*>& params,
              const std::vector<void*>& momentum_buffers, double* products = nullptr);

}  // namespace dtokd::cpu
