// Two-byte floating-point numbers as memory holds them.
#pragma once

#include <cstdint>
#include <cstring>

namespace dtokd::cpu {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

}  // namespace dtokd::cpu
