#include "cpu/lists.h"

#include <algorithm>

#include "dtokd/host_device.h"

namespace dtokd::cpu {
namespace {

struct Chunk {
  size_t tensor;
  int64_t offset;  // elements
  int64_t n;
};

// The partition depends on sizes alone, so that the bits do.
std::vector<Chunk> cut(const std::vector<int64_t>& sizes) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < sizes.size(); ++t) {
    for (int64_t offset = 0; offset < sizes[t]; offset += kChunk) {
      chunks.push_back({t, offset, std::min(kChunk, sizes[t] - offset)});
    }
  }
  return chunks;
}

// Each thread takes neighbouring chunks, about equal in elements: the same ones in every pass, so
// that a core finds again what it has in its cache. From the last to the first: see NOTE
// [Backwards].
template <class F>
void for_each_chunk(const Threads& threads, const std::vector<Chunk>& chunks, const F& f) {
  int64_t total = 0;
  for (const Chunk& c : chunks) total += c.n;
  constexpr int64_t kWorthAThread = 16384;
  const int tasks = int(std::clamp<int64_t>(total / kWorthAThread, 1, threads.count));
  std::vector<size_t> bounds(1, 0);
  int64_t seen = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    seen += chunks[i].n;
    while (int(bounds.size()) < tasks && seen >= total * int64_t(bounds.size()) / tasks) {
      bounds.push_back(i + 1);
    }
  }
  bounds.resize(tasks, chunks.size());
  bounds.push_back(chunks.size());
  const auto task = [&](int k) {
    for (size_t i = bounds[k + 1]; i-- > bounds[k];) f(i, chunks[i]);
  };
  if (tasks == 1) {
    task(0);
  } else {
    threads.run(tasks, task);
  }
}

void chunk_gradients(const GradientLists& lists, const Chunk& chunk, const void** grads) {
  const size_t T = lists.sizes.size();
  for (int k = 0; k < lists.K; ++k) {
    grads[k] = element(lists.type, lists.grads[k * T + chunk.tensor], chunk.offset);
  }
}

// Products of the gradients by chunk, and their sums in the chunks' order.
class ChunkSums {
 public:
  ChunkSums(int K, size_t chunks) : K_(K), sums_(chunks * triangle(K)) {}
  double* of(size_t chunk) { return &sums_[chunk * triangle(K_)]; }
  void add_up(double* out) const {
    const size_t P = triangle(K_);
    for (int i = 0, p = 0; i < K_; ++i) {
      for (int j = i; j < K_; ++j, ++p) {
        double total = 0;
        for (size_t at = p; at < sums_.size(); at += P) total += sums_[at];
        out[i * K_ + j] = out[j * K_ + i] = total;
      }
    }
  }

 private:
  int K_;
  std::vector<double> sums_;
};

// Runs f(gradients of the chunk, chunk, where their products go or null) over all chunks.
template <class F>
void update(const Threads& threads, const GradientLists& lists, const double* coefficients,
            double* products, const F& f) {
  const std::vector<Chunk> chunks = cut(lists.sizes);
  ChunkSums sums(lists.K, products ? chunks.size() : 0);
  for_each_chunk(threads, chunks, [&](size_t index, const Chunk& chunk) {
    const void* grads[kMaxObjectives];
    chunk_gradients(lists, chunk, grads);
    f(Gradients{grads, coefficients, lists.K, chunk.n}, chunk, products ? sums.of(index) : nullptr);
  });
  if (products) sums.add_up(products);
}

}  // namespace

void gram(const Kernels& kernels, const Threads& threads, const GradientLists& lists, double* out) {
  const std::vector<Chunk> chunks = cut(lists.sizes);
  ChunkSums sums(lists.K, chunks.size());
  for_each_chunk(threads, chunks, [&](size_t index, const Chunk& chunk) {
    const void* grads[kMaxObjectives];
    chunk_gradients(lists, chunk, grads);
    kernels.gram(lists.type, grads, lists.K, chunk.n, sums.of(index));
  });
  sums.add_up(out);
}

void combine(const Kernels& kernels, const Threads& threads, const GradientLists& lists,
             const double* coefficients, const std::vector<void*>& out) {
  const Type type = lists.type;
  update(threads, lists, coefficients, nullptr,
         [&](const Gradients& gradients, const Chunk& c, double*) {
           kernels.combine(type, gradients, element(type, out[c.tensor], c.offset));
         });
}

void adamw_step(const Kernels& kernels, const Threads& threads, const GradientLists& lists,
                const double* coefficients, const std::vector<AdamWScalars>& scalars,
                const std::vector<void*>& params, const std::vector<void*>& exp_avgs,
                const std::vector<void*>& exp_avg_sqs, const std::vector<void*>& max_exp_avg_sqs,
                double* products) {
  const Type type = lists.type;
  update(threads, lists, coefficients, products,
         [&](const Gradients& gradients, const Chunk& c, double* sums) {
           const auto of = [&](const std::vector<void*>& tensors) {
             return tensors.empty() ? nullptr : element(type, tensors[c.tensor], c.offset);
           };
           kernels.adamw(type, gradients, scalars[c.tensor], of(params), of(exp_avgs),
                         of(exp_avg_sqs), of(max_exp_avg_sqs), sums);
         });
}

void sgd_step(const Kernels& kernels, const Threads& threads, const GradientLists& lists,
              const double* coefficients, const SGDScalars& scalars,
              const std::vector<void*>& params, const std::vector<void*>& momentum_buffers,
              double* products) {
  const Type type = lists.type;
  update(threads, lists, coefficients, products,
         [&](const Gradients& gradients, const Chunk& c, double* sums) {
           const auto of = [&](const std::vector<void*>& tensors) {
             return tensors.empty() ? nullptr : element(type, tensors[c.tensor], c.offset);
           };
           kernels.sgd(type, gradients, scalars, of(params), of(momentum_buffers), sums);
         });
}

}  // namespace dtokd::cpu
