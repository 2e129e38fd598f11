// The operations on the CPU, on torch's threads.
#include "cpu/lists.h"
#include "torch/operations.h"

namespace dtokd::ops {
namespace {

using Rows = std::vector<GradientRow>;

struct Cpu : Place {
  const char* op;
  const cpu::Kernels& kernels = cpu::best_kernels();
  const cpu::Threads threads{
      int(torch::stable::get_num_threads()), [](int tasks, const std::function<void(int)>& task) {
        torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) task(int(k));
        });
      }};

  Cpu(const Tensor& like, const char* op, const std::optional<Tensor>&) : Place(like), op(op) {}

  void gram(const Rows& rows, int K, double* grams) const {
    cpu::gram(kernels, threads, rows, K, grams);
  }

  void combine(const Rows& rows, int K, const double* table,
               const std::vector<void*>& targets) const {
    cpu::combine(kernels, threads, rows, K, table, targets);
  }

  void min_norm_weights(const double* gram, int K, const bool* present, bool clamp,
                        double* out) const {
    unsigned mask = (1u << K) - 1;
    for (int i = 0; present && i < K; ++i) {
      if (!present[i]) mask &= ~(1u << i);
    }
    dtokd::min_norm_weights(gram, K, mask, clamp, out);
  }

  // weights: [K], or null for DTO-KD's.
  void balance(int K, const double* losses, const double* weights, const Earlier& earlier,
               const BalanceOptions& options, const RecordTensors& record) const {
    double entries[kRoles][kMaxObjectives * kMaxObjectives];
    const double* grams[kRoles];
    for (int role = 0; role < kRoles; ++role) {
      grams[role] = entries[role];
      for (int i = 0; i < K * K; ++i) {
        const double entry = record.grams_pointer()[role * K * K + i];
        entries[role][i] = entry_of_present(entry, earlier, i / K, i % K);
      }
    }
    double chosen[kMaxObjectives];
    if (!weights) {
      dto_weights(grams[0], earlier.losses ? earlier.losses : losses, K, options, chosen);
    }
    Balance result;
    finish_balance(grams, losses, weights ? weights : chosen, K, options, result);
    write_record(result, K, record.values_pointer(), record.flags_pointer());
    if (earlier.squares && !is_bounded(earlier, record.values_pointer() + K, K, options.limit)) {
      record.flags_pointer()[1] = true;
    }
  }

  void gram_balance(const Rows& rows, int K, const double* losses, const BalanceOptions& options,
                    const RecordTensors& record) const {
    gram(rows, K, record.grams_pointer());
    balance(K, losses, nullptr, {}, options, record);
  }

  void update(const Operations<Cpu>::Update& update, int K, const double* table, const bool* skips,
              double* grams) const {
    if (*skips) {
      if (grams) gram(update.gradients->rows, K, grams);
      return;
    }
    for (const UpdateRow& row : update.rows) {
      DTOKD_CHECK(row.state_type == row.grads.type && !row.master, op,
                  ": on the CPU state is of the parameter's dtype, and there are no master copies");
    }
    cpu::update(kernels, threads, update.plan->rule, update.rows, update.groups, K, table, grams);
  }
};

// The name of the vector instructions in use, as bytes: torch's stable ABI of 2.10 returns no
// string.
Tensor instructions(const Tensor& like) {
  const std::string name = cpu::best_kernels().name;
  Tensor out = torch::stable::new_empty(like, {int64_t(name.size())}, ScalarType::Byte);
  name.copy(static_cast<char*>(out.mutable_data_ptr()), name.size());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dtokd, CPU, m) {
  Operations<Cpu>::implement(m);
  m.impl("instructions", TORCH_BOX(&instructions));
}

}  // namespace dtokd::ops
