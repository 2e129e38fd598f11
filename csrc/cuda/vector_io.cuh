// Elements between memory and registers, 16 bytes at a time where addresses allow it.
#pragma once

#include "cuda/device.h"

namespace dtokd::cuda {

// Elements of T in 16 bytes.
template <class T>
constexpr int kPerWord = kWordBytes / int(sizeof(T));

// Gradients are read twice, so they may stay in the L2 cache; parameters and state, which are read
// and written once, leave it first.
enum class Cache { kKeep, kEvictFirst };

// Places: where the elements are that a thread takes at a time, and how it accesses them.
//
// In words of 16 bytes, at a multiple of 16 bytes: all are there, side by side from `at` on.
struct Words {
  int64_t at;
  int left;  // not looked at
};

// One by one, at any address: element i is at `at + i * kStride`. kAll: all are there; otherwise
// those with i * kStride < left.
template <int kStride, bool kAll>
struct Singles {
  int64_t at;
  int left;
};

// N elements as memory holds them: words of 16 bytes or, of single elements only, 8. Zeros for
// those that are not there.
template <class T, int N>
struct Packed {
  using Word = std::conditional_t<N % kPerWord<T> == 0, uint4, uint2>;
  static constexpr int kWords = N * int(sizeof(T)) / int(sizeof(Word));
  static_assert(kWords * sizeof(Word) == N * sizeof(T), "whole words");
  Word word[kWords];

  DTOKD_DEVICE void clear() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = Word{};
  }
  template <Cache cache>
  DTOKD_DEVICE void load(const T* from, Words place) {
    const Word* words = reinterpret_cast<const Word*>(from + place.at);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      word[w] = cache == Cache::kKeep ? __ldca(words + w) : __ldcs(words + w);
    }
  }
  DTOKD_DEVICE void store(T* to, Words place) const {
    Word* words = reinterpret_cast<Word*>(to + place.at);
#pragma unroll
    for (int w = 0; w < kWords; ++w) __stcs(words + w, word[w]);
  }
  template <Cache, int kStride, bool kAll>
  DTOKD_DEVICE void load(const T* from, Singles<kStride, kAll> place) {
    T element[N];
    // of the last one where there is none, so that no load depends on a branch
    const int last = kAll ? (N - 1) * kStride : (place.left - 1) / kStride * kStride;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      element[i] = from[place.at + (i * kStride < last ? i * kStride : last)];
      if (i * kStride > last) element[i] = T{};
    }
    memcpy(word, element, sizeof(element));
  }
  template <int kStride, bool kAll>
  DTOKD_DEVICE void store(T* to, Singles<kStride, kAll> place) const {
    T element[N];
    memcpy(element, word, sizeof(element));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (kAll || i * kStride < place.left) to[place.at + i * kStride] = element[i];
    }
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

// N elements of each gradient; zeros for one that is null.
template <class T, int P, int N, class Place>
DTOKD_DEVICE void load_gradients(const T* const (&g)[P], Place place, Packed<T, N> (&packed)[P]) {
#pragma unroll
  for (int k = 0; k < P; ++k) {
    if (g[k]) {
      packed[k].template load<Cache::kKeep>(g[k], place);
    } else {
      packed[k].clear();
    }
  }
}

}  // namespace dtokd::cuda
