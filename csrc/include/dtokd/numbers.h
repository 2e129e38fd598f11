// The element types of tensors, and the numbers that kernels compute with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"

namespace dtokd {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t size_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

// Two-byte floating-point numbers as memory holds them.
struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// memcpy, as std::bit_cast is no device function
DTOKD_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

DTOKD_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DTOKD_HD float widen(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

DTOKD_HD float widen(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // shifting puts the exponent too low by 112; the product corrects it, subnormals included
  const float value = bits_to_float(magnitude << 13) * bits_to_float((127 + 112) << 23);
  return bits_to_float(float_to_bits(value) | sign);
#endif
}

DTOKD_HD float widen(float x) { return x; }
DTOKD_HD double widen(double x) { return x; }

// round to nearest even, NaN stays NaN
DTOKD_HD void narrow(float x, bf16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = float_to_bits(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

DTOKD_HD void narrow(float x, f16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    out->bits = 0x7e00;
    return;
  }
  if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the sum's last bit is 2^-24
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    result = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | result);
#endif
}

DTOKD_HD void narrow(float x, float* out) { *out = x; }
DTOKD_HD void narrow(double x, double* out) { *out = x; }

// What elements of type T are computed in.
template <class T>
struct OpMath {
  using V = float;
};
template <>
struct OpMath<double> {
  using V = double;
};

// The functions that update rules need of a number; vectors have their own.
DTOKD_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DTOKD_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
DTOKD_HD float sqrt(float x) { return ::sqrtf(x); }
DTOKD_HD double sqrt(double x) { return ::sqrt(x); }

// NaN in either is NaN, as torch.maximum
template <class V>
DTOKD_HD V maximum(V a, V b) {
  return a > b || a != a ? a : b;
}

// Neither infinite nor NaN.
DTOKD_HD bool is_finite(double x) { return x - x == 0; }

// x^n by squaring: no libm, so every machine gets the same bits.
DTOKD_HD double power(double x, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1, x *= x) {
    if (n & 1) result *= x;
  }
  return result;
}

}  // namespace dtokd
