// The whole step in one cooperative launch: gradients stay in registers and shared memory between
// the Gram matrix and the update, so that they are read once. A block owns tiles far apart; the
// first are kept in registers, the next in shared memory, what is left is read again (from the L2
// cache, if it is not too much). The same functions in the same order as gram.cuh and update.cuh,
// so the same bits.
//
// A model, not a measurement: of float32 and K = 2, 5 tiles fit on half a multiprocessor of an
// H100, so 5.4M elements on its 132; of half types 9, so 9.7M.
#pragma once

#include "cuda/gram.cuh"
#include "cuda/update.cuh"

namespace dtokd::cuda {

constexpr int kResidentBlocks = 2;  // on a multiprocessor: 128 registers for a thread
// Tiles that a block may own, kept or not.
constexpr int kMaxRounds = 24;

// Tiles that a thread's registers hold beside what it computes with, for two gradients: one more
// spills.
template <class T>
constexpr int kRegisterTiles = sizeof(T) == 4 ? 2 : 3;
template <class T, int P>
constexpr int kTileBytes = kTile * int(sizeof(T)) * P;

template <int P, int M>
struct ResidentEntry : UpdateEntry<P, M> {
  unsigned first_slot;
  bool counts_step;  // a tensor may have two entries: its whole tiles, and what is left
};

struct ResidentJob {
  GramJob gram;
  unsigned whole;  // the first so many tiles of the table are whole and aligned
  int shared_tiles;
  Group groups[kMaxGroups];
};

// What a thread has of a tile of each gradient.
template <class T, int P>
struct Tile {
  Packed<T, kPerWord<T>> packed[kTileWords<T>][P];

  // Of word u, in the tile that begins at `begin`.
  static DTOKD_DEVICE Words place(int64_t begin, int u) {
    return {begin + int64_t(u * kThreads + threadIdx.x) * kPerWord<T>, kPerWord<T>};
  }
  DTOKD_DEVICE void load(const void* const (&grads)[P], int64_t begin) {
    const T* g[P];
#pragma unroll
    for (int k = 0; k < P; ++k) g[k] = static_cast<const T*>(grads[k]);
#pragma unroll
    for (int u = 0; u < kTileWords<T>; ++u) {
      load_gradients<T, P, kPerWord<T>>(g, place(begin, u), packed[u]);
    }
  }
  // To and from the block's room for it; every thread reads what it has written itself.
  DTOKD_DEVICE void save(uint4* room) const {
#pragma unroll
    for (int i = 0; i < kTileWords<T> * P; ++i) {
      room[i * kThreads + threadIdx.x] = packed[i / P][i % P].word[0];
    }
  }
  DTOKD_DEVICE void restore(const uint4* room) {
#pragma unroll
    for (int i = 0; i < kTileWords<T> * P; ++i) {
      packed[i / P][i % P].word[0] = room[i * kThreads + threadIdx.x];
    }
  }
};

template <class Rule, int P>
class Resident {
 public:
  using T = typename Rule::T;
  using Entry = ResidentEntry<P, Rule::kTensors>;
  static_assert(Rule::kElements == kPerWord<T>, "an update takes a word of gradients at a time");

  struct Place {
    int entry;
    int64_t begin, end;
    unsigned slot;
  };

  const Table<Entry>& table;
  const ResidentJob& job;

  // Tiles of a block go round by round; `tile` may lie beyond the last.
  DTOKD_DEVICE unsigned tile(int round) const { return blockIdx.x + round * gridDim.x; }
  DTOKD_DEVICE Place place(unsigned tile) const {
    const int e = table.find(tile);
    const int64_t begin = table.begin(tile, e);
    return {e, begin, table.end(begin, e),
            table.entries[e].first_slot + (tile - table.first_chunk[e])};
  }
  DTOKD_DEVICE void put(const Place& at, double (&sums)[triangle(P)]) const {
    drop_absent<P>(table.entries[at.entry].grads, sums);
    put_sums(sums, job.gram, at.slot);
  }
  DTOKD_DEVICE void put_whole(const Place& at, const Tile<T, P>& tile) const {
    Sums<P> total{};
    add_group<T, P>(tile.packed, table.entries[at.entry].grads, at.begin, 0, kTile, total);
    put(at, total.of);
  }
  DTOKD_DEVICE void put_ragged(const Place& at) const {
    Sums<P> total{};
    total = add_ragged_tile<T, P>(table.entries[at.entry].grads, at.begin, at.end, total);
    put(at, total.of);
  }
  DTOKD_DEVICE void update_whole(const Place& at, const Tile<T, P>& tile,
                                 const Shared<Rule, P>& shared) const {
    void* const* tensors = table.entries[at.entry].tensors;
#pragma unroll
    for (int u = 0; u < kTileWords<T>; ++u) {
      typename Rule::template Elements<kPerWord<T>> elements;
      const Words place = Tile<T, P>::place(at.begin, u);
      elements.load(tensors, place);
      update_elements<Rule, P, kPerWord<T>>(tile.packed[u], elements, shared.coefficients, tensors,
                                            shared.numbers, place);
    }
  }
};

template <class Rule, int P>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    resident_kernel(DTOKD_PARAMETER(Table<ResidentEntry<P, Rule::kTensors>>) table,
                    DTOKD_PARAMETER(ResidentJob) job) {
  using T = typename Rule::T;
  DTOKD_DYNAMIC_SHARED(uint4, room);
  DTOKD_SHARED(shared, Shared<Rule, P>[kMaxRounds]);
  DTOKD_SHARED(grams, double[kRoles][kGramSize]);
  DTOKD_SHARED(values, double[values_size(P)]);
  DTOKD_SHARED(flags, bool[2]);
  constexpr int kRegisters = kRegisterTiles<T>;
  constexpr int kRoom = kTileBytes<T, P> / kWordBytes;
  const Resident<Rule, P> resident{table, job};
  const unsigned tiles = table.chunks();

  // 1: sums; what stays in registers last, so that it is alive no longer than it must
  if (threadIdx.x < kMaxRounds && resident.tile(threadIdx.x) < tiles) {
    const auto& entry = table.entries[table.find(resident.tile(threadIdx.x))];
    set_numbers<Rule, P>(entry, job.groups[entry.group], shared[threadIdx.x]);
  }
  int whole_rounds = 0;
#pragma unroll 1
  for (int r = 0; resident.tile(r) < tiles; ++r) {
    if (resident.tile(r) < job.whole) {
      ++whole_rounds;
    } else {
      resident.put_ragged(resident.place(resident.tile(r)));
    }
  }
#pragma unroll 1
  for (int r = kRegisters; r < whole_rounds; ++r) {
    const auto at = resident.place(resident.tile(r));
    Tile<T, P> tile;
    tile.load(table.entries[at.entry].grads, at.begin);
    if (r - kRegisters < job.shared_tiles) tile.save(room + (r - kRegisters) * kRoom);
    resident.put_whole(at, tile);
  }
  Tile<T, P> kept[kRegisters];
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    if (r >= whole_rounds) continue;
    const auto at = resident.place(resident.tile(r));
    kept[r].load(table.entries[at.entry].grads, at.begin);
  }
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    if (r < whole_rounds) resident.put_whole(resident.place(resident.tile(r)), kept[r]);
  }

  // 2: weights, by every block for itself
  grid_barrier(job.gram.scratch.tickets + 1);
  add_slots<P>(job.gram, grams);
  const int K = job.gram.K;
  block_balance<P>(grams, job.gram.losses, nullptr, K, job.gram.options, {nullptr, values, flags});
  __syncthreads();
  if (blockIdx.x == 0) {
    const Record& record = job.gram.record;
    for (int i = threadIdx.x; i < kRoles * K * K; i += kThreads) {
      record.grams[i] = grams[i / (K * K)][i % (K * K)];
    }
    for (int i = threadIdx.x; i < values_size(K); i += kThreads) record.values[i] = values[i];
    if (threadIdx.x < 2) record.flags[threadIdx.x] = flags[threadIdx.x];
  }
  if (flags[1]) return;
  if (blockIdx.x == 0) {  // all blocks have read them before the barrier
    for (int i = threadIdx.x; i < table.count; i += kThreads) {
      if (table.entries[i].counts_step) *table.entries[i].step += 1;
    }
  }
  for (int i = threadIdx.x; i < kMaxRounds * P; i += kThreads) {
    if (resident.tile(i / P) >= tiles) continue;
    const auto& entry = table.entries[table.find(resident.tile(i / P))];
    set_coefficient<Rule, P>(entry, job.groups[entry.group], {K, values + K, nullptr}, i % P,
                             shared[i / P]);
  }
  __syncthreads();

  // 3: update; then what was not kept, the last read first, while it is in the L2 cache
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    if (r >= whole_rounds) continue;
    resident.update_whole(resident.place(resident.tile(r)), kept[r], shared[r]);
  }
#pragma unroll 1
  for (int r = whole_rounds - 1; r >= kRegisters; --r) {
    const auto at = resident.place(resident.tile(r));
    Tile<T, P> tile;
    if (r - kRegisters < job.shared_tiles) {
      tile.restore(room + (r - kRegisters) * kRoom);
    } else {
      tile.load(table.entries[at.entry].grads, at.begin);
    }
    resident.update_whole(at, tile, shared[r]);
  }
#pragma unroll 1
  for (int r = whole_rounds; resident.tile(r) < tiles; ++r) {
    const auto at = resident.place(resident.tile(r));
    update_ragged<Rule, P>(table.entries[at.entry], shared[r], at.begin, at.end);
  }
}

}  // namespace dtokd::cuda
