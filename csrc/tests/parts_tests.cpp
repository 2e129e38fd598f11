// Sums of products in parts (cuda/parts.cuh) against the same in long double: groups, with the
// bound that its note derives; Gram matrices, by the emulated kernel; and the weights of nearly
// parallel gradients, which a Gram matrix decides by its last digits.
#define DTOKD_SUMS_IN_PARTS 1

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch_gram.cu"
#include "tests/check.h"

using namespace dtokd;
using namespace dtokd::cuda;

namespace {

static_assert(LDBL_MANT_DIG >= 64,
              "long double holds products of float32 and is what they are compared with");

constexpr int kGroup = kGroupElements<2>;
constexpr long double kUnit = 0x1p-53L;
std::mt19937 generator(0);

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(generator);
}
// Of both signs, with exponents from `low` to `high`.
float spread(int low, int high) {
  const int exponent = std::uniform_int_distribution<int>(low, high)(generator);
  return std::ldexp(uniform(1, 2) * (generator() & 1 ? 1.0f : -1.0f), exponent);
}

// ---- One group

template <class T>
struct Group16 {
  T element[2][kGroup];
  Packed<T, kGroup> packed[1][2];

  template <class F>
  explicit Group16(const F& number) {
    for (int e = 0; e < kGroup; ++e) {
      for (int k = 0; k < 2; ++k) narrow(float(number(e, k)), &element[k][e]);
    }
    for (int k = 0; k < 2; ++k) std::memcpy(packed[0][k].word, element[k], sizeof(element[k]));
  }
  long double x(int e, int k) const { return widen(element[k][e]); }
  long double largest(int k) const {
    long double result = 0;
    for (int e = 0; e < kGroup; ++e) result = std::max(result, std::fabs(x(e, k)));
    return result;
  }
  long double product(int i, int j) const {
    long double sum = 0;
    for (int e = 0; e < kGroup; ++e) sum += x(e, i) * x(e, j);
    return sum;
  }
};

// fits: whether it has a common power of two.
template <class T>
void check_group(const Group16<T>& group, bool fits = true) {
  double sums[3] = {0};
  CHECK((add_in_parts<T, 2, kGroup, 1>(group.packed, sums)) == fits);
  for (int i = 0, p = 0; i < 2; ++i) {
    for (int j = i; j < 2; ++j, ++p) {
      if (!fits) CHECK(sums[p] == 0);
      if (!fits) continue;
      const long double truth = group.product(i, j);
      const long double bound = 7 * group.largest(i) * group.largest(j) + std::fabs(truth);
      CHECK(std::fabs(sums[p] - truth) <= kUnit * bound + 0x1p-1074L);
    }
  }
}

template <class T>
void test_groups(int low, int high) {
  for (int round = 0; round < 500; ++round) {
    const float big = spread(low, high), other = spread(low, high);
    check_group<T>(Group16<T>([](int, int) { return uniform(-1, 1); }));
    check_group<T>(Group16<T>([&](int, int k) { return uniform(-1, 1) * (k ? other : big); }));
    // some 2^40 apart, one above the others, the largest of the two apart
    check_group<T>(
        Group16<T>([&](int, int) { return spread(std::max(low, -20), 20 < high ? 20 : high); }));
    check_group<T>(
        Group16<T>([&](int e, int k) { return e == round % 16 + k - 1 ? big : uniform(-1, 1); }));
    // what cancels, but for a last bit
    check_group<T>(Group16<T>([&](int e, int k) {
      return k == 0 ? (e % 2 ? big : -big) : e < 15 ? other : std::nextafter(other, 0.0f);
    }));
    // the most a part can be asked to hold, and ties
    check_group<T>(Group16<T>([&](int, int) { return std::nextafter(2.0f, 0.0f); }));
    check_group<T>(Group16<T>([&](int e, int) { return e % 4 ? 0x1p-10f + 0x1p-20f : 1.0f; }));
    check_group<T>(Group16<T>([&](int, int k) { return k ? 0.0f : big; }));
  }
}

// Exponents that a power of two of float32 cannot bring to 1, and numbers that are none.
void test_groups_that_do_not_fit() {
  const auto with = [](float x) {
    return Group16<float>([=](int e, int k) { return e == 3 && k == 0 ? x : k ? 0.5f : 0.0f; });
  };
  check_group(with(FLT_MIN));
  check_group(with(0x1p125f));
  check_group(with(std::nextafter(0x1p126f, 0.0f)));
  check_group(with(0x1p126f), false);
  check_group(with(FLT_MAX), false);
  check_group(with(INFINITY), false);
  check_group(with(-INFINITY), false);
  check_group(with(0x1p-127f), false);
  check_group(with(FLT_TRUE_MIN), false);
  double sums[3] = {1, 1, 1};
  CHECK((add_in_parts<float, 2, kGroup, 1>(with(NAN).packed, sums)));
  CHECK(std::isnan(sums[0]) && std::isnan(sums[1]) && sums[2] == 1 + 4.0);
}

// ---- Gram matrices of the kernel

struct Gram {
  double of[4];
};

Gram gram(const std::vector<float>& x, const std::vector<float>& y) {
  const std::vector<Gradients> tensors{
      {Type::kFloat32, 0, int64_t(x.size()), {x.data(), y.data()}}};
  std::vector<double> partials(scratch_size(tensors, 2), NAN);
  unsigned tickets[kTickets] = {};
  double grams[kRoles * 4];
  CHECK(launch_gram(tensors, 2, {partials.data(), tickets}, grams, nullptr) == 0);
  return {{grams[0], grams[1], grams[2], grams[3]}};
}

long double product(const std::vector<float>& x, const std::vector<float>& y) {
  long double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += (long double)(x[i]) * y[i];
  return sum;
}

bool same(double a, double b) { return std::isnan(b) ? std::isnan(a) : a == b; }

// Two lengths whose products overflow or underflow float32, numbers near its ends, and few that
// differ from the rest: as exact as numbers of size 1.
void test_sizes() {
  constexpr size_t kSize = 4096 + 1237;
  struct Case {
    float first, second;
    bool mixed;  // each element by itself
  };
  for (const Case& c :
       {Case{1, 1, false}, Case{1e-25f, 1e25f, false}, Case{1e-25f, 1e-25f, false},
        Case{1e25f, 1e25f, false}, Case{1e-44f, 1e38f, false}, Case{1e-38f, 1e-40f, false},
        Case{3e38f, 3e38f, false}, Case{1e-45f, 1, false}, Case{1e-30f, 1e30f, true},
        Case{1e-42f, 1e38f, true}}) {
    std::vector<float> x(kSize), y(kSize);
    for (size_t i = 0; i < kSize; ++i) {
      x[i] = uniform(-1, 1) * (c.mixed && i % 3 == 0 ? c.second : c.first);
      y[i] = uniform(-1, 1) * (c.mixed && i % 7 == 0 ? c.first : c.second);
    }
    const Gram got = gram(x, y);
    const long double xx = product(x, x), yy = product(y, y), xy = product(x, y);
    // a few roundings of each thread's sums, and those of adding them up
    const long double tolerance = 32 * kUnit;
    CHECK(std::fabs(got.of[0] - xx) <= tolerance * xx + 0x1p-1074L);
    CHECK(std::fabs(got.of[3] - yy) <= tolerance * yy + 0x1p-1074L);
    CHECK(std::fabs(got.of[1] - xy) <= tolerance * std::sqrt(xx) * std::sqrt(yy) + 0x1p-1074L);
    CHECK(got.of[1] == got.of[2]);
  }
}

// What is not finite is seen wherever it stands, and is what float64 makes of it.
void test_not_finite() {
  for (size_t at : {size_t(0), size_t(4095), size_t(5000)}) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      for (float other : {1.0f, 0.0f, 1e-45f, INFINITY}) {
        std::vector<float> x(5001, 1), y(5001, 2);
        x[at] = bad;
        y[at] = other;
        const Gram got = gram(x, y);
        CHECK(same(got.of[0], double(bad) * bad));
        CHECK(same(got.of[1], double(bad) * other));
        CHECK(std::isfinite(got.of[3]) || other == INFINITY);
      }
    }
  }
}

// ---- Weights of nearly parallel gradients

// Of y, from a Gram matrix and from the gradients themselves.
double weight(const Gram& g) {
  double weights[2];
  min_norm_weights(g.of, 2, 3, false, weights);
  return weights[1];
}
long double square_of_difference(const std::vector<float>& x, const std::vector<float>& y) {
  long double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += ((long double)(x[i]) - y[i]) * ((long double)(x[i]) - y[i]);
  }
  return sum;
}
long double exact_weight(const std::vector<float>& x, const std::vector<float>& y) {
  long double along = 0;
  for (size_t i = 0; i < x.size(); ++i) along += x[i] * ((long double)(x[i]) - y[i]);
  return along / square_of_difference(x, y);
}
// The chains of additions that a thread has in float64: 16 products at a time.
Gram in_float64(const std::vector<float>& x, const std::vector<float>& y) {
  Gram result{};
  for (size_t begin = 0; begin < x.size(); begin += kGroup) {
    double sums[3] = {0};
    for (size_t i = begin; i < std::min(begin + kGroup, x.size()); ++i) {
      sums[0] = std::fma(double(x[i]), double(x[i]), sums[0]);
      sums[1] = std::fma(double(x[i]), double(y[i]), sums[1]);
      sums[2] = std::fma(double(y[i]), double(y[i]), sums[2]);
    }
    result.of[0] += sums[0];
    result.of[1] = result.of[2] += sums[1];
    result.of[3] += sums[2];
  }
  return result;
}

void test_weights_of_nearly_parallel_gradients() {
  for (bool constant : {false, true}) {  // the same numbers in all threads: no errors cancel
    for (int exponent : {0, -83, 66}) {
      for (int bits : {8, 16, 21, 22, 23}) {
        std::vector<float> x(3 * 4096 + 18), y(x.size());
        float middle = 0;
        for (size_t i = 0; i < x.size(); i += 2) {
          // in two places the same number, and what the two gradients have beside it, which is
          // orthogonal to it, so that the shortest combination lies between them
          if (!constant || i == 0) middle = std::floor(uniform(0.5, 1) * 0x1p20f) * 0x1p-20f;
          for (auto* g : {&x, &y}) {
            const float beside = std::ldexp(std::floor(uniform(-8, 8)), -bits);
            (*g)[i] = std::ldexp(middle + beside, exponent);
            (*g)[i + 1] = std::ldexp(middle - beside, exponent);
          }
        }
        const long double truth = exact_weight(x, y);
        CHECK(truth > 0.4 && truth < 0.6);
        const Gram got = gram(x, y), before = in_float64(x, y);
        const double error = std::fabs(weight(got) - truth);
        // what 16 roundings of float64 in each of four entries can do
        const double bound =
            4 * 16 * double(kUnit) * got.of[0] / double(square_of_difference(x, y));
        CHECK(error <= bound);
        CHECK(error <= std::fabs(weight(before) - truth) + bound / 16);
      }
    }
  }
  // equal ones share, opposite ones too, to the bit
  std::vector<float> x(5000), minus(5000);
  for (size_t i = 0; i < x.size(); ++i) minus[i] = -(x[i] = spread(-30, 30));
  const Gram equal = gram(x, x), opposite = gram(x, minus);
  CHECK(equal.of[0] == equal.of[1] && equal.of[0] == equal.of[3]);
  CHECK(opposite.of[0] == -opposite.of[1] && opposite.of[0] == opposite.of[3]);
}

}  // namespace

int main() {
  test_groups<float>(-125, 125);
  test_groups<bf16>(-125, 125);
  test_groups<f16>(-14, 14);
  test_groups_that_do_not_fit();
  test_sizes();
  test_not_finite();
  test_weights_of_nearly_parallel_gradients();
  std::printf("passed\n");
  return 0;
}
