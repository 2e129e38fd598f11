// Vectors as arrays: 16 float32 or 8 float64, for any machine. Included inside a namespace.

template <class S, int N>
struct Vec {
  static constexpr int kLanes = N;
  S lane[N];

  static Vec set(double x) {
    Vec r;
    for (int i = 0; i < N; ++i) r.lane[i] = S(x);
    return r;
  }
  template <class T>
  static Vec load(const T* from) {
    Vec r;
    for (int i = 0; i < N; ++i) r.lane[i] = S(widen(from[i]));
    return r;
  }
  template <class T>
  void store(T* to) const {
    for (int i = 0; i < N; ++i) narrow(lane[i], to + i);
  }
};

#define DTOKD_PLAIN_OPERATOR(op)                                    \
  template <class S, int N>                                         \
  inline Vec<S, N> operator op(Vec<S, N> a, Vec<S, N> b) {          \
    for (int i = 0; i < N; ++i) a.lane[i] = a.lane[i] op b.lane[i]; \
    return a;                                                       \
  }
DTOKD_PLAIN_OPERATOR(+)
DTOKD_PLAIN_OPERATOR(-)
DTOKD_PLAIN_OPERATOR(*)
DTOKD_PLAIN_OPERATOR(/)
#undef DTOKD_PLAIN_OPERATOR

// not fused: without the instruction std::fma is a slow call
template <class S, int N>
inline Vec<S, N> fma(Vec<S, N> a, Vec<S, N> b, Vec<S, N> c) {
  return a * b + c;
}

template <class S, int N>
inline Vec<S, N> sqrt(Vec<S, N> a) {
  for (int i = 0; i < N; ++i) a.lane[i] = std::sqrt(a.lane[i]);
  return a;
}

// NaN in either is NaN, as torch.maximum
template <class S, int N>
inline Vec<S, N> maximum(Vec<S, N> a, Vec<S, N> b) {
  for (int i = 0; i < N; ++i) a.lane[i] = dtokd::maximum(a.lane[i], b.lane[i]);
  return a;
}

using F32 = Vec<float, 16>;
using F64 = Vec<double, 8>;
