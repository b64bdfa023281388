// The vector functions that all kernels are written on: one specialisation of Vec<float> and Vec<double> per
// instruction set. Included inside the target region of one instruction-set file (see avx512.cpp), which defines MF_ISA
// (the namespace) and one of MF_AVX512, MF_AVX2, MF_NEON or MF_SCALAR, and has included the intrinsics before.
//
// Contracts, for every set:
//   load / store       kLanes consecutive elements, no alignment needed.
//   stream             as store, but aligned to a vector's size, and past the caches where the set can; others may read
//                      it after fence().
//   load_n / store_n   the first n (1..kLanes) elements; lanes past n load as zero and are not touched in memory.
//   fma(a, b, c)       a * b + c, rounded once where kFmaIsFused.
//   max(a, b), min     return b when either operand is NaN, so a NaN passes through when it is the second operand.
//   max_nan(a, b)      NaN when either operand is.
//   select_le(a, b, x, y)  x where a <= b, else (NaN among it) y.
//   exp2(k)            2^(k / 2^kExp2Bits) for the integer that the low bits of k's representation hold, where the
//                      result is a normal number, or Inf for 128 (float) or 1024 (double) exactly. NaN gives any
//                      number. kExp2Table has 2^(j / 2^kExp2Bits) for j = 0, 1, … as the bits of a float, less j in the
//                      place where the low bits of k are added.
// kMaskIsFree says that load_n and store_n cost no more than load and store.
//
// HalfOf<T> is a vector of half the lanes, with the functions that a matrix product needs, where such vectors cost
// half: a processor that computes 512 bits in two halves, or that has two units for 256 bits. kLanes is 0 elsewhere.
#pragma once

namespace mobilenet_fast {
namespace MF_ISA {
namespace {

template <class T>
struct Vec;

template <class T>
struct HalfOf {};
template <class T>
struct Vec<HalfOf<T>> {
  static constexpr int kLanes = 0;
};

template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct FirstLanes : FirstLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct FirstLanes<0, kLane...> {
  using type = Lanes<kLane...>;
};

#if defined(MF_AVX512)

template <>
struct Vec<float> {
  using Reg = __m512;
  using HalfReg = __m256;
  static constexpr int kLanes = 16, kRegisters = 32;
  static constexpr bool kMaskIsFree = true;
  static constexpr bool kFmaIsFused = true;
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, Reg v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static void store_n(float* p, Reg v, int n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg sqrt(Reg a) { return _mm512_sqrt_ps(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg max_nan(Reg a, Reg b) { return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), x);
  }
  static constexpr int kExp2Bits = 5;
  static constexpr uint32_t kExp2Table[32] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
      0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
      0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
      0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  static Reg exp2(Reg k) {
    const __m512i bits = _mm512_castps_si512(k);
    const __m512i low = _mm512_loadu_si512(kExp2Table), high = _mm512_loadu_si512(kExp2Table + 16);
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_permutex2var_epi32(low, bits, high), _mm512_slli_epi32(bits, 18)));
  }
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
};

template <>
struct Vec<HalfOf<float>> {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load_n(const float* p, int n) { return _mm256_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store_n(float* p, Reg v, int n) { _mm256_mask_storeu_ps(p, mask(n), v); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg low(__m512 x) { return _mm512_castps512_ps256(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
};

template <>
struct Vec<double> {
  using Reg = __m512d;
  using HalfReg = Reg;
  static constexpr int kLanes = 8, kRegisters = 32;
  static constexpr bool kMaskIsFree = true;
  static constexpr bool kFmaIsFused = true;
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load_n(const double* p, int n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  static void store(double* p, Reg v) { _mm512_storeu_pd(p, v); }
  static void stream(double* p, Reg v) { _mm512_stream_pd(p, v); }
  static void fence() { _mm_sfence(); }
  static void store_n(double* p, Reg v, int n) { _mm512_mask_storeu_pd(p, mask(n), v); }
  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg sqrt(Reg a) { return _mm512_sqrt_pd(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg max_nan(Reg a, Reg b) { return _mm512_mask_mov_pd(max(a, b), _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q), a); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_mov_pd(y, _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), x);
  }
  static constexpr int kExp2Bits = 0;
  static Reg exp2(Reg k) {
    const __m512i exponent = _mm512_slli_epi64(_mm512_castpd_si512(k), 52);
    return _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(set1(1)), exponent));
  }
  static double sum(Reg a) { return _mm512_reduce_add_pd(a); }
};

#elif defined(MF_AVX2)

template <>
struct Vec<float> {
  using Reg = __m256;
  using HalfReg = Reg;
  static constexpr int kLanes = 8, kRegisters = 16;
  static constexpr bool kMaskIsFree = false;
  static constexpr bool kFmaIsFused = true;
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load_n(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, Reg v) { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static void store_n(float* p, Reg v, int n) { _mm256_maskstore_ps(p, mask(n), v); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg sqrt(Reg a) { return _mm256_sqrt_ps(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg max_nan(Reg a, Reg b) { return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
  static constexpr int kExp2Bits = 3;
  static constexpr uint32_t kExp2Table[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                             0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  static Reg exp2(Reg k) {
    const __m256i bits = _mm256_castps_si256(k);
    const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kExp2Table));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, bits), _mm256_slli_epi32(bits, 20)));
  }
  static float sum(Reg a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

template <>
struct Vec<double> {
  using Reg = __m256d;
  using HalfReg = Reg;
  static constexpr int kLanes = 4, kRegisters = 16;
  static constexpr bool kMaskIsFree = false;
  static constexpr bool kFmaIsFused = true;
  static __m256i mask(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load_n(const double* p, int n) { return _mm256_maskload_pd(p, mask(n)); }
  static void store(double* p, Reg v) { _mm256_storeu_pd(p, v); }
  static void stream(double* p, Reg v) { _mm256_stream_pd(p, v); }
  static void fence() { _mm_sfence(); }
  static void store_n(double* p, Reg v, int n) { _mm256_maskstore_pd(p, mask(n), v); }
  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg sqrt(Reg a) { return _mm256_sqrt_pd(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Reg max_nan(Reg a, Reg b) { return _mm256_blendv_pd(max(a, b), a, _mm256_cmp_pd(a, a, _CMP_UNORD_Q)); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LE_OQ)); }
  static constexpr int kExp2Bits = 0;
  static Reg exp2(Reg k) {
    const __m256i exponent = _mm256_slli_epi64(_mm256_castpd_si256(k), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(set1(1)), exponent));
  }
  static double sum(Reg a) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

#elif defined(MF_NEON)

template <>
struct Vec<float> {
  using Reg = float32x4_t;
  using HalfReg = Reg;
  static constexpr int kLanes = 4, kRegisters = 32;
  static constexpr bool kMaskIsFree = false;
  static constexpr bool kFmaIsFused = true;
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load_n(const float* p, int n) {
    float lanes[4] = {p[0], n > 1 ? p[1] : 0.0f, n > 2 ? p[2] : 0.0f, n > 3 ? p[3] : 0.0f};
    return vld1q_f32(lanes);
  }
  static void store(float* p, Reg v) { vst1q_f32(p, v); }
  static void stream(float* p, Reg v) { store(p, v); }
  static void fence() {}
  static void store_n(float* p, Reg v, int n) {
    float lanes[4];
    vst1q_f32(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg sqrt(Reg a) { return vsqrtq_f32(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Reg max_nan(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg min(Reg a, Reg b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return vbslq_f32(vcleq_f32(a, b), x, y); }
  static constexpr int kExp2Bits = 0;
  static Reg exp2(Reg k) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(k), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(set1(1)), exponent));
  }
  static float sum(Reg a) { return vaddvq_f32(a); }
};

template <>
struct Vec<double> {
  using Reg = float64x2_t;
  using HalfReg = Reg;
  static constexpr int kLanes = 2, kRegisters = 32;
  static constexpr bool kMaskIsFree = false;
  static constexpr bool kFmaIsFused = true;
  static Reg load(const double* p) { return vld1q_f64(p); }
  static Reg load_n(const double* p, int n) {
    double lanes[2] = {p[0], n > 1 ? p[1] : 0.0};
    return vld1q_f64(lanes);
  }
  static void store(double* p, Reg v) { vst1q_f64(p, v); }
  static void stream(double* p, Reg v) { store(p, v); }
  static void fence() {}
  static void store_n(double* p, Reg v, int n) {
    double lanes[2];
    vst1q_f64(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static Reg set1(double x) { return vdupq_n_f64(x); }
  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f64(a, b); }
  static Reg sqrt(Reg a) { return vsqrtq_f64(a); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static Reg max_nan(Reg a, Reg b) { return vmaxq_f64(a, b); }
  static Reg min(Reg a, Reg b) { return vbslq_f64(vcltq_f64(a, b), a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return vbslq_f64(vcleq_f64(a, b), x, y); }
  static constexpr int kExp2Bits = 0;
  static Reg exp2(Reg k) {
    const int64x2_t exponent = vshlq_n_s64(vreinterpretq_s64_f64(k), 52);
    return vreinterpretq_f64_s64(vaddq_s64(vreinterpretq_s64_f64(set1(1)), exponent));
  }
  static double sum(Reg a) { return vaddvq_f64(a); }
};

#else

template <int kBytes>
struct BitsOf {
  using type = uint32_t;
};
template <>
struct BitsOf<sizeof(double)> {
  using type = uint64_t;
};

template <class T>
struct ScalarVec {
  using Reg = T;
  using HalfReg = T;
  static constexpr int kLanes = 1, kRegisters = 16;
  static constexpr bool kMaskIsFree = true;
  static constexpr bool kFmaIsFused = false;
  static Reg load(const T* p) { return *p; }
  static Reg load_n(const T* p, int) { return *p; }
  static void store(T* p, Reg v) { *p = v; }
  static void stream(T* p, Reg v) { store(p, v); }
  static void fence() {}
  static void store_n(T* p, Reg v, int) { *p = v; }
  static Reg set1(T x) { return x; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg sqrt(Reg a) { return static_cast<T>(__builtin_sqrt(a)); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg max_nan(Reg a, Reg b) { return a > b || a != a ? a : b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return a <= b ? x : y; }
  static constexpr int kExp2Bits = 0;
  static Reg exp2(Reg k) {
    using Bits = typename BitsOf<sizeof(T)>::type;
    constexpr int kMantissa = sizeof(T) == sizeof(float) ? 23 : 52;
    return __builtin_bit_cast(T, __builtin_bit_cast(Bits, T(1)) + (__builtin_bit_cast(Bits, k) << kMantissa));
  }
  static T sum(Reg a) { return a; }
};

template <>
struct Vec<float> : ScalarVec<float> {};
template <>
struct Vec<double> : ScalarVec<double> {};

#endif

// Transposes kLanes vectors of kLanes lanes in registers. Each of log2(kLanes) stages interleaves every vector of the
// first half with its partner in the second: element bits rotate by one place a stage, until rows and columns have
// changed places.
#if defined(MF_SCALAR)
template <class T>
inline void transpose(T (&)[1]) {}
#else
template <class Reg, int... kLane>
inline Reg interleave_low(Reg a, Reg b, Lanes<kLane...>) {
  constexpr int n = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane % 2 == 0 ? kLane / 2 : n + kLane / 2)...);
}

template <class Reg, int... kLane>
inline Reg interleave_high(Reg a, Reg b, Lanes<kLane...>) {
  constexpr int n = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane % 2 == 0 ? n / 2 + kLane / 2 : n + n / 2 + kLane / 2)...);
}

template <class Reg, int kLanes>
[[gnu::always_inline]] inline void transpose(Reg (&rows)[kLanes]) {
  using All = typename FirstLanes<kLanes>::type;
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Reg next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], All());
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], All());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}
#endif

// A vector of which only the first n lanes count: n == kLanes for the body, fewer for the last vector of a row. kTail
// false promises n == kLanes, so that sets where masks cost something use plain loads and stores.
template <class T, bool kTail>
inline typename Vec<T>::Reg load(const T* p, int n) {
  if constexpr (kTail) {
    return Vec<T>::load_n(p, n);
  } else {
    return Vec<T>::load(p);
  }
}

template <class T, bool kTail>
inline void store(T* p, typename Vec<T>::Reg v, int n) {
  if constexpr (kTail) {
    Vec<T>::store_n(p, v, n);
  } else {
    Vec<T>::store(p, v);
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace mobilenet_fast
