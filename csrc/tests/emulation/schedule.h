// The order in which the emulation runs blocks and threads. A correct kernel's results do not
// depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

class Schedule {
 public:
  enum class Kind { kForward, kReverse, kShuffled };

  // name: "forward", "reverse", or a number, the seed of a random order.
  explicit Schedule(const std::string& name) {
    if (name == "forward") {
      kind_ = Kind::kForward;
    } else if (name == "reverse") {
      kind_ = Kind::kReverse;
    } else if (!name.empty() && name.find_first_not_of("0123456789") == std::string::npos) {
      kind_ = Kind::kShuffled;
      seed_ = uint32_t(std::stoul(name));
    } else {
      throw std::invalid_argument("schedule: got '" + name +
                                  "', expected forward, reverse or a number (a seed)");
    }
  }
  // DTOKD_EMULATION_SCHEDULE, else forward.
  static Schedule from_environment() {
    const char* name = std::getenv("DTOKD_EMULATION_SCHEDULE");
    return Schedule(name ? name : "forward");
  }

  // Starts a launch anew, so that each repeats itself.
  void restart() { random_.seed(seed_); }

  // How many blocks of a launch that promises nothing run side by side.
  unsigned blocks_together() const { return kind_ == Kind::kShuffled ? 4 : 1; }

  // Once for the blocks of a launch.
  template <class T>
  void order_blocks(std::vector<T>& blocks) {
    if (kind_ == Kind::kReverse) std::reverse(blocks.begin(), blocks.end());
    if (kind_ == Kind::kShuffled) std::shuffle(blocks.begin(), blocks.end(), random_);
  }
  // Before the first round of the threads that run together, and before each of the others.
  template <class T>
  void order_threads(std::vector<T>& threads, bool first_round) {
    if (kind_ == Kind::kReverse && first_round) std::reverse(threads.begin(), threads.end());
    if (kind_ == Kind::kShuffled) std::shuffle(threads.begin(), threads.end(), random_);
  }
  // Whether a thread that could run waits for another round.
  bool holds_back() { return kind_ == Kind::kShuffled && (random_() & 1); }

 private:
  Kind kind_;
  uint32_t seed_ = 0;
  std::mt19937 random_;
};

}  // namespace emulation
