// Elements between memory and registers, 16 bytes at a time.
#pragma once

#include "cuda/device.h"

namespace dtokd::cuda {

// Elements of T in 16 bytes.
template <class T>
constexpr int kPerWord = kWordBytes / int(sizeof(T));

// Gradients are read twice, so they may stay in the L2 cache; parameters and state, which are read
// and written once, leave it first.
enum class Cache { kKeep, kEvictFirst };

// N elements as memory holds them: words of 16 bytes, or one element by itself. The pointers of
// words must be aligned to 16 bytes.
template <class T, int N>
struct Packed {
  static constexpr int kWords = N / kPerWord<T>;
  static_assert(kWords * kPerWord<T> == N, "whole words");
  uint4 word[kWords];

  DTOKD_DEVICE void clear() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = {0, 0, 0, 0};
  }
  template <Cache cache>
  DTOKD_DEVICE void load(const T* from) {
    const uint4* words = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      word[w] = cache == Cache::kKeep ? __ldca(words + w) : __ldcs(words + w);
    }
  }
  DTOKD_DEVICE void store(T* to) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) __stcs(reinterpret_cast<uint4*>(to) + w, word[w]);
  }
  template <class V>
  DTOKD_DEVICE void unpack(V (&x)[N]) const {
    T element[N];
    memcpy(element, word, sizeof(element));
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = V(widen(element[i]));
  }
  template <class V>
  DTOKD_DEVICE void pack(const V (&x)[N]) {
    T element[N];
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(x[i], &element[i]);
    memcpy(word, element, sizeof(element));
  }
};

template <class T>
struct Packed<T, 1> {
  T element;

  DTOKD_DEVICE void clear() { element = T{}; }
  template <Cache>
  DTOKD_DEVICE void load(const T* from) {
    element = *from;
  }
  DTOKD_DEVICE void store(T* to) const { *to = element; }
  template <class V>
  DTOKD_DEVICE void unpack(V (&x)[1]) const {
    x[0] = V(widen(element));
  }
  template <class V>
  DTOKD_DEVICE void pack(const V (&x)[1]) {
    narrow(x[0], &element);
  }
};

// N elements of each gradient; zeros for one that is null.
template <class T, int P, int N>
DTOKD_DEVICE void load_gradients(const T* const (&g)[P], int64_t at, Packed<T, N> (&packed)[P]) {
#pragma unroll
  for (int k = 0; k < P; ++k) {
    if (g[k]) {
      packed[k].template load<Cache::kKeep>(g[k] + at);
    } else {
      packed[k].clear();
    }
  }
}

}  // namespace dtokd::cuda
