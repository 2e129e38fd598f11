// Random numbers from a counter: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). The same bits as
// weighting/_random.py.
#pragma once

#include <cstdint>

namespace dtokd {

struct SplitMix64 {
  static constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15;
  uint64_t state;

  // Where step number `step` of a seed begins, each step drawing `count` numbers.
  SplitMix64(int64_t seed, int64_t step, int64_t count) {
    state = uint64_t(seed);
    state = mixed() + uint64_t(step) * uint64_t(count) * kIncrement;
  }

  uint64_t mixed() {
    state += kIncrement;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }

  // In (0, 1).
  double uniform() { return (double(mixed() >> 11) + 0.5) * 0x1p-53; }
};

}  // namespace dtokd
