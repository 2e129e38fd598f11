#include "cuda/balance.cuh"
#include "cuda/gram.cuh"
#include "cuda/select.h"

namespace dtokd::cuda {
namespace {

constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};

// Everything in `job` but the partition.
template <int P>
int launch(const std::vector<Gradients>& tensors, GramJob job, Stream stream) {
  const int64_t chunk = chunk_size(tensors);
  const Slots slots(tensors, chunk);
  std::copy(slots.begin, slots.begin + kRoles + 1, job.slots);

  struct Launch {
    Type type;
    Table<GramEntry<P>> table;
  };
  std::vector<Launch> launches;
  job.blocks = 0;
  for (Type type : kTypes) {
    auto tables = make_tables<GramEntry<P>>(
        tensors, chunk, [&](size_t t) { return tensors[t].type == type && tensors[t].size > 0; },
        [&](size_t t) {
          GramEntry<P> entry{};
          std::copy(tensors[t].of, tensors[t].of + job.K, entry.grads);
          entry.size = tensors[t].size;
          entry.first_slot = slots.first[t];
          entry.aligned = is_aligned(entry.grads, P);
          return entry;
        });
    for (const auto& table : tables) {
      launches.push_back({type, table});
      job.blocks += table.chunks();
    }
  }
  if (launches.empty()) {  // all Gram matrices are zero, and somebody has to write that
    launches.push_back({Type::kFloat32, {}});
    job.blocks = 1;
  }
  for (const Launch& l : launches) {
    const unsigned blocks = std::max(1u, l.table.chunks());
    const int error = by_type(l.type, [&](auto tag) {
      return launch_kernel(gram_kernel<typename decltype(tag)::T, P>, blocks, kThreads, stream,
                           l.table, job);
    });
    if (error) return error;
  }
  return 0;
}

int launch(const std::vector<Gradients>& tensors, const GramJob& job, Stream stream) {
  return by_objectives(job.K, [&](auto P) { return launch<P>(tensors, job, stream); });
}

}  // namespace

int64_t scratch_size(const std::vector<Gradients>& tensors, int K) {
  const int64_t slots = Slots(tensors, chunk_size(tensors)).count();
  int64_t pairs = 0;
  by_objectives(K, [&](auto P) {
    pairs = triangle(P);
    return 0;
  });
  return slots * pairs;
}

int launch_gram(const std::vector<Gradients>& tensors, int K, const Scratch& scratch, double* grams,
                Stream stream) {
  GramJob job{};
  job.K = K;
  job.scratch = scratch;
  job.record.grams = grams;
  return launch(tensors, job, stream);
}

int launch_gram_balance(const std::vector<Gradients>& tensors, int K, const double* losses,
                        const BalanceOptions& options, const Scratch& scratch, const Record& record,
                        Stream stream) {
  return launch(tensors, {K, 0, {}, scratch, record, losses, options}, stream);
}

int launch_balance(int K, const double* losses, const double* weights, const Earlier& earlier,
                   const BalanceOptions& options, const Record& record, Stream stream) {
  return by_objectives(K, [&](auto P) {
    return launch_kernel(balance_kernel<P>, 1, kThreads, stream, K, losses, weights, earlier,
                         options, record);
  });
}

int launch_min_norm_weights(const double* gram, int K, const bool* present, bool clamp,
                            double* weights, Stream stream) {
  return by_objectives(K, [&](auto P) {
    return launch_kernel(min_norm_weights_kernel<P>, 1, kThreads, stream, gram, K, present, clamp,
                         weights);
  });
}

const char* error_name(int error) { return runtime_error_name(error); }

}  // namespace dtokd::cuda
