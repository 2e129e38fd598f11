// The core by itself, for sanitizers: every kernel on odd sizes, against plain loops in float64.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/lists.h"
#include "dtokd/balance.h"
#include "tests/check.h"
#include "tests/threads.h"

using namespace dtokd;
using namespace dtokd::cpu;

namespace {

// Every tensor is an allocation of its own, exactly as long as its elements, so that the address
// sanitizer sees any access past the end.
template <class T>
struct Lists {
  std::vector<int64_t> sizes;
  std::vector<std::unique_ptr<T[]>> tensors;

  Lists(const std::vector<int64_t>& sizes, int lists, unsigned seed, double low = -1)
      : sizes(sizes) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(low, 1);
    for (int k = 0; k < lists; ++k) {
      for (int64_t n : sizes) {
        tensors.emplace_back(new T[n]);
        for (int64_t i = 0; i < n; ++i) tensors.back()[i] = T(uniform(random));
      }
    }
  }
  std::vector<void*> pointers() const {
    std::vector<void*> result;
    for (const auto& t : tensors) result.push_back(t.get());
    return result;
  }
  T* at(int list, size_t t) const { return tensors[list * sizes.size() + t].get(); }
};

// All shared, and reached by all objectives.
template <class T>
std::vector<GradientRow> gradient_rows(const Lists<T>& lists, int K) {
  std::vector<GradientRow> rows;
  for (size_t t = 0; t < lists.sizes.size(); ++t) {
    rows.push_back({sizeof(T) == 4 ? Type::kFloat32 : Type::kFloat64, 0, lists.sizes[t], {}});
    for (int k = 0; k < K; ++k) rows.back().of[k] = lists.at(k, t);
  }
  return rows;
}

// Rows to update; states: as many as the rule has, null where there are none.
template <class T>
std::vector<UpdateRow> update_rows(const Lists<T>& grads, int K, const Lists<T>& params,
                                   const std::vector<const Lists<T>*>& states,
                                   std::vector<float>* steps) {
  std::vector<UpdateRow> rows;
  for (const GradientRow& row : gradient_rows(grads, K)) {
    const size_t t = rows.size();
    rows.push_back({row, row.type, params.at(0, t), nullptr, {}, nullptr, 0});
    for (size_t i = 0; i < states.size(); ++i) {
      if (states[i]) rows.back().state[i] = states[i]->at(0, t);
    }
    if (steps) rows.back().step = &(*steps)[t];
  }
  return rows;
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> result{plain_kernels()};
  const char* best = best_kernels().name;
  if (std::strcmp(best, "plain") != 0) result.push_back(avx2_kernels());
  if (std::strcmp(best, "avx512") == 0) result.push_back(avx512_kernels());
  return result;
}

const std::vector<int64_t> kSizes{1, 0, 7, 16, 63, 64, 1023, kChunk + 1, 0};

bool close(double a, double b, double tolerance) {
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

template <class T>
void test_gram(const Kernels& kernels, int threads, int K) {
  const Lists<T> grads(kSizes, K, 1);
  double out[kRoles * kMaxObjectives * kMaxObjectives];
  gram(kernels, test_threads(threads), gradient_rows(grads, K), K, out);
  for (int i = 0; i < K; ++i) {
    for (int j = 0; j < K; ++j) {
      double sum = 0;
      for (size_t t = 0; t < kSizes.size(); ++t) {
        for (int64_t e = 0; e < kSizes[t]; ++e)
          sum += double(grads.at(i, t)[e]) * grads.at(j, t)[e];
      }
      CHECK(close(out[i * K + j], sum, 1e-11));
    }
  }
}

template <class T>
bool same(const Lists<T>& a, const Lists<T>& b) {
  for (size_t t = 0; t < a.tensors.size(); ++t) {
    if (std::memcmp(a.tensors[t].get(), b.tensors[t].get(), a.sizes[t] * sizeof(T))) return false;
  }
  return true;
}

// An update that takes products on its way: the same bits as gram, here from one thread.
template <class T, class Step>
void test_products(const Kernels& kernels, int threads, const Lists<T>& grads, int K,
                   const Step& step) {
  constexpr int kSize = kRoles * kMaxObjectives * kMaxObjectives;
  double expected[kSize], products[kSize];
  gram(kernels, test_threads(threads == 1 ? 3 : 1), gradient_rows(grads, K), K, expected);
  step(products);
  CHECK(std::memcmp(expected, products, kRoles * K * K * sizeof(double)) == 0);
}

template <class T>
void test_adamw(const Kernels& kernels, int threads, int K, bool amsgrad) {
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  const Lists<T> grads(kSizes, K, 2), p(kSizes, 1, 3), m(kSizes, 1, 4), v(kSizes, 1, 5, 0.1),
      largest(kSizes, 1, 6, 0.1);
  const Lists<T> p0(kSizes, 1, 3), m0(kSizes, 1, 4), v0(kSizes, 1, 5, 0.1),
      largest0(kSizes, 1, 6, 0.1);
  std::vector<double> c(kRoles * K);
  for (int k = 0; k < K; ++k) c[k] = 0.5 + k;
  const AdamWNumbers s{0.1, 0.9, 0.99, 0.01, 1e-8, 0, double(amsgrad)};
  const Group group{{s.lr}, {s.lr, s.beta1, s.beta2, s.weight_decay, s.eps, 0, s.amsgrad}};
  const double correction1 = 1 - std::pow(s.beta1, 5), correction2 = 1 - std::pow(s.beta2, 5);
  const auto step = [&](const Lists<T>& p, const Lists<T>& m, const Lists<T>& v,
                        const Lists<T>& largest, double* products) {
    std::vector<float> steps(kSizes.size(), 4);
    update(kernels, test_threads(threads), kAdamW,
           update_rows(grads, K, p, {&m, &v, amsgrad ? &largest : nullptr}, &steps), {group}, K,
           c.data(), products);
    for (float step : steps) CHECK(step == 5);
  };
  step(p, m, v, largest, nullptr);
  const Lists<T> p2(kSizes, 1, 3), m2(kSizes, 1, 4), v2(kSizes, 1, 5, 0.1),
      largest2(kSizes, 1, 6, 0.1);
  test_products(kernels, threads, grads, K,
                [&](double* products) { step(p2, m2, v2, largest2, products); });
  CHECK(same(p, p2) && same(m, m2) && same(v, v2) && same(largest, largest2));
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t e = 0; e < kSizes[t]; ++e) {
      double g = 0;
      for (int k = 0; k < K; ++k) g += c[k] * grads.at(k, t)[e];
      const double m1 = s.beta1 * m0.at(0, t)[e] + (1 - s.beta1) * g;
      const double v1 = s.beta2 * v0.at(0, t)[e] + (1 - s.beta2) * g * g;
      double second = v1;
      if (amsgrad) {
        second = std::fmax(v1, largest0.at(0, t)[e]);
        CHECK(close(largest.at(0, t)[e], second, tolerance));
      }
      const double p1 = p0.at(0, t)[e] * (1 - s.lr * s.weight_decay) -
                        s.lr / correction1 * m1 / (std::sqrt(second / correction2) + s.eps);
      CHECK(close(m.at(0, t)[e], m1, tolerance));
      CHECK(close(v.at(0, t)[e], v1, tolerance));
      CHECK(close(p.at(0, t)[e], p1, tolerance));
    }
  }
}

template <class T>
void test_sgd(const Kernels& kernels, int threads, int K, bool momentum, bool nesterov,
              bool first) {
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  const Lists<T> grads(kSizes, K, 2), p(kSizes, 1, 3), b(kSizes, 1, 4), out(kSizes, 1, 7);
  const Lists<T> p0(kSizes, 1, 3), b0(kSizes, 1, 4);
  std::vector<double> c(kRoles * K);
  for (int k = 0; k < K; ++k) c[k] = 0.5 + k;
  const SGDNumbers s{0.1, 0.9, 0.2, 0.01, double(nesterov), 0, double(first)};
  const Group group{{s.lr},
                    {s.lr, s.momentum, s.dampening, s.weight_decay, s.nesterov, 0, s.first}};
  const auto step = [&](const Lists<T>& p, const Lists<T>& b, double* products) {
    update(kernels, test_threads(threads), kSGD,
           update_rows(grads, K, p, {momentum ? &b : nullptr}, nullptr), {group}, K, c.data(),
           products);
  };
  step(p, b, nullptr);
  const Lists<T> p2(kSizes, 1, 3), b2(kSizes, 1, 4);
  test_products(kernels, threads, grads, K, [&](double* products) { step(p2, b2, products); });
  CHECK(same(p, p2) && same(b, b2));
  combine(kernels, test_threads(threads), gradient_rows(grads, K), K, c.data(), out.pointers());
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t e = 0; e < kSizes[t]; ++e) {
      double g = 0;
      for (int k = 0; k < K; ++k) g += c[k] * grads.at(k, t)[e];
      CHECK(close(out.at(0, t)[e], g, tolerance));
      g += s.weight_decay * p0.at(0, t)[e];
      if (momentum) {
        const double b1 = first ? g : s.momentum * b0.at(0, t)[e] + (1 - s.dampening) * g;
        CHECK(close(b.at(0, t)[e], b1, tolerance));
        g = nesterov ? g + s.momentum * b1 : b1;
      }
      CHECK(close(p.at(0, t)[e], p0.at(0, t)[e] - s.lr * g, tolerance));
    }
  }
}

void test_min_norm() {
  const double golden[] = {18, -22, -22, 38};
  double w[kMaxObjectives];
  min_norm_weights(golden, 2, 3, true, w);
  CHECK(close(w[0], 0.6, 1e-15) && close(w[1], 0.4, 1e-15));
  const double outside[] = {1, 1.5, 1.5, 4};
  min_norm_weights(outside, 2, 3, true, w);
  CHECK(w[0] == 1 && w[1] == 0);
  min_norm_weights(outside, 2, 3, false, w);
  CHECK(w[0] == 1.25 && w[1] == -0.25);
  double same[kMaxObjectives * kMaxObjectives];
  for (double& x : same) x = 2;
  min_norm_weights(same, 8, 0xff, true, w);
  for (int i = 0; i < 8; ++i) CHECK(w[i] == 0.125);
  const double nan[] = {NAN, 1, 1, 1};
  min_norm_weights(nan, 2, 3, true, w);  // any answer, but an end
}

void test_balance() {
  const double G[] = {18, -22, -22, 38}, zeros[4] = {0}, losses[] = {2, 0.5};
  const double* grams[] = {G, zeros, zeros};
  const BalanceOptions options{true, true, false, 0, 1e-8, INFINITY};
  double w[kMaxObjectives];
  Balance b;
  dto_weights(G, losses, 2, options, w);
  finish_balance(grams, losses, w, 2, options, b);
  CHECK(close(b.weights[0] + b.weights[1], 1, 1e-15) && !b.skipped && !b.vertex);
  CHECK(close(b.coefficients[0][0] * 2, b.weights[0], 1e-15));
  const double negative[] = {2, -0.5};
  finish_balance(grams, negative, w, 2, options, b);
  CHECK(b.skipped);
}

// Under the thread sanitizer, which is slow, what threads share: the same for every K and type.
#ifdef __SANITIZE_THREAD__
const std::vector<int> kObjectives{2}, kThreads{3};
#else
const std::vector<int> kObjectives{1, 2, 3, 4, 7}, kThreads{1, 3};
#endif

template <class T>
void test_type(const Kernels& kernels, int threads) {
  for (int K : kObjectives) {
    test_gram<T>(kernels, threads, K);
    test_adamw<T>(kernels, threads, K, K % 2);
    test_sgd<T>(kernels, threads, K, true, K % 2, K % 3 == 0);
    test_sgd<T>(kernels, threads, K, false, false, false);
  }
}

}  // namespace

int main() {
  test_min_norm();
  test_balance();
  for (const Kernels* kernels : available()) {
    for (int threads : kThreads) {
      test_type<float>(*kernels, threads);
      test_type<double>(*kernels, threads);
    }
    std::printf("%s: passed\n", kernels->name);
  }
  return 0;
}
