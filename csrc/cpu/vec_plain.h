// Vectors as arrays: 16 float32 or 8 float64, for any machine. Included inside a namespace.

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // shifting puts the exponent too low by 112; the product corrects it, subnormals included
  const float value = bits_to_float(magnitude << 13) * bits_to_float((127 + 112) << 23);
  return bits_to_float(float_to_bits(value) | sign);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// round to nearest even, NaN stays NaN
inline void narrow(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float x, f16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the sum's last bit is 2^-24
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    result = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | result);
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }

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
  for (int i = 0; i < N; ++i)
    a.lane[i] = a.lane[i] > b.lane[i] || a.lane[i] != a.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}

using F32 = Vec<float, 16>;
using F64 = Vec<double, 8>;
