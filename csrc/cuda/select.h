// From what is known when running to what kernels are compiled for. Host code.
#pragma once

#include <type_traits>

#include "cuda/launch.h"

namespace dtokd::cuda {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

template <class T_>
struct Tag {
  using T = T_;
};

template <class F>
int by_type(Type type, const F& f) {
  switch (type) {
    case Type::kFloat32:
      return f(Tag<float>());
    case Type::kFloat64:
      return f(Tag<double>());
    case Type::kBFloat16:
      return f(Tag<bf16>());
    case Type::kFloat16:
      return f(Tag<f16>());
  }
  return kInvalidValue;
}

// The types of parameters and state that go together.
template <class F>
int by_types(Type type, Type state, const F& f) {
  return by_type(type, [&](auto t) {
    using T = typename decltype(t)::T;
    if (state == type) return f(t, t);
    if constexpr (sizeof(T) == 2) {
      if (state == Type::kFloat32) return f(t, Tag<float>());
    }
    if constexpr (std::is_same_v<T, float>) {
      if (state == Type::kBFloat16) return f(t, Tag<bf16>());
    }
    return kInvalidValue;
  });
}

// K rounded up to what kernels are compiled for.
template <class F>
int by_objectives(int K, const F& f) {
  if (K < 1 || K > kMaxObjectives) return kInvalidValue;
  if (K <= 2) return f(std::integral_constant<int, 2>());
  if (K <= 4) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, kMaxObjectives>());
}

}  // namespace dtokd::cuda
