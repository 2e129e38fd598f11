// What the instructions of PTX do, on the emulation's fibers. Registers are unsigned numbers of
// their width; functions take and return Bits, and an assignment to a register keeps its low ones.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "tests/emulation/machine.h"
#include "tests/emulation/memory.h"
#include "tests/emulation/warp.h"

namespace ptx {

using Bits = uint64_t;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// ---- Between bits and values
template <class T>
T as(Bits bits) {
  if constexpr (std::is_same_v<T, bool>) {
    return bits != 0;
  } else {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }
}
// Signed numbers fill a wider register with their sign.
template <class T>
Bits bits_of(T value) {
  if constexpr (std::is_integral_v<T>) {
    return Bits(value);
  } else {
    Bits bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
  }
}
template <int width>
Bits low(Bits bits) {
  return bits & ((Bits(1) << width) - 1);
}

// ---- Arithmetic. Integers wrap around, so they are computed unsigned.
template <class T>
struct ComputeType {
  using Type = T;
};
template <class T>
  requires std::is_integral_v<T>
struct ComputeType<T> {
  using Type = uint64_t;
};
template <class T>
typename ComputeType<T>::Type operand(Bits bits) {
  return typename ComputeType<T>::Type(as<T>(bits));
}

template <class T>
Bits add(Bits a, Bits b) {
  return bits_of(T(operand<T>(a) + operand<T>(b)));
}
template <class T>
Bits sub(Bits a, Bits b) {
  return bits_of(T(operand<T>(a) - operand<T>(b)));
}
template <class T>
Bits mul(Bits a, Bits b) {
  return bits_of(T(operand<T>(a) * operand<T>(b)));
}
template <class T>
Bits mul_lo(Bits a, Bits b) {
  return mul<T>(a, b);
}
template <class T>
Bits mul_hi(Bits a, Bits b) {
  return bits_of(T((__int128(as<T>(a)) * __int128(as<T>(b))) >> (8 * sizeof(T))));
}
// Exact: of 16 or 32 bits.
template <class T>
Bits mul_wide(Bits a, Bits b) {
  static_assert(sizeof(T) <= 4);
  return operand<T>(a) * operand<T>(b);
}
template <class T>
Bits mad_lo(Bits a, Bits b, Bits c) {
  return add<T>(mul<T>(a, b), c);
}
template <class T>
Bits mad_wide(Bits a, Bits b, Bits c) {
  return mul_wide<T>(a, b) + c;
}
template <class T>
Bits fma(Bits a, Bits b, Bits c) {
  return bits_of(T(std::fma(as<T>(a), as<T>(b), as<T>(c))));
}
template <class T>
Bits div(Bits a, Bits b) {
  return bits_of(T(as<T>(a) / as<T>(b)));
}
template <class T>
Bits rem(Bits a, Bits b) {
  return bits_of(T(as<T>(a) % as<T>(b)));
}
template <class T>
Bits rcp(Bits a) {
  return bits_of(T(1 / as<T>(a)));
}
template <class T>
Bits sqrt(Bits a) {
  return bits_of(T(std::sqrt(as<T>(a))));
}
template <class T>
Bits neg(Bits a) {
  return bits_of(T(-operand<T>(a)));
}
template <class T>
Bits abs(Bits a) {
  return bits_of(T(std::abs(as<T>(a))));
}
// A NaN gives way to a number.
template <class T>
Bits min(Bits a, Bits b) {
  if constexpr (std::is_integral_v<T>) return bits_of(as<T>(b) < as<T>(a) ? as<T>(b) : as<T>(a));
  return bits_of(T(std::fmin(as<T>(a), as<T>(b))));
}
template <class T>
Bits max(Bits a, Bits b) {
  if constexpr (std::is_integral_v<T>) return bits_of(as<T>(a) < as<T>(b) ? as<T>(b) : as<T>(a));
  return bits_of(T(std::fmax(as<T>(a), as<T>(b))));
}
// The magnitude of b with the sign of a.
template <class T>
Bits copysign(Bits a, Bits b) {
  return bits_of(T(std::copysign(as<T>(b), as<T>(a))));
}

// ---- Bits
template <class T>
Bits bit_and(Bits a, Bits b) {
  return a & b;
}
template <class T>
Bits bit_or(Bits a, Bits b) {
  return a | b;
}
template <class T>
Bits bit_xor(Bits a, Bits b) {
  return a ^ b;
}
template <class T>
Bits bit_not(Bits a) {
  if constexpr (std::is_same_v<T, bool>) return !a;
  return ~a;
}
// By the full width or more: nothing is left, but signs.
template <class T>
Bits shl(Bits a, Bits count) {
  return uint32_t(count) >= 8 * sizeof(T) ? 0 : a << uint32_t(count);
}
template <class T>
Bits shr(Bits a, Bits count) {
  constexpr uint32_t kWidth = 8 * sizeof(T);
  if (uint32_t(count) >= kWidth) return bits_of(T(as<T>(a) < 0 ? -1 : 0));
  return bits_of(T(as<T>(a) >> uint32_t(count)));
}
template <class T>
Bits bfe(Bits a, Bits position, Bits length) {
  constexpr unsigned kWidth = 8 * sizeof(T);
  const unsigned from = uint8_t(position), count = uint8_t(length);
  Bits result = 0;
  const unsigned last = std::min(from + count, kWidth) - 1;
  const bool sign = std::is_signed_v<T> && count > 0 && (a >> last & 1);
  for (unsigned i = 0; i < kWidth; ++i) {
    const bool inside = i < count && from + i < kWidth;
    result |= Bits(inside ? a >> (from + i) & 1 : sign) << i;
  }
  return result;
}
template <class T>
Bits bfi(Bits a, Bits b, Bits position, Bits length) {
  constexpr unsigned kWidth = 8 * sizeof(T);
  const unsigned from = uint8_t(position), count = uint8_t(length);
  Bits result = b;
  for (unsigned i = 0; i < count && from + i < kWidth; ++i) {
    const Bits bit = Bits(1) << (from + i);
    result = a >> i & 1 ? result | bit : result & ~bit;
  }
  return result;
}
// table: bit 4 a + 2 b + c says what three bits give.
template <class T>
Bits lop3(Bits a, Bits b, Bits c, Bits table) {
  Bits result = 0;
  for (int i = 0; i < 32; ++i) {
    const Bits at = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    result |= (table >> at & 1) << i;
  }
  return result;
}
// Four bytes of the eight in b and a; the top bit of a selector spreads the byte's sign.
template <class T>
Bits prmt(Bits a, Bits b, Bits selectors) {
  const Bits bytes = low<32>(a) | b << 32;
  Bits result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> (4 * i) & 15;
    const unsigned byte = bytes >> (8 * (selector & 7)) & 0xff;
    result |= Bits(selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << (8 * i);
  }
  return result;
}
template <class T>
Bits popc(Bits a) {
  return std::popcount(as<T>(a));
}
template <class T>
Bits clz(Bits a) {
  return std::countl_zero(as<T>(a));
}

// ---- Choice
template <class T>
Bits selp(Bits a, Bits b, Bits condition) {
  return condition ? a : b;
}

enum Comparison {
  k_eq,
  k_ne,
  k_lt,
  k_le,
  k_gt,
  k_ge,
  k_equ,
  k_neu,
  k_ltu,
  k_leu,
  k_gtu,
  k_geu,
  k_num,
  k_nan
};
// Those that end in u are true of a NaN, the others are not.
template <class T>
bool compare(Comparison how, Bits a_bits, Bits b_bits) {
  const T a = as<T>(a_bits), b = as<T>(b_bits);
  const bool unordered = a != a || b != b;
  switch (how) {
    case k_eq:
      return a == b;
    case k_ne:
      return !unordered && a != b;
    case k_lt:
      return a < b;
    case k_le:
      return a <= b;
    case k_gt:
      return a > b;
    case k_ge:
      return a >= b;
    case k_equ:
      return unordered || a == b;
    case k_neu:
      return unordered || a != b;
    case k_ltu:
      return unordered || a < b;
    case k_leu:
      return unordered || a <= b;
    case k_gtu:
      return unordered || a > b;
    case k_geu:
      return unordered || a >= b;
    case k_num:
      return !unordered;
    case k_nan:
      return unordered;
  }
  return false;
}

// ---- Conversion
inline float widen(Half value) { return float(as<_Float16>(value.bits)); }
inline float widen(BFloat16 value) { return as<float>(Bits(value.bits) << 16); }
template <class T>
T widen(T value) {
  return value;
}
// To nearest, ties to even.
template <class T, class F>
T narrow(F value) {
  if constexpr (std::is_same_v<T, Half>) {
    return {uint16_t(bits_of(_Float16(value)))};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    static_assert(std::is_same_v<F, float>);
    const uint32_t bits = uint32_t(bits_of(value));
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return T(value);
  }
}

enum Rounding { kNone, kNearest, kZero, kDown, kUp };  // to a whole number
template <class F>
F to_whole(F value, Rounding rounding) {
  switch (rounding) {
    case kNone:
      return value;
    case kNearest:
      return std::nearbyint(value);
    case kZero:
      return std::trunc(value);
    case kDown:
      return std::floor(value);
    case kUp:
      return std::ceil(value);
  }
  return value;
}
template <class To, class From>
Bits cvt(Bits bits, Rounding rounding) {
  const auto value = widen(as<From>(bits));
  using Value = std::remove_const_t<decltype(value)>;
  if constexpr (std::is_integral_v<Value>) {
    return bits_of(narrow<To>(value));
  } else if constexpr (std::is_integral_v<To>) {
    // out of range: the nearest there is; NaN: 0
    const Value whole = to_whole(value, rounding);
    if (whole != whole) return 0;
    if (whole <= Value(std::numeric_limits<To>::min()))
      return bits_of(std::numeric_limits<To>::min());
    if (whole >= Value(std::numeric_limits<To>::max()))
      return bits_of(std::numeric_limits<To>::max());
    return bits_of(To(whole));
  } else {
    return bits_of(narrow<To>(to_whole(value, rounding)));
  }
}

// ---- Memory. Generic, global, local and parameter addresses are the host's.
struct SharedVariable {
  size_t bytes;  // 0: what the launch gives
  size_t alignment;
};
constexpr int kSharedBits = 20;

inline Bits address(const void* p) { return reinterpret_cast<Bits>(p); }
inline char* pointer(Bits address) { return reinterpret_cast<char*>(address); }

inline char* shared_start(const SharedVariable& v) {
  emulation::Machine& machine = emulation::Machine::get();
  return static_cast<char*>(v.bytes == 0 ? machine.dynamic_shared()
                                         : machine.shared_variable(&v, v.bytes, v.alignment));
}
inline Bits shared_to_host(const SharedVariable* variables, Bits shared) {
  shared = low<32>(shared);
  if (shared >> kSharedBits == 0)
    emulation::Machine::get().fail("uses no shared variable's address");
  const SharedVariable& variable = variables[(shared >> kSharedBits) - 1];
  return address(shared_start(variable)) + low<kSharedBits>(shared);
}
inline Bits host_to_shared(const SharedVariable* variables, Bits host) {
  for (Bits i = 0; variables[i].alignment != 0; ++i) {
    const Bits start = address(shared_start(variables[i]));
    if (host >= start && host - start < variables[i].bytes) {
      return (i + 1) << kSharedBits | (host - start);
    }
  }
  emulation::Machine::get().fail("takes another address for one of shared memory");
}

inline void check_aligned(Bits at, size_t bytes) { emulation::check_aligned(pointer(at), bytes); }

template <class T>
Bits load(Bits at) {
  T value;
  std::memcpy(&value, pointer(at), sizeof(T));
  return bits_of(value);
}
template <class T>
void store(Bits at, Bits value) {
  std::memcpy(pointer(at), &value, sizeof(T));
}
// Plain accesses to shared memory. With DTOKD_UNWATCHED_SHARED the thread sanitizer looks away:
// triton has lanes of a warp store one value to one place.
#ifdef DTOKD_UNWATCHED_SHARED
#define PTX_SHARED __attribute__((no_sanitize("thread"), noinline))
#else
#define PTX_SHARED
#endif
template <class T>
PTX_SHARED Bits load_shared(Bits at) {
  T value;
  __builtin_memcpy(&value, reinterpret_cast<const char*>(at), sizeof(T));
  if constexpr (std::is_integral_v<T>) return Bits(value);
  Bits bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
PTX_SHARED void store_shared(Bits at, Bits value) {
  __builtin_memcpy(reinterpret_cast<char*>(at), &value, sizeof(T));
}
template <class T>
T* typed(Bits at) {
  return reinterpret_cast<T*>(at);
}
template <class T>
Bits load_acquire(Bits at) {
  return bits_of(emulation::load_acquire(typed<T>(at)));
}
template <class T>
Bits load_relaxed(Bits at) {
  return bits_of(emulation::load_relaxed(typed<T>(at)));
}
template <class T>
void store_release(Bits at, Bits value) {
  emulation::store_release(typed<T>(at), as<T>(value));
}
template <class T>
void store_relaxed(Bits at, Bits value) {
  emulation::store_relaxed(typed<T>(at), as<T>(value));
}

template <class T, class Update>
Bits update(Bits at, const Update& update) {
  return bits_of(emulation::atomic_update(typed<T>(at), update));
}
template <class T>
Bits atom_add(Bits at, Bits b) {
  return update<T>(at, [=](T old) { return as<T>(add<T>(bits_of(old), b)); });
}
template <class T>
Bits atom_inc(Bits at, Bits b) {
  return update<T>(at, [=](T old) { return old >= as<T>(b) ? T(0) : T(old + 1); });
}
template <class T>
Bits atom_max(Bits at, Bits b) {
  return update<T>(at, [=](T old) { return std::max(old, as<T>(b)); });
}
template <class T>
Bits atom_min(Bits at, Bits b) {
  return update<T>(at, [=](T old) { return std::min(old, as<T>(b)); });
}
template <class T>
Bits atom_and(Bits at, Bits b) {
  return update<T>(at, [=](T old) { return T(old & as<T>(b)); });
}
template <class T>
Bits atom_or(Bits at, Bits b) {
  return update<T>(at, [=](T old) { return T(old | as<T>(b)); });
}
template <class T>
Bits atom_exch(Bits at, Bits b) {
  return update<T>(at, [=](T) { return as<T>(b); });
}
template <class T>
Bits atom_cas(Bits at, Bits b, Bits c) {
  return update<T>(at, [=](T old) { return old == as<T>(b) ? as<T>(c) : old; });
}

// What an operation that releases and acquires adds to the fences beside it: its own write comes
// before what follows the next such operation there.
inline void pass_on(Bits at) {
  emulation::observe(pointer(at));
  emulation::publish(pointer(at));
}

// ---- Threads
inline void fence() { emulation::Machine::get().fence(); }
inline void spin() { emulation::Machine::get().spin(); }
inline void barrier(const emulation::Site& site) { emulation::Machine::get().barrier(site); }
inline void warp_sync(Bits mask, const emulation::Site& site) {
  emulation::Machine::get().meet(uint32_t(mask), 0, site, true);
}
inline Bits shfl(emulation::Shuffle kind, Bits value, Bits b, Bits c, Bits mask,
                 const emulation::Site& site, bool* inside) {
  return emulation::shuffle(kind, uint32_t(mask), uint32_t(value), unsigned(b), unsigned(c), site,
                            inside);
}
// Matrices of 8 rows of 16 bytes: lane 8 i + r says where row r of matrix i is, and lane l has the
// 4 bytes number l % 4 of row l / 4 of each.
using MatrixRows = std::array<Bits, emulation::kWarpSize>;
inline const MatrixRows& matrix_rows(Bits at, const emulation::Site& site) {
  check_aligned(at, 16);
  return emulation::Machine::get().meet(0xffffffffu, at, site, false);
}
inline Bits in_row(const MatrixRows& rows, unsigned matrix) {
  const unsigned lane = emulation::thread().lane();
  return rows[8 * matrix + lane / 4] + 4 * (lane % 4);
}
inline Bits vote_ballot(Bits predicate, Bits mask, const emulation::Site& site) {
  return emulation::ballot(uint32_t(mask), predicate != 0, site);
}
inline Bits vote_any(Bits predicate, Bits mask, const emulation::Site& site) {
  return vote_ballot(predicate, mask, site) != 0;
}
inline Bits vote_all(Bits predicate, Bits mask, const emulation::Site& site) {
  return vote_ballot(predicate, mask, site) == low<32>(mask);
}

// What the translated file defines: its kernels, the last without a name.
struct Kernel {
  const char* name;
  void (*run)(const void* const* parameters);
};

}  // namespace ptx

extern const ptx::Kernel ptx_kernels[];
