// The kernels of kernels.h over the vectors F32 and F64 of one instruction set. Included inside a
// namespace, after these.

// The vectors that elements of type T are computed in.
template <class T>
struct OpMath {
  using V = F32;
};
template <>
struct OpMath<double> {
  using V = F64;
};

// NOTE [Gram sums in float64]: products of float32, bf16 and f16 are exact in float64, and on a CPU
// the sums cost no more than float32's, as memory is the limit. So nearly parallel gradients keep
// their difference, and the same bits come out of every instruction set.

// A chunk is summed in four parts, each with sums of its own, so that walking them side by side or
// one after the other gives the same bits.
constexpr int kParts = 4;
constexpr int kStride = 16;  // elements per step: two F64

// The sum of all lanes, in a fixed order.
inline double sum_of_lanes(F64 x) {
  double lane[8];
  x.store(lane);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

template <class T, int K>
struct GramSums {
  F64 sum[2][triangle(K)];

  GramSums() {
    for (int half = 0; half < 2; ++half) {
      for (int p = 0; p < triangle(K); ++p) sum[half][p] = F64::set(0);
    }
  }
  DTOKD_HD void add(const T* const* g, int64_t at) {
    for (int half = 0; half < 2; ++half) {
      F64 x[K];
      for (int i = 0; i < K; ++i) x[i] = F64::load(g[i] + at + 8 * half);
      for (int i = 0, p = 0; i < K; ++i) {
        for (int j = i; j < K; ++j, ++p) sum[half][p] = fma(x[i], x[j], sum[half][p]);
      }
    }
  }
  void reduce(double* sums) const {
    for (int p = 0; p < triangle(K); ++p) sums[p] += sum_of_lanes(sum[0][p] + sum[1][p]);
  }
};

// The last elements, fewer than a stride, copied to a stride's room behind zeros.
template <class T>
struct Padded {
  T element[kStride];
  Padded(const T* from, int64_t n) {
    std::memset(element, 0, sizeof(element));
    std::memcpy(element, from, n * sizeof(T));
  }
};

// NOTE [Backwards]: chunks are walked from their last element to their first. On AMD's Zen 5 that
// is 8 % faster for the five streams of an update than forwards, and the same for the Gram matrix;
// all go one way, so that products have the same bits whether the update takes them or a pass
// before.

// after(offset, count) is called for elements whose products have just been taken.
template <class T, int K, int SideBySide, class After>
DTOKD_HD void gram_few(const T* const* g, int64_t n, double* sums, const After& after) {
  const int64_t part = n / kParts / kStride * kStride;
  GramSums<T, K> rest;
  int64_t i = n / kStride * kStride;
  if (i < n) {
    T last[K][kStride];
    const T* pointers[K];
    for (int k = 0; k < K; ++k) {
      const Padded<T> padded(g[k] + i, n - i);
      std::memcpy(last[k], padded.element, sizeof(last[k]));
      pointers[k] = last[k];
    }
    rest.add(pointers, 0);
    after(i, n - i);
  }
  while (i > kParts * part) {
    i -= kStride;
    rest.add(g, i);
    after(i, kStride);
  }
  rest.reduce(sums);
  for (int first = kParts - SideBySide; first >= 0; first -= SideBySide) {
    GramSums<T, K> parts[SideBySide];
    for (i = part - kStride; i >= 0; i -= kStride) {
      for (int s = 0; s < SideBySide; ++s) parts[s].add(g, (first + s) * part + i);
      for (int s = 0; s < SideBySide; ++s) after((first + s) * part + i, kStride);
    }
    for (int s = SideBySide - 1; s >= 0; --s) parts[s].reduce(sums);
  }
}

// Products of one gradient with `Columns` others over a block that stays in cache.
template <class T, int Columns>
void gram_row(const T* x, const T* const* others, int64_t n, double* const* sums) {
  F64 sum[2][Columns];
  for (int c = 0; c < Columns; ++c) sum[0][c] = sum[1][c] = F64::set(0);
  const auto add = [&](const T* a, const T* const* b, int64_t at) {
    for (int half = 0; half < 2; ++half) {
      const F64 first = F64::load(a + at + 8 * half);
      for (int c = 0; c < Columns; ++c) {
        sum[half][c] = fma(first, F64::load(b[c] + at + 8 * half), sum[half][c]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kStride <= n; i += kStride) add(x, others, i);
  if (i < n) {
    const Padded<T> a(x + i, n - i);
    T last[Columns][kStride];
    const T* pointers[Columns];
    for (int c = 0; c < Columns; ++c) {
      const Padded<T> padded(others[c] + i, n - i);
      std::memcpy(last[c], padded.element, sizeof(last[c]));
      pointers[c] = last[c];
    }
    add(a.element, pointers, 0);
  }
  for (int c = 0; c < Columns; ++c) *sums[c] += sum_of_lanes(sum[0][c] + sum[1][c]);
}

// Many gradients: too many sums for the registers. A block of each is read from memory once and
// then again from cache, row by row of the triangle.
template <class T, class After>
DTOKD_HD void gram_many(const T* const* g, int K, int64_t n, double* sums, const After& after) {
  constexpr int64_t kBlock = 2048;
  for (int64_t end = n; end > 0;) {
    const int64_t count = (end - 1) % kBlock + 1;
    const int64_t start = end - count;
    end = start;
    for (int i = 0, p = 0; i < K; ++i) {
      for (int j = i; j < K;) {
        const int columns = K - j < 4 ? K - j : 4;
        const T* others[4];
        double* targets[4];
        for (int c = 0; c < columns; ++c) {
          others[c] = g[j + c] + start;
          targets[c] = sums + p + c;
        }
        const T* x = g[i] + start;
        if (columns == 4) gram_row<T, 4>(x, others, count, targets);
        if (columns == 3) gram_row<T, 3>(x, others, count, targets);
        if (columns == 2) gram_row<T, 2>(x, others, count, targets);
        if (columns == 1) gram_row<T, 1>(x, others, count, targets);
        j += columns;
        p += columns;
      }
    }
    after(start, count);
  }
}

template <class T>
void gram_of(const void* const* grads, int K, int64_t n, double* sums) {
  const T* g[kMaxObjectives];
  for (int k = 0; k < K; ++k) g[k] = static_cast<const T*>(grads[k]);
  for (int p = 0; p < triangle(K); ++p) sums[p] = 0;
  const bool wide = walk_side_by_side();
  const auto nothing = [](int64_t, int64_t) DTOKD_INLINE {};
  switch (K) {
    case 1:
      return wide ? gram_few<T, 1, 4>(g, n, sums, nothing) : gram_few<T, 1, 1>(g, n, sums, nothing);
    case 2:
      return wide ? gram_few<T, 2, 4>(g, n, sums, nothing) : gram_few<T, 2, 1>(g, n, sums, nothing);
    case 3:
      return wide ? gram_few<T, 3, 2>(g, n, sums, nothing) : gram_few<T, 3, 1>(g, n, sums, nothing);
    default:
      return gram_many<T>(g, K, n, sums, nothing);
  }
}

// d = sum_i c_i g_i at an offset. K = 0: known at run time only.
template <class T, int K>
struct Combined {
  using V = typename OpMath<T>::V;
  const T* g[kMaxObjectives];
  V c[kMaxObjectives];
  int runtime_K;

  explicit Combined(const Gradients& from) : runtime_K(from.K) {
    for (int k = 0; k < from.K; ++k) {
      g[k] = static_cast<const T*>(from.grads[k]);
      c[k] = V::set(from.coefficients[k]);
    }
  }
  DTOKD_HD V at(int64_t i) const {
    V d = c[0] * V::load(g[0] + i);
    for (int k = 1; k < (K ? K : runtime_K); ++k) d = fma(c[k], V::load(g[k] + i), d);
    return d;
  }
  DTOKD_HD V padded(int64_t i, int64_t n) const {
    V d = V::set(0);
    for (int k = 0; k < (K ? K : runtime_K); ++k) {
      const Padded<T> last(g[k] + i, n);
      d = k ? fma(c[k], V::load(last.element), d) : c[k] * V::load(last.element);
    }
    return d;
  }
};

// Runs update(d, tensors...) over a chunk, a vector at a time: `tensors` are read before and
// written after, in one pass; see NOTE [Backwards]. products: null, or where to put the products of
// the gradients: each is in registers for both then.
template <int N, class T, int K, class Update>
DTOKD_HD void sweep(const Combined<T, K>& combined, int64_t n, T* const (&tensors)[N],
                    double* products, const Update& update) {
  using V = typename OpMath<T>::V;
  constexpr int kLanes = V::kLanes;
  const auto step = [&](int64_t i) {
    V x[N];
    for (int t = 0; t < N; ++t) x[t] = V::load(tensors[t] + i);
    update(combined.at(i), x);
    for (int t = 0; t < N; ++t) x[t].store(tensors[t] + i);
  };
  const auto last = [&](int64_t i, int64_t count) {
    V x[N];
    for (int t = 0; t < N; ++t) x[t] = V::load(Padded<T>(tensors[t] + i, count).element);
    update(combined.padded(i, count), x);
    for (int t = 0; t < N; ++t) {
      T stored[kStride];
      x[t].store(stored);
      std::memcpy(tensors[t] + i, stored, count * sizeof(T));
    }
  };
  if (products) {
    const auto after = [&](int64_t i, int64_t count) DTOKD_INLINE {
      if (const int64_t rest = count % kLanes) last(i + count - rest, rest);
      for (int64_t end = i + count / kLanes * kLanes; end > i;) step(end -= kLanes);
    };
    for (int p = 0; p < triangle(combined.runtime_K); ++p) products[p] = 0;
    if constexpr (K > 0) {
      gram_few<T, K, 1>(combined.g, n, products, after);
    } else {
      gram_many<T>(combined.g, combined.runtime_K, n, products, after);
    }
    return;
  }
  int64_t left = n / kLanes * kLanes;
  if (left < n) last(left, n - left);
  if (walk_side_by_side()) {
    const int64_t half = left / 2 / kLanes * kLanes;
    for (int64_t i = half - kLanes; i >= 0; i -= kLanes) {
      step(left - half + i);
      step(left - 2 * half + i);
    }
    left -= 2 * half;
  }
  for (left -= kLanes; left >= 0; left -= kLanes) step(left);
}

template <class T, int K>
void combine_of(const Gradients& from, void* out) {
  using V = typename OpMath<T>::V;
  T* const tensors[] = {static_cast<T*>(out)};
  sweep<1>(Combined<T, K>(from), from.n, tensors, nullptr,
           [](V d, V* x) DTOKD_INLINE { x[0] = d; });
}

// kHeld: how many tensors of state there are, the first of the rule's.
template <class Rule, int kHeld, class T, int K>
void sweep_state(const Rule& rule, const Combined<T, K>& combined, int64_t n, void* param,
                 void* const* state, double* products) {
  using V = typename OpMath<T>::V;
  T* tensors[1 + kHeld] = {static_cast<T*>(param)};
  for (int i = 0; i < kHeld; ++i) tensors[1 + i] = static_cast<T*>(state[i]);
  sweep<1 + kHeld>(combined, n, tensors, products, [&](V d, V* x) DTOKD_INLINE {
    V* values[Rule::kStates];
    for (int i = 0; i < Rule::kStates; ++i) values[i] = i < kHeld ? x + 1 + i : nullptr;
    rule(d, x[0], values);
  });
}

template <template <class> class Rule_, class T, int K>
void update_of(const Gradients& from, const double* numbers, int64_t step, void* param,
               void* const* state, double* products) {
  using V = typename OpMath<T>::V;
  using Rule = Rule_<V>;
  const auto named = Rule::Numbers::of(numbers);
  const auto rule =
      Rule::of(named, named.lr, step, [](double x) DTOKD_INLINE { return V::set(x); });
  const Combined<T, K> combined(from);
  constexpr int kAll = Rule::kStates, kFewer = Rule::kRequired;
  static_assert(kAll - kFewer <= 1);
  if (kAll == kFewer || state[kAll - 1]) {
    sweep_state<Rule, kAll>(rule, combined, from.n, param, state, products);
  } else {
    sweep_state<Rule, kFewer>(rule, combined, from.n, param, state, products);
  }
}

template <class T_, int K_ = 0>
struct Choice {
  using T = T_;
  static constexpr int K = K_;
};

template <class Function>
void by_type(Type type, const Function& function) {
  switch (type) {
    case Type::kFloat32:
      return function(Choice<float>());
    case Type::kFloat64:
      return function(Choice<double>());
    case Type::kBFloat16:
      return function(Choice<bf16>());
    case Type::kFloat16:
      return function(Choice<f16>());
  }
}

template <class Function>
void by_type_and_K(Type type, int K, const Function& function) {
  by_type(type, [&](auto choice) {
    using T = typename decltype(choice)::T;
    switch (K) {
      case 1:
        return function(Choice<T, 1>());
      case 2:
        return function(Choice<T, 2>());
      case 3:
        return function(Choice<T, 3>());
      default:
        return function(Choice<T, 0>());
    }
  });
}

inline void gram(Type type, const void* const* grads, int K, int64_t n, double* sums) {
  by_type(type, [&](auto choice) { gram_of<typename decltype(choice)::T>(grads, K, n, sums); });
}

inline void combine(Type type, const Gradients& from, void* out) {
  by_type_and_K(type, from.K, [&](auto choice) {
    using C = decltype(choice);
    combine_of<typename C::T, C::K>(from, out);
  });
}

inline void update(int rule, Type type, const Gradients& from, const double* numbers, int64_t step,
                   void* param, void* const* state, double* products) {
  by_type_and_K(type, from.K, [&](auto choice) {
    using C = decltype(choice);
    switch (rule) {
#define DTOKD_CASE(Rule) \
  case k##Rule:          \
    return update_of<Rule, typename C::T, C::K>(from, numbers, step, param, state, products);
      DTOKD_RULES(DTOKD_CASE)
#undef DTOKD_CASE
    }
  });
}
