#include "cuda/resident.cuh"
#include "cuda/select.h"

namespace dtokd::cuda {
namespace {

// Part of a target: its whole tiles, or what is left.
struct Piece {
  size_t target;
  int64_t begin, size;
  bool whole, counts_step;
};

// Whole tiles first. A tensor that is not aligned has none.
std::vector<Piece> cut(const std::vector<Target>& targets) {
  std::vector<Piece> pieces, left;
  for (size_t t = 0; t < targets.size(); ++t) {
    const Target& target = targets[t];
    const void* tensors[] = {target.param, target.state[0], target.state[1]};
    const bool aligned = is_aligned(target.grads.of, kMaxObjectives) && is_aligned(tensors, 3);
    const int64_t size = target.grads.size;
    const int64_t whole = aligned ? size / kTile * kTile : 0;
    pieces.push_back({t, 0, whole, true, whole == size});
    left.push_back({t, whole, size - whole, false, whole < size});
  }
  pieces.insert(pieces.end(), left.begin(), left.end());
  return pieces;
}

template <class Rule, int P>
int launch(const std::vector<Target>& targets, const std::vector<Group>& groups, GramJob gram,
           const Slots& slots, Stream stream) {
  using T = typename Rule::T;
  using Entry = ResidentEntry<P, Rule::kTensors>;
  const std::vector<Piece> pieces = cut(targets);
  ResidentJob job{gram, 0, 0, {}};
  const auto tables = make_tables<Entry>(
      pieces, kTile, [&](size_t i) { return pieces[i].size > 0 || pieces[i].counts_step; },
      [&](size_t i) {
        const Piece& piece = pieces[i];
        const Target& target = targets[piece.target];
        Entry entry{};
        const auto shifted = [&](auto* tensor, int64_t bytes) {
          using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor)>>,
                                          const char, char>;
          return tensor ? static_cast<Byte*>(tensor) + piece.begin * bytes : nullptr;
        };
        for (int k = 0; k < gram.K; ++k) entry.grads[k] = shifted(target.grads.of[k], sizeof(T));
        Rule::set_tensors(target, entry.tensors);
        for (int m = 0; m < Rule::kTensors; ++m) {
          entry.tensors[m] =
              shifted(entry.tensors[m], m == 0 ? sizeof(T) : size_of(target.state_type));
        }
        entry.step = target.step;
        entry.size = piece.size;
        entry.role = uint8_t(target.grads.role);
        entry.group = uint8_t(target.group);
        entry.aligned = piece.whole;
        entry.first_slot = slots.first[piece.target] + unsigned(piece.begin / kTile);
        entry.counts_step = piece.counts_step;
        if (piece.whole) job.whole += unsigned(piece.size / kTile);
        return entry;
      });
  if (tables.size() != 1) return kUnfit;
  const auto kernel = resident_kernel<Rule, P>;
  const Residency device = residency(kernel, kThreads, kResidentBlocks);
  const unsigned tiles = tables[0].chunks();
  const unsigned blocks = std::min(unsigned(device.blocks), tiles);
  job.shared_tiles = std::min(device.dynamic_shared_bytes / kTileBytes<T, P>, kMaxRounds);
  if (blocks == 0 || job.shared_tiles == 0 || tiles > blocks * kMaxRounds) return kUnfit;
  std::copy(groups.begin(), groups.end(), job.groups);
  return launch_cooperative(kernel, blocks, kThreads, job.shared_tiles * kTileBytes<T, P>, stream,
                            tables[0], job);
}

}  // namespace

int launch_resident_adamw(const std::vector<Target>& targets, const std::vector<Group>& groups,
                          int K, const double* losses, const BalanceOptions& options,
                          const Scratch& scratch, const Record& record, Stream stream) {
  if (K < 1 || K > 2 || targets.empty() || groups.size() > kMaxGroups) return kUnfit;
  const Type type = targets[0].grads.type, state_type = targets[0].state_type;
  std::vector<Gradients> gradients;
  for (const Target& t : targets) {
    if (t.grads.type != type || t.state_type != state_type || t.state[2] || t.master) return kUnfit;
    gradients.push_back(t.grads);
  }
  if (chunk_size(gradients) != kTile) return kUnfit;
  const Slots slots(gradients, kTile);
  GramJob gram{K, 0, {}, scratch, record, losses, options};
  std::copy(slots.begin, slots.begin + kRoles + 1, gram.slots);
  return by_types(type, state_type, [&](auto t, auto s) {
    using T = typename decltype(t)::T;
    using S = typename decltype(s)::T;
    if constexpr (sizeof(T) <= sizeof(S) && sizeof(T) < 8) {
      return launch<StepRule<AdamW, T, S, false>, 2>(targets, groups, gram, slots, stream);
    } else {
      return kUnfit;
    }
  });
}

}  // namespace dtokd::cuda
