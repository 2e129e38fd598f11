// What the lanes of a warp do together.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "machine.h"

namespace emulation {

enum class Shuffle { kUp, kDown, kXor, kIndex };

// The lane that `lane` reads from, and whether it lies in its own segment (PTX, shfl.sync: the
// operands b and c); a lane without one reads its own value.
inline std::pair<unsigned, bool> shuffle_source(Shuffle kind, unsigned lane, unsigned b,
                                                unsigned c) {
  b &= 31;
  const unsigned segment = c >> 8 & 31, clamp = c & 31;
  const unsigned first = lane & segment, last = first | (clamp & ~segment);
  unsigned source = 0;
  bool inside = false;
  switch (kind) {
    case Shuffle::kUp:
      source = lane - b;
      inside = int(source) >= int(last);
      break;
    case Shuffle::kDown:
      source = lane + b;
      inside = source <= last;
      break;
    case Shuffle::kXor:
      source = lane ^ b;
      inside = source <= last;
      break;
    case Shuffle::kIndex:
      source = first | (b & ~segment);
      inside = source <= last;
      break;
  }
  return {inside ? source : lane, inside};
}

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, unsigned b, unsigned c, const Site& site,
          bool* inside = nullptr) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto& bits_of = Machine::get().meet(mask, bits, site, false);
  const auto [source, has_source] = shuffle_source(kind, thread().lane(), b, c);
  if (!(mask >> source & 1)) {
    Machine::get().fail("reads at " + site.text() + " from lane " + std::to_string(source) +
                        ", which its mask leaves out");
  }
  if (inside) *inside = has_source;
  const Quiet quiet;
  std::memcpy(&value, &bits_of[source], sizeof(T));
  return value;
}

// Bit i: the predicate of lane i, 0 outside the mask.
inline uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  const auto& predicates = Machine::get().meet(mask, predicate, site, false);
  const Quiet quiet;
  uint32_t result = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) result |= uint32_t(predicates[lane]) << lane;
  }
  return result;
}

}  // namespace emulation
