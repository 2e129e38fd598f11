// How tensors are cut into chunks, one block each, and their addresses put into kernel parameters.
// Host code but for `find`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace dtokd::cuda {

// Elements that a block takes at a time, 16 per thread. Sums are taken tile by tile and chunk by
// chunk, so these numbers decide the bits of a Gram matrix.
constexpr int kTile = 4096;
// A large model has larger chunks, not more: the last block adds up all of them.
constexpr int64_t kMaxWholeChunks = 4096;

// Elements of a chunk: whole tiles.
inline int64_t chunk_size(const std::vector<Gradients>& tensors) {
  int64_t tiles = 0;
  for (const Gradients& t : tensors) tiles += t.size / kTile;
  return kTile * std::max<int64_t>(1, (tiles + kMaxWholeChunks - 1) / kMaxWholeChunks);
}

inline int64_t chunks_of(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

// The Gram's partial sums, a slot for each chunk: tensors in their order, role by role. Slots do
// not depend on alignment or tables, so the bits do not either.
struct Slots {
  std::vector<unsigned> first;  // of each tensor
  unsigned begin[kRoles + 1];   // of each role

  Slots(const std::vector<Gradients>& tensors, int64_t chunk) : first(tensors.size()) {
    unsigned next = 0;
    for (int role = 0; role < kRoles; ++role) {
      begin[role] = next;
      for (size_t t = 0; t < tensors.size(); ++t) {
        if (tensors[t].role != role) continue;
        first[t] = next;
        next += unsigned(chunks_of(tensors[t].size, chunk));
      }
    }
    begin[kRoles] = next;
  }
  unsigned count() const { return begin[kRoles]; }
};

// Kernel parameters since CUDA 12.1 (sm_70 and later); some of them are left for the rest.
constexpr int kParameterBytes = 32764;
constexpr int kTableBytes = kParameterBytes - 2560;

// Tensors of one launch. Chunk c of the launch belongs to the last entry with first_chunk <= c.
template <class Entry>
struct Table {
  static constexpr int kCapacity = kTableBytes / int(sizeof(Entry) + sizeof(unsigned)) - 1;

  int64_t chunk;
  int count;
  unsigned first_chunk[kCapacity + 1];
  Entry entries[kCapacity];

  DTOKD_HD unsigned chunks() const { return first_chunk[count]; }
  DTOKD_HD int find(unsigned c) const {
    int low = 0;
    int high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= c) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  // Elements of chunk c in the entry it belongs to: [begin, end).
  DTOKD_HD int64_t begin(unsigned c, int entry) const {
    return int64_t(c - first_chunk[entry]) * chunk;
  }
  DTOKD_HD int64_t end(int64_t begin, int entry) const {
    const int64_t left = entries[entry].size - begin;
    return begin + (left < chunk ? left : chunk);
  }
};

// The tables of the tensors that `belongs(t)`, in their order; entry(t) makes one's entry. A table
// ends when it is full. Empty tensors have entries without chunks, which `find` never finds.
template <class Entry, class Tensor, class Belongs, class Make>
std::vector<Table<Entry>> make_tables(const std::vector<Tensor>& tensors, int64_t chunk,
                                      const Belongs& belongs, const Make& make) {
  std::vector<Table<Entry>> tables;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (!belongs(t)) continue;
    const Entry entry = make(t);
    if (tables.empty() || tables.back().count == Table<Entry>::kCapacity) {
      tables.emplace_back();
      tables.back().chunk = chunk;
      tables.back().count = 0;
      tables.back().first_chunk[0] = 0;
    }
    Table<Entry>& table = tables.back();
    table.entries[table.count] = entry;
    table.first_chunk[table.count + 1] = table.chunks() + unsigned(chunks_of(entry.size, chunk));
    ++table.count;
  }
  return tables;
}

// Whether 16-byte loads and stores may be used: null is aligned.
template <class Pointer>
bool is_aligned(const Pointer* pointers, int count) {
  return std::all_of(pointers, pointers + count,
                     [](Pointer p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

}  // namespace dtokd::cuda
