// Sums of products in parts: float32 arithmetic that is as exact as float64's, for GPUs that have
// little of that.
//
// NOTE [Sums in parts]: GPUs of compute capability 8.0, 9.0 and 10.0 have float64 units enough to
// keep up with their memory. The others (8.6, 8.9, 10.3, 12.0) have two operations a clock and
// multiprocessor, and an element of two float32 gradients costs 5: by a model, not a measurement, a
// B300 would compute 8 times as long as it reads. They take a group of up to 16 elements of a
// thread like this, with u = 2^-24:
//   1. x' = x / 2^m, y' = y / 2^n, with the powers of two that bring the group's largest |x'| and
//      |y'| into [1/2, 1). Exact, so that 1e-25 and 1e25 are as good as 1; only what is below
//      2^-149 of the largest is lost.
//   2. x' y' = p + low exactly: p rounded, low = fma(x', y', -p) (Dekker 1971; with fma: Ogita,
//      Rump, Oishi 2005, TwoProductFMA). Products of half types fit into p.
//   3. p is added to an anchor, 48 = 1.5 2^5: a sum so large that it takes p's leading bits, down
//      to 2^-18, and no more. All sums stay between 32 and 64, where numbers have one spacing, so
//      none rounds but for the part of p that it leaves, which is p - ((s + p) - s), exactly
//      (Dekker's FastTwoSum, as |s| > |p|; the splitting of Rump, Ogita, Oishi 2008, AccSum).
//   4. What is left, at most 2^-19, and low, at most 2^-25, go the same way into the second part,
//      whose spacing is 2^-36. What that leaves, at most 2^-37 each, goes into plain sums.
//   5. Spacings are counted by integers: the difference of two floats' bits. Those of all parts
//      make one integer below 2^58, in units of 2^-53 2^(m + n). It becomes a float64 and joins the
//      thread's sum: two operations in float64 for a group.
// Error: only the plain sums and the last spacing round. 16 numbers of at most 2^-37, added one by
// one, err by at most 135 2^-37 u = 2^-53.9 (sum over k of k 2^-37 u), two such sums and their own
// by 2^-52.7, and the spacing by 2^-54: together below 1.7 units of 2^-53 2^(m + n). As
// 2^(m + n) <= 4 max|x| max|y|, a group errs by less than 7 2^-53 max|x| max|y|, and joining it by
// 2 2^-53 of the sum. 16 elements in float64 err by up to 16 2^-53 of the sum of |x y|. So the
// bound is smaller than float64's, in units of the gradients' lengths, |x| |y|, rather than of the
// sum of |x y|: the units that the weights' own errors are in (reference.min_norm_weights).
//
// A group with Inf, or whose largest number is below 2^-126 or at least 2^126, is computed in
// float64 instead. NaN makes the sum NaN.
#pragma once

#include "cuda/vector_io.cuh"

// The one place where this is chosen. Tests compile both.
#ifndef DTOKD_SUMS_IN_PARTS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
#define DTOKD_SUMS_IN_PARTS 1
#else
#define DTOKD_SUMS_IN_PARTS 0
#endif
#endif

namespace dtokd::cuda {

// Whether products of gradients of type T are added up in parts. Device code only: a host does not
// know for which GPU.
template <class T>
constexpr bool kInParts = DTOKD_SUMS_IN_PARTS && sizeof(T) < 8;

// Elements of a group. 16 of more than four gradients do not fit into registers.
template <int P>
constexpr int kGroupElements = P <= 4 ? 16 : 8;

// The first two parts begin at these numbers, and the sum of the third is counted from the last:
// each in the middle of numbers of one spacing.
constexpr float kAnchors[] = {48, 0x1.8p-13f, 0x1.8p-30f};
// log2 of the last one's spacing, and of the others' in units of it.
constexpr int kSpacing = -53;
constexpr int kShifts[] = {35, 17};

// How many spacings an anchored sum is from its anchor.
DTOKD_DEVICE int spacings(float sum, float anchor) {
  return int(float_to_bits(sum) - float_to_bits(anchor));
}

// 2^n, for normal numbers; NaN if x is.
DTOKD_DEVICE double power_of_two(int n, float x) {
  const uint64_t bits = uint64_t(x == x ? 1023 + n : 2047) << 52 | uint64_t(x != x) << 51;
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

// Adds x to an anchored sum; returns what the sum has not taken.
DTOKD_DEVICE float add_leading(float& sum, float x) {
  const float before = sum;
  sum = before + x;
  return x - (sum - before);
}

// A gradient's elements of a group, which `scale` divides by their common power of two, once
// `set_exponent` has found it: false if float32 has no such power.
template <int N>
struct Scaled {
  float x[N];
  int exponent;  // as a float32 has it, of the largest

  DTOKD_DEVICE bool set_exponent() {
    float largest = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) largest = fmaxf(largest, fabsf(x[e]));
    exponent = int(float_to_bits(largest) >> 23);
    return exponent <= 252 && (exponent >= 1 || largest == 0);
  }
  DTOKD_DEVICE void scale() {
    const float factor = bits_to_float(uint32_t(253 - exponent) << 23);
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] *= factor;
  }
  // log2 of what `scale` divides by
  DTOKD_DEVICE int power() const { return exponent - 126; }
};

// The sum of the products of two groups. kExact: float32 holds a product.
template <bool kExact, int N>
DTOKD_DEVICE double product_in_parts(const Scaled<N>& a, const Scaled<N>& b, double sum) {
  float first = kAnchors[0], second = kAnchors[1], rest = 0, rest_of_low = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float x = a.x[e], y = b.x[e];
    if constexpr (kExact) {
      const float before = first;
      first = fma(x, y, before);
      rest += add_leading(second, fma(x, y, before - first));
    } else {
      const float product = x * y;
      const float low = fma(x, y, -product);
      rest += add_leading(second, add_leading(first, product));
      rest_of_low += add_leading(second, low);
    }
  }
  const float third = (rest + rest_of_low) + kAnchors[2];
  const int64_t total = (int64_t(spacings(first, kAnchors[0])) << kShifts[0]) +
                        (int64_t(spacings(second, kAnchors[1])) << kShifts[1]) +
                        spacings(third, kAnchors[2]);
  return fma(double(total), power_of_two(a.power() + b.power() + kSpacing, first), sum);
}

// Adds the products of a group, W words of N elements of each gradient; false, and nothing is
// added, if one has no common power of two.
template <class T, int P, int N, int W>
DTOKD_DEVICE bool add_in_parts(const Packed<T, N> (&packed)[W][P], double (&sums)[triangle(P)]) {
  static_assert(N * W <= kGroupElements<P>, "the parts have room for so many");
  Scaled<N * W> scaled[P];
  bool fits = true;
#pragma unroll
  for (int k = 0; k < P; ++k) {
#pragma unroll
    for (int u = 0; u < W; ++u) {
      float x[N];
      packed[u][k].unpack(x);
#pragma unroll
      for (int e = 0; e < N; ++e) scaled[k].x[u * N + e] = x[e];
    }
    fits = scaled[k].set_exponent() && fits;
  }
  if (!fits) return false;
#pragma unroll
  for (int k = 0; k < P; ++k) scaled[k].scale();
  int p = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
#pragma unroll
    for (int j = i; j < P; ++j, ++p) {
      sums[p] = product_in_parts<sizeof(T) == 2>(scaled[i], scaled[j], sums[p]);
    }
  }
  return true;
}

}  // namespace dtokd::cuda
