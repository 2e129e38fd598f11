// The CUDA kernels, emulated, against plain loops in float64: with sanitizers, under any schedule,
// and with what a compiler made of them in their place.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "tests/check.h"

using namespace dtokd;
using namespace dtokd::cuda;

namespace {

// Under the thread sanitizer, to which every CUDA thread is a thread, as few blocks as show how
// they work together.
#ifdef __SANITIZE_THREAD__
const std::vector<int64_t> kSizes{4200, 0, 37};
#else
const std::vector<int64_t> kSizes{1, 4096, 0, 37, 3 * 4096 + 129, 8000, 0};
#endif

uint64_t hash_of(const void* data, size_t bytes, uint64_t hash = 14695981039346656037u) {
  for (size_t i = 0; i < bytes; ++i) {
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
  return hash;
}

template <class T>
constexpr Type kTypeOf = Type::kFloat32;
template <>
constexpr Type kTypeOf<bf16> = Type::kBFloat16;

// A few roundings to T.
template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 4.0 / 256;

void check_close(double got, double expected, double tolerance) {
  CHECK(std::fabs(got - expected) <= tolerance * (0.1 + std::fabs(expected)));
}

// Tensors of the sizes above, each a block of exactly its length; `shift` elements after a place
// that is aligned for vectors.
template <class T>
struct Tensors {
  std::vector<std::unique_ptr<T[]>> blocks;
  int shift;

  Tensors(int lists, unsigned seed, int shift, double low = -1) : shift(shift) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(float(low), 1);
    for (int l = 0; l < lists; ++l) {
      for (int64_t n : kSizes) {
        blocks.emplace_back(new T[n + shift]);
        for (int64_t i = 0; i < n + shift; ++i) narrow(uniform(random), &blocks.back()[i]);
      }
    }
  }
  T* at(int list, size_t t) const { return blocks[list * kSizes.size() + t].get() + shift; }
  double value(int list, size_t t, int64_t i) const { return widen(at(list, t)[i]); }
  uint64_t hash(uint64_t hash) const {
    for (size_t b = 0; b < blocks.size(); ++b) {
      hash = hash_of(blocks[b].get(), (kSizes[b % kSizes.size()] + shift) * sizeof(T), hash);
    }
    return hash;
  }
};

// Roles by turns; the second tensor has no gradient of the last objective.
template <class T>
Gradients gradients(const Tensors<T>& grads, int K, size_t t) {
  Gradients result{kTypeOf<T>, int(t % kRoles), kSizes[t], {}};
  for (int k = 0; k < K; ++k) result.of[k] = t == 1 && k == K - 1 ? nullptr : grads.at(k, t);
  return result;
}

template <class T>
std::vector<Gradients> all_gradients(const Tensors<T>& grads, int K) {
  std::vector<Gradients> result;
  for (size_t t = 0; t < kSizes.size(); ++t) result.push_back(gradients(grads, K, t));
  return result;
}

template <class T>
double product(const Gradients& g, int i, int j) {
  double sum = 0;
  for (int64_t e = 0; g.of[i] && g.of[j] && e < g.size; ++e) {
    sum += double(widen(static_cast<const T*>(g.of[i])[e])) *
           double(widen(static_cast<const T*>(g.of[j])[e]));
  }
  return sum;
}

struct DeviceMemory {
  std::vector<double> partials;
  unsigned tickets[kTickets] = {};
  std::vector<double> grams, values;
  bool flags[2] = {};

  DeviceMemory(const std::vector<Gradients>& tensors, int K)
      : partials(scratch_size(tensors, K), NAN),
        grams(kRoles * K * K, NAN),
        values(values_size(K), NAN) {}
  Scratch scratch() { return {partials.data(), tickets}; }
  Record record() { return {grams.data(), values.data(), flags}; }
  void check_tickets() const {
    for (unsigned ticket : tickets) CHECK(ticket == 0);
  }
};

// Tensors of two types: two launches, one result.
uint64_t test_gram_balance(int K, int shift) {
  const Tensors<float> floats(K, 1, shift);
  const Tensors<bf16> halves(K, 2, shift);
  std::vector<Gradients> tensors = all_gradients(floats, K);
  for (const Gradients& g : all_gradients(halves, K)) tensors.push_back(g);
  DeviceMemory memory(tensors, K);
  std::vector<double> losses;
  for (int k = 0; k < K; ++k) losses.push_back(0.5 + k);
  const BalanceOptions options{true, true, false, 1.0, 1e-8, INFINITY};
  CHECK(launch_gram_balance(tensors, K, losses.data(), options, memory.scratch(), memory.record(),
                            nullptr) == 0);
  memory.check_tickets();
  for (int role = 0; role < kRoles; ++role) {
    for (int i = 0; i < K; ++i) {
      for (int j = 0; j < K; ++j) {
        double sum = 0;
        for (const Gradients& g : tensors) {
          if (g.role != role) continue;
          sum += g.type == Type::kFloat32 ? product<float>(g, i, j) : product<bf16>(g, i, j);
        }
        // float64 sums of some 1e4 products of size 1
        CHECK(std::fabs(memory.grams[(role * K + i) * K + j] - sum) <= 1e-9);
      }
    }
  }
  // the rest is the host's formulas, to the bit
  const double* grams[kRoles];
  for (int role = 0; role < kRoles; ++role) grams[role] = memory.grams.data() + role * K * K;
  std::vector<double> weights(K), values(values_size(K));
  bool flags[2];
  Balance balance;
  dto_weights(grams[0], losses.data(), K, options, weights.data());
  finish_balance(grams, losses.data(), weights.data(), K, options, balance);
  write_record(balance, K, values.data(), flags);
  CHECK(std::memcmp(values.data(), memory.values.data(), values.size() * sizeof(double)) == 0);
  CHECK(flags[0] == memory.flags[0] && flags[1] == memory.flags[1]);
  return hash_of(memory.values.data(), values.size() * sizeof(double));
}

// Of both signs in each role, as affine weights have.
std::vector<double> coefficients(int K) {
  std::vector<double> result;
  for (int i = 0; i < kRoles * K; ++i) {
    result.push_back((0.5 + i % 3 - i % 2 * 0.25) * (i % K % 2 ? -1 : 1));
  }
  return result;
}

// The combined gradient of one element.
template <class T>
double combined(const Gradients& g, const std::vector<double>& c, int K, int64_t i) {
  double d = 0;
  for (int k = 0; k < K; ++k) {
    if (g.of[k]) d += c[g.role * K + k] * widen(static_cast<const T*>(g.of[k])[i]);
  }
  return d;
}

// T: gradients and parameters; float32 state and, for a half type, a master copy.
// lr, beta1, beta2, weight_decay, eps; lr, momentum, dampening, weight_decay, nesterov; as AdamW's
const Group kAdamWGroup{{0.1}, {0.1, 0.9, 0.99, 0.01, 1e-8}};
const Group kSGDGroup{{0.1}, {0.1, 0.9, 0.2, 0.01, 1}};
const Group kLionGroup{{0.1}, {0.1, 0.9, 0.99, 0.01}};

template <class T>
uint64_t test_adamw(int K, int shift, bool skipped) {
  const bool has_master = sizeof(T) == 2;
  const Tensors<T> grads(K, 3, shift), param(1, 4, shift), param0(1, 4, shift);
  const Tensors<float> m(1, 5, shift), m0(1, 5, shift), v(1, 6, shift, 0.1), v0(1, 6, shift, 0.1);
  const Tensors<float> master(1, 7, shift), master0(1, 7, shift);
  std::vector<float> steps(kSizes.size(), 4);
  std::vector<Target> targets;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    targets.push_back({gradients(grads, K, t),
                       Type::kFloat32,
                       param.at(0, t),
                       has_master ? reinterpret_cast<float*>(master.at(0, t)) : nullptr,
                       {m.at(0, t), v.at(0, t), nullptr},
                       &steps[t],
                       0});
  }
  const Group group = kAdamWGroup;
  const std::vector<double> c = coefficients(K);
  DeviceMemory memory({}, K);
  CHECK(launch_update(kAdamW, targets, {group}, {K, c.data(), &skipped}, memory.scratch(),
                      nullptr) == 0);
  memory.check_tickets();
  const double correction1 = 1 - std::pow(0.9, 5), correction2 = 1 - std::pow(0.99, 5);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    if (kSizes[t] > 0) CHECK(steps[t] == (skipped ? 4 : 5));
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      double g = combined<T>(targets[t].grads, c, K, i);
      double p0 = has_master ? master0.value(0, t, i) : param0.value(0, t, i);
      double m1 = m0.value(0, t, i), v1 = v0.value(0, t, i), p1 = param0.value(0, t, i);
      if (!skipped) {
        m1 = 0.9 * m1 + (1 - 0.9) * g;
        v1 = 0.99 * v1 + (1 - 0.99) * g * g;
        p1 = p0 * (1 - 0.1 * 0.01) - 0.1 / correction1 * m1 / (std::sqrt(v1 / correction2) + 1e-8);
      }
      check_close(m.value(0, t, i), m1, kTolerance<float>);
      check_close(v.value(0, t, i), v1, kTolerance<float>);
      check_close(param.value(0, t, i), p1, kTolerance<T>);
      if (has_master && !skipped) check_close(master.value(0, t, i), p1, kTolerance<float>);
    }
  }
  return master.hash(v.hash(m.hash(param.hash(hash_of(steps.data(), steps.size() * 4)))));
}

// One launch leaves what two leave, to the bit.
template <class T>
uint64_t test_resident(int K, int blocks) {
  const std::vector<double> losses(K, 2.0);
  const BalanceOptions options{true, true, false, 0, 1e-8, INFINITY};
  const Group group = kAdamWGroup;
  uint64_t hashes[2];
  for (bool resident : {false, true}) {
    const Tensors<T> grads(K, 3, 0), param(1, 4, 0);
    const Tensors<float> m(1, 5, 0), v(1, 6, 0, 0.1);
    std::vector<float> steps(kSizes.size(), 4);
    std::vector<Target> targets;
    for (size_t t = 0; t < kSizes.size(); ++t) {
      targets.push_back({gradients(grads, K, t),
                         Type::kFloat32,
                         param.at(0, t),
                         nullptr,
                         {m.at(0, t), v.at(0, t), nullptr},
                         &steps[t],
                         0});
    }
    DeviceMemory memory(all_gradients(grads, K), K);
    if (resident) {
      emulated_residency = {blocks, 2 * kTile * int(sizeof(T)) * 2};  // room for two tiles
      CHECK(launch_resident_adamw(targets, {group}, K, losses.data(), options, memory.scratch(),
                                  memory.record(), nullptr) == 0);
    } else {
      CHECK(launch_gram_balance(all_gradients(grads, K), K, losses.data(), options,
                                memory.scratch(), memory.record(), nullptr) == 0);
      CHECK(launch_update(kAdamW, targets, {group}, {K, memory.values.data() + K, memory.flags + 1},
                          memory.scratch(), nullptr) == 0);
    }
    memory.check_tickets();
    uint64_t hash = hash_of(memory.values.data(), memory.values.size() * sizeof(double));
    hash = hash_of(memory.grams.data(), memory.grams.size() * sizeof(double), hash);
    hash = hash_of(steps.data(), steps.size() * sizeof(float), hash);
    hashes[resident] = v.hash(m.hash(param.hash(hash)));
  }
  CHECK(hashes[0] == hashes[1]);
  return hashes[0];
}

// More tensors than a table holds are refused, though the device has room for all their tiles.
void test_resident_of_several_tables() {
  constexpr int kCount = 900;
  constexpr float kBefore = 2;
  std::vector<float> grad(kCount, 1), param(kCount, kBefore), m(kCount, 0), v(kCount, 1);
  std::vector<float> steps(kCount, kBefore);
  std::vector<Target> targets;
  std::vector<Gradients> gradients;
  for (int t = 0; t < kCount; ++t) {
    gradients.push_back({Type::kFloat32, 0, 1, {&grad[t]}});
    targets.push_back({gradients.back(),
                       Type::kFloat32,
                       &param[t],
                       nullptr,
                       {&m[t], &v[t], nullptr},
                       &steps[t],
                       0});
  }
  DeviceMemory memory(gradients, 1);
  const double loss = 1;
  emulated_residency = {60, 2 * kTile * int(sizeof(float))};
  CHECK(launch_resident_adamw(targets, {kAdamWGroup}, 1, &loss, {true, true, false, 0, 1e-8},
                              memory.scratch(), memory.record(), nullptr) == kUnfit);
  for (int t = 0; t < kCount; ++t) CHECK(param[t] == kBefore && steps[t] == kBefore);
}

// An update that measures leaves what an update and a Gram launch leave, to the bit: of a skipped
// step too, which is when a gradient may hold Inf; beside a gradient that is not there its product
// is 0.
template <class T>
uint64_t test_gram_update(int K, int shift, bool adamw, bool skipped) {
  const int rule = adamw ? kAdamW : kSGD;
  const Group group = adamw ? kAdamWGroup : kSGDGroup;
  const std::vector<double> c = coefficients(K);
  const Direction direction{K, c.data(), &skipped};
  uint64_t hashes[2];
  for (bool measuring : {false, true}) {
    const Tensors<T> grads(K, 3, shift), param(1, 4, shift);
    const Tensors<float> m(1, 5, shift), v(1, 6, shift, 0.1);
    if (skipped && kSizes[1] > 0) narrow(INFINITY, grads.at(0, 1));
    std::vector<float> steps(kSizes.size(), 4);
    std::vector<Target> targets;
    for (size_t t = 0; t < kSizes.size(); ++t) {
      targets.push_back({gradients(grads, K, t),
                         Type::kFloat32,
                         param.at(0, t),
                         nullptr,
                         {m.at(0, t), adamw ? v.at(0, t) : nullptr, nullptr},
                         &steps[t],
                         0});
    }
    DeviceMemory memory(all_gradients(grads, K), K);
    const Scratch scratch = memory.scratch();
    double* const grams = memory.grams.data();
    if (!measuring) {
      CHECK(launch_gram(all_gradients(grads, K), K, scratch, grams, nullptr) == 0);
      CHECK(launch_update(rule, targets, {group}, direction, scratch, nullptr) == 0);
    } else {
      CHECK(launch_gram_update(rule, targets, {group}, direction, scratch, grams, nullptr) == 0);
    }
    memory.check_tickets();
    CHECK(K == 1 || std::isfinite(grams[K * K + K - 1]));
    uint64_t hash = hash_of(grams, memory.grams.size() * sizeof(double));
    hash = hash_of(steps.data(), steps.size() * sizeof(float), hash);
    hashes[measuring] = v.hash(m.hash(param.hash(hash)));
  }
  CHECK(hashes[0] == hashes[1]);
  return hashes[0];
}

template <class T>
uint64_t test_sgd_and_combine(int K, int shift) {
  const Tensors<T> grads(K, 3, shift), param(1, 4, shift), param0(1, 4, shift);
  const Tensors<T> buffer(1, 5, shift), buffer0(1, 5, shift), out(1, 6, shift);
  std::vector<Target> targets;
  std::vector<void*> outs;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    targets.push_back({gradients(grads, K, t),
                       kTypeOf<T>,
                       param.at(0, t),
                       nullptr,
                       {buffer.at(0, t), nullptr, nullptr},
                       nullptr,
                       0});
    outs.push_back(out.at(0, t));
  }
  DeviceMemory memory({}, K);
  const std::vector<double> c = coefficients(K);
  CHECK(launch_update(kSGD, targets, {kSGDGroup}, {K, c.data(), nullptr}, memory.scratch(),
                      nullptr) == 0);
  CHECK(launch_combine(all_gradients(grads, K), outs, {K, c.data(), nullptr}, nullptr) == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      double g = combined<T>(targets[t].grads, c, K, i);
      check_close(out.value(0, t, i), g, kTolerance<T>);
      g += 0.01 * param0.value(0, t, i);
      const double b = 0.9 * buffer0.value(0, t, i) + (1 - 0.2) * g;
      check_close(buffer.value(0, t, i), b, kTolerance<T>);
      check_close(param.value(0, t, i), param0.value(0, t, i) - 0.1 * (g + 0.9 * b), kTolerance<T>);
    }
  }
  return out.hash(buffer.hash(param.hash(0)));
}

template <class T>
uint64_t test_lion(int K, int shift) {
  const Tensors<T> grads(K, 3, shift), param(1, 4, shift), param0(1, 4, shift);
  const Tensors<float> m(1, 5, shift), m0(1, 5, shift);
  std::vector<Target> targets;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    targets.push_back({gradients(grads, K, t),
                       Type::kFloat32,
                       param.at(0, t),
                       nullptr,
                       {m.at(0, t), nullptr, nullptr},
                       nullptr,
                       0});
  }
  DeviceMemory memory({}, K);
  const std::vector<double> c = coefficients(K);
  CHECK(launch_update(kLion, targets, {kLionGroup}, {K, c.data(), nullptr}, memory.scratch(),
                      nullptr) == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const double change = combined<T>(targets[t].grads, c, K, i) - m0.value(0, t, i);
      const double towards = m0.value(0, t, i) + (1 - 0.9) * change;
      const double p = param0.value(0, t, i) * (1 - 0.1 * 0.01) - std::copysign(0.1, towards);
      check_close(m.value(0, t, i), m0.value(0, t, i) + (1 - 0.99) * change, kTolerance<float>);
      // nearer to 0 rounding decides the sign
      if (std::abs(towards) > 1e-5) check_close(param.value(0, t, i), p, kTolerance<T>);
    }
  }
  return m.hash(param.hash(0));
}

// Everything; a number that says whether two runs gave the same bits.
uint64_t test_all() {
  uint64_t hash = 0;
  const auto add = [&](uint64_t h) { hash = hash_of(&h, sizeof(h), hash); };
#ifdef __SANITIZE_THREAD__
  add(test_gram_balance(2, 0));
  add(test_adamw<float>(2, 0, false));
  add(test_resident<float>(2, 2));
  add(test_gram_update<float>(2, 0, true, false));
#else
  for (int K : {1, 2, 3, 5}) add(test_gram_balance(K, 0));
  add(test_gram_balance(2, 1));
  for (int shift : {0, 1}) {
    for (int K : {2, 3}) add(test_adamw<float>(K, shift, false));
    add(test_adamw<bf16>(2, shift, false));
    add(test_sgd_and_combine<float>(2, shift));
    add(test_sgd_and_combine<bf16>(2, shift));
    add(test_lion<float>(2, shift));
    for (bool adamw : {false, true}) {
      for (int K : {1, 2, 3}) add(test_gram_update<float>(K, shift, adamw, false));
      add(test_gram_update<bf16>(2, shift, adamw, false));
    }
  }
  for (bool adamw : {false, true}) add(test_gram_update<float>(2, 0, adamw, true));
  add(test_adamw<float>(2, 0, true));
  test_resident_of_several_tables();
  for (int blocks : {1, 2, 100}) {
    add(test_resident<float>(2, blocks));
    add(test_resident<bf16>(1, blocks));
  }
#endif
  return hash;
}

}  // namespace

int main() {
  const uint64_t hash = test_all();
  for (const auto& [name, substitute] : emulation::substitutes()) {
    std::printf("%s: %d launches\n", name.c_str(), substitute.launches);
  }
  std::printf("passed: %016llx\n", static_cast<unsigned long long>(hash));
  return 0;
}
