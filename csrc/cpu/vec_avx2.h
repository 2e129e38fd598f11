// Vectors of AVX2, FMA and F16C: 16 float32 or 8 float64 in two registers. Included inside a
// namespace compiled for these instructions.

struct F32 {
  static constexpr int kLanes = 16;
  __m256 a, b;

  static F32 set(double x) { return {_mm256_set1_ps(float(x)), _mm256_set1_ps(float(x))}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F32 load(const bf16* p) { return {load_half(p), load_half(p + 8)}; }
  static F32 load(const f16* p) { return {load_half(p), load_half(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  void store(bf16* p) const {
    const __m256i packed = _mm256_packus_epi32(round_to_bf16(a), round_to_bf16(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                     _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }

  static __m256 load_half(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m256 load_half(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256 load_half(const float* p) { return _mm256_loadu_ps(p); }

  // round to nearest even, NaN stays NaN; the result in the low half of each lane
  static __m256i round_to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  }
};

struct F64 {
  static constexpr int kLanes = 8;
  __m256d a, b;

  static F64 set(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  template <class T>
  static F64 load(const T* p) {
    const __m256 x = F32::load_half(p);
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
            _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
  }
  void store(double* p) const {
    _mm256_storeu_pd(p, a);
    _mm256_storeu_pd(p + 4, b);
  }
};

#define DTOKD_AVX2_OPERATORS(V, suffix)                                                  \
  inline V operator+(V x, V y) {                                                         \
    return {_mm256_add_##suffix(x.a, y.a), _mm256_add_##suffix(x.b, y.b)};               \
  }                                                                                      \
  inline V operator-(V x, V y) {                                                         \
    return {_mm256_sub_##suffix(x.a, y.a), _mm256_sub_##suffix(x.b, y.b)};               \
  }                                                                                      \
  inline V operator*(V x, V y) {                                                         \
    return {_mm256_mul_##suffix(x.a, y.a), _mm256_mul_##suffix(x.b, y.b)};               \
  }                                                                                      \
  inline V operator/(V x, V y) {                                                         \
    return {_mm256_div_##suffix(x.a, y.a), _mm256_div_##suffix(x.b, y.b)};               \
  }                                                                                      \
  inline V fma(V x, V y, V z) {                                                          \
    return {_mm256_fmadd_##suffix(x.a, y.a, z.a), _mm256_fmadd_##suffix(x.b, y.b, z.b)}; \
  }                                                                                      \
  inline V sqrt(V x) { return {_mm256_sqrt_##suffix(x.a), _mm256_sqrt_##suffix(x.b)}; }  \
  inline auto maximum_half(decltype(V::a) x, decltype(V::a) y) {                         \
    const auto nan = _mm256_cmp_##suffix(x, x, _CMP_UNORD_Q);                            \
    return _mm256_blendv_##suffix(_mm256_max_##suffix(x, y), x, nan);                    \
  }                                                                                      \
  inline V maximum(V x, V y) { return {maximum_half(x.a, y.a), maximum_half(x.b, y.b)}; }
DTOKD_AVX2_OPERATORS(F32, ps)
DTOKD_AVX2_OPERATORS(F64, pd)
#undef DTOKD_AVX2_OPERATORS
