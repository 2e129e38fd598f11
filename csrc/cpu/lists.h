// The CPU operations over rows of tensors: cut into chunks, shared among threads, no memory of
// gradient size.
#pragma once

#include <functional>
#include <vector>

#include "cpu/kernels.h"
#include "dtokd/rows.h"

namespace dtokd::cpu {

// Runs task(0) ... task(tasks - 1), each once, in any order and on any thread.
struct Threads {
  int count;
  std::function<void(int tasks, const std::function<void(int)>& task)> run;
};

// out: [kRoles, K, K]. The same bits for any number of threads: sums per chunk, added in the
// chunks' order.
void gram(const Kernels&, const Threads&, const std::vector<GradientRow>&, int K, double* out);

// out: one per row, may be one of its gradients; coefficients: [kRoles, K].
void combine(const Kernels&, const Threads&, const std::vector<GradientRow>&, int K,
             const double* coefficients, const std::vector<void*>& out);

// rule: a RuleNumber. grams: [kRoles, K, K] or null; where to put the Gram matrices of the
// gradients, taken as these are read for the update: the same bits as gram's. Without it a gradient
// of coefficient 0 is not read. State is of the parameters' type; there are no master copies.
void update(const Kernels&, const Threads&, int rule, const std::vector<UpdateRow>&,
            const std::vector<Group>&, int K, const double* coefficients, double* grams);

}  // namespace dtokd::cpu
