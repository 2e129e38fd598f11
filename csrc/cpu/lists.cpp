#include "cpu/lists.h"

#include <algorithm>

#include "dtokd/host_device.h"

namespace dtokd::cpu {
namespace {

struct Chunk {
  size_t row;
  int64_t offset;  // elements
  int64_t n;
};

const GradientRow& gradients_of(const GradientRow& row) { return row; }
const GradientRow& gradients_of(const UpdateRow& row) { return row.grads; }

// The partition depends on sizes alone, so that the bits do.
template <class Row>
std::vector<Chunk> cut(const std::vector<Row>& rows) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < rows.size(); ++t) {
    const int64_t size = gradients_of(rows[t]).size;
    for (int64_t offset = 0; offset < size; offset += kChunk) {
      chunks.push_back({t, offset, std::min(kChunk, size - offset)});
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

// The gradients of a chunk that are there and wanted, with their objectives and coefficients.
struct Present {
  const void* grads[kMaxObjectives];
  double coefficients[kMaxObjectives];
  int objectives[kMaxObjectives];
  int K = 0;

  Present(const GradientRow& row, int64_t offset, int all) {
    for (int k = 0; k < all; ++k) {
      if (row.of[k]) add(row, offset, k, 0);
    }
  }
  // With coefficients, turned around for maximize. At a vertex of the simplex a coefficient is 0;
  // that gradient is not read, unless `measured` or the only one.
  Present(const GradientRow& row, int64_t offset, int all, const double* coefficients,
          bool maximize, bool measured) {
    const double* c = coefficients + row.role * all;
    int last = -1;
    for (int k = 0; k < all; ++k) {
      if (!row.of[k]) continue;
      last = k;
      if (measured || c[k] != 0) add(row, offset, k, maximize ? -c[k] : c[k]);
    }
    if (K == 0 && last >= 0) add(row, offset, last, c[last]);
  }

 private:
  void add(const GradientRow& row, int64_t offset, int k, double coefficient) {
    grads[K] = element(row.type, row.of[k], offset);
    coefficients[K] = coefficient;
    objectives[K++] = k;
  }
};

// Products of the gradients by chunk, and their sums by role, in the chunks' order.
class ChunkSums {
 public:
  ChunkSums(int K, size_t chunks) : K_(K), sums_(chunks * triangle(K)) {}

  // products: of those that are present, row by row of their triangle.
  void put(size_t chunk, const Present& present, const double* products) {
    double* sums = &sums_[chunk * triangle(K_)];
    for (int i = 0, p = 0; i < present.K; ++i) {
      const int a = present.objectives[i];
      for (int j = i; j < present.K; ++j, ++p) {
        sums[a * K_ - a * (a - 1) / 2 + present.objectives[j] - a] = products[p];
      }
    }
  }
  template <class Row>
  void add_up(const std::vector<Row>& rows, const std::vector<Chunk>& chunks, double* out) const {
    std::fill(out, out + kRoles * K_ * K_, 0.0);
    const double* sums = sums_.data();
    for (const Chunk& chunk : chunks) {
      double* matrix = out + gradients_of(rows[chunk.row]).role * K_ * K_;
      for (int i = 0; i < K_; ++i) {
        for (int j = i; j < K_; ++j) matrix[i * K_ + j] += *sums++;
      }
    }
    for (double* m = out; m < out + kRoles * K_ * K_; m += K_ * K_) {
      for (int i = 0; i < K_; ++i) {
        for (int j = 0; j < i; ++j) m[i * K_ + j] = m[j * K_ + i];
      }
    }
  }

 private:
  int K_;
  std::vector<double> sums_;
};

}  // namespace

void gram(const Kernels& kernels, const Threads& threads, const std::vector<GradientRow>& rows,
          int K, double* out) {
  const std::vector<Chunk> chunks = cut(rows);
  ChunkSums sums(K, chunks.size());
  for_each_chunk(threads, chunks, [&](size_t index, const Chunk& chunk) {
    const GradientRow& row = rows[chunk.row];
    const Present present(row, chunk.offset, K);
    double products[triangle(kMaxObjectives)];
    kernels.gram(row.type, present.grads, present.K, chunk.n, products);
    sums.put(index, present, products);
  });
  sums.add_up(rows, chunks, out);
}

void combine(const Kernels& kernels, const Threads& threads, const std::vector<GradientRow>& rows,
             int K, const double* coefficients, const std::vector<void*>& out) {
  for_each_chunk(threads, cut(rows), [&](size_t, const Chunk& chunk) {
    const GradientRow& row = rows[chunk.row];
    const Present present(row, chunk.offset, K, coefficients, false, false);
    kernels.combine(row.type, {present.grads, present.coefficients, present.K, chunk.n},
                    element(row.type, out[chunk.row], chunk.offset));
  });
}

void update(const Kernels& kernels, const Threads& threads, int rule,
            const std::vector<UpdateRow>& rows, const std::vector<Group>& groups, int K,
            const double* coefficients, double* grams) {
  const std::vector<Chunk> chunks = cut(rows);
  ChunkSums sums(K, grams ? chunks.size() : 0);
  std::vector<int64_t> steps;
  steps.reserve(rows.size());
  for (const UpdateRow& row : rows) steps.push_back(row.step ? int64_t(*row.step += 1) : 0);
  for_each_chunk(threads, chunks, [&](size_t index, const Chunk& chunk) {
    const UpdateRow& row = rows[chunk.row];
    const Group& group = groups[row.group];
    const Type type = row.grads.type;
    const Present present(row.grads, chunk.offset, K, coefficients, maximizes(rule, group.numbers),
                          grams);
    void* state[kMaxStates];
    for (int i = 0; i < kMaxStates; ++i) state[i] = element(type, row.state[i], chunk.offset);
    double products[triangle(kMaxObjectives)];
    kernels.update(rule, type, {present.grads, present.coefficients, present.K, chunk.n},
                   group.numbers, steps[chunk.row], element(type, row.param, chunk.offset), state,
                   grams ? products : nullptr);
    if (grams) sums.put(index, present, products);
  });
  if (grams) sums.add_up(rows, chunks, grams);
}

}  // namespace dtokd::cpu
