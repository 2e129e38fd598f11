// Vectors of AVX-512: 16 float32 or 8 float64 in one register. Included inside a namespace compiled
// for these instructions.

struct F32 {
  static constexpr int kLanes = 16;
  __m512 a;

  static F32 set(double x) { return {_mm512_set1_ps(float(x))}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static F32 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, a); }
  void store(bf16* p) const {  // round to nearest even, NaN stays NaN
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct F64 {
  static constexpr int kLanes = 8;
  __m512d a;

  static F64 set(double x) { return {_mm512_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static F64 load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static F64 load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(wide))};
  }
  static F64 load(const f16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(bits))};
  }
  void store(double* p) const { _mm512_storeu_pd(p, a); }
};

#define DTOKD_AVX512_OPERATORS(V, suffix)                                        \
  inline V operator+(V x, V y) { return {_mm512_add_##suffix(x.a, y.a)}; }       \
  inline V operator-(V x, V y) { return {_mm512_sub_##suffix(x.a, y.a)}; }       \
  inline V operator*(V x, V y) { return {_mm512_mul_##suffix(x.a, y.a)}; }       \
  inline V operator/(V x, V y) { return {_mm512_div_##suffix(x.a, y.a)}; }       \
  inline V fma(V x, V y, V z) { return {_mm512_fmadd_##suffix(x.a, y.a, z.a)}; } \
  inline V sqrt(V x) { return {_mm512_sqrt_##suffix(x.a)}; }                     \
  inline V maximum(V x, V y) {                                                   \
    const auto nan = _mm512_cmp_##suffix##_mask(x.a, x.a, _CMP_UNORD_Q);         \
    return {_mm512_mask_mov_##suffix(_mm512_max_##suffix(x.a, y.a), nan, x.a)};  \
  }
DTOKD_AVX512_OPERATORS(F32, ps)
DTOKD_AVX512_OPERATORS(F64, pd)
#undef DTOKD_AVX512_OPERATORS
