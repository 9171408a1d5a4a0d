// Eight or sixteen floats at a time through GCC vector extensions: one source, any instruction set. Included only by
// *_cpu.cpp.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace aligner::ALIGNER_ISA {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef double vdouble __attribute__((vector_size(LANES * 4)));  // half as many
typedef float vfloat_half __attribute__((vector_size(LANES * 2)));
typedef uint16_t vushort __attribute__((vector_size(LANES * 2)));
typedef uint8_t vbyte __attribute__((vector_size(LANES)));

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

#define ALIGNER_INLINE static inline __attribute__((always_inline))

ALIGNER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALIGNER_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ALIGNER_INLINE vfloat splat(float x) { return x - vfloat{}; }
ALIGNER_INLINE vint splat_int(int32_t x) { return x - vint{}; }

struct Float32 {
  using T = float;
  ALIGNER_INLINE vfloat load(const float* p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  ALIGNER_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
  ALIGNER_INLINE void store_two(float* p, vfloat a, vfloat b) {
    store(p, a);
    store(p + LANES, b);
  }
  ALIGNER_INLINE float get(const float* p) { return *p; }
};

// Sixteen-bit numbers as integers. GCC 12 would convert them one by one.
ALIGNER_INLINE vint load_ushort(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vint)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vushort h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vint);
#endif
}
ALIGNER_INLINE void store_ushort(uint16_t* p, vint v) {  // 0 <= v < 2^16
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  const vushort h = __builtin_convertvector(v, vushort);
  memcpy(p, &h, sizeof h);
#endif
}

struct Bfloat16 {
  using T = uint16_t;
  ALIGNER_INLINE vfloat load(const uint16_t* p) { return (vfloat)(load_ushort(p) << 16); }
  ALIGNER_INLINE vint round(vfloat v) {  // to nearest even, in the upper halves; a NaN stays one
    const vint u = (vint)v;
#if defined(__AVX512F__)
    const __m512i x = (__m512i)u, below = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_mask_sub_epi32(below, odd, below, _mm512_set1_epi32(-1));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return (vint)_mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
#else
    const vint rounded = u + 0x7fff + ((u >> 16) & 1);
    return v == v ? rounded : u | 0x400000;
#endif
  }
  ALIGNER_INLINE void store(uint16_t* p, vfloat v) { store_ushort(p, (round(v) >> 16) & 0xffff); }
  ALIGNER_INLINE void store_two(uint16_t* p, vfloat a, vfloat b) {
#if defined(__AVX512F__)  // one permutation takes the upper halves of both
    typedef int16_t vshorts __attribute__((vector_size(64)));
    const vshorts upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                           33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)round(a), (__m512i)upper, (__m512i)round(b)));
#else
    store(p, a);
    store(p + LANES, b);
#endif
  }
  ALIGNER_INLINE float get(const uint16_t* p) {
    const uint32_t u = uint32_t(*p) << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
  }
};

struct Float16 {
  using T = uint16_t;
#if defined(__AVX512F__)
  ALIGNER_INLINE vfloat load(const uint16_t* p) {
    return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  ALIGNER_INLINE void store(uint16_t* p, vfloat v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__)
  ALIGNER_INLINE vfloat load(const uint16_t* p) { return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  ALIGNER_INLINE void store(uint16_t* p, vfloat v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
  ALIGNER_INLINE vfloat load(const uint16_t* p) {
    const vint u = load_ushort(p), size = (u & 0x7fff) << 13;
    const vfloat finite = (vfloat)size * 0x1p112f;  // moves the exponent's bias, denormals included
    const vint bits = size >= 0x0f800000 ? size | 0x7f800000 : (vint)finite;
    return (vfloat)(bits | (u & 0x8000) << 16);
  }
  ALIGNER_INLINE void store(uint16_t* p, vfloat v) {  // round to nearest even; a NaN stays one
    const vint u = (vint)v & 0x7fffffff, sign = ((vint)v >> 16) & 0x8000;
    const vint normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    const vint denormal = (vint)((vfloat)u + 0.5f) - 0x3f000000;  // the addition rounds at 2^-24
    const vint beyond = u > 0x7f800000 ? splat_int(0x7e00) : splat_int(0x7c00);
    const vint bits = u >= 0x47800000 ? beyond : (u < 0x38800000 ? denormal : normal);
    store_ushort(p, bits | sign);
  }
#endif
  ALIGNER_INLINE void store_two(uint16_t* p, vfloat a, vfloat b) {
    store(p, a);
    store(p + LANES, b);
  }
  ALIGNER_INLINE float get(const uint16_t* p) {
    uint16_t t[LANES] = {*p};
    return load(t)[0];
  }
};

// body(Float32{}), body(Bfloat16{}) or body(Float16{}).
template <class Body>
ALIGNER_INLINE void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(Float32{});
    case Dtype::bfloat16:
      return body(Bfloat16{});
    case Dtype::float16:
      return body(Float16{});
  }
}

// The last count < LANES elements of a row; the other lanes hold `fill`.
template <class D>
ALIGNER_INLINE vfloat load_part(const typename D::T* p, int64_t count, float fill) {
  typename D::T t[LANES] = {};
  memcpy(t, p, count * sizeof *p);
  vfloat v = D::load(t);
  for (int64_t i = count; i < LANES; ++i) v[i] = fill;
  return v;
}
template <class D>
ALIGNER_INLINE void store_part(typename D::T* p, vfloat v, int64_t count) {
  typename D::T t[LANES];
  D::store(t, v);
  memcpy(p, t, count * sizeof *p);
}
template <class D>
ALIGNER_INLINE vfloat load_some(const typename D::T* p, int64_t count, float fill) {
  return count >= LANES ? D::load(p) : load_part<D>(p, count, fill);
}
template <class D>
ALIGNER_INLINE void store_some(typename D::T* p, vfloat v, int64_t count) {
  if (count >= LANES) {
    D::store(p, v);
  } else {
    store_part<D>(p, v, count);
  }
}

ALIGNER_INLINE vfloat vmax(vfloat a, vfloat b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
ALIGNER_INLINE vfloat vmin(vfloat a, vfloat b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
ALIGNER_INLINE float hmax(vfloat v) {
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
ALIGNER_INLINE double hsum(vfloat v) {
  double s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
}
ALIGNER_INLINE double hsum(vdouble v) {
  double s = 0;
  for (int64_t i = 0; i < LANES / 2; ++i) s += v[i];
  return s;
}
struct Doubles {
  vdouble low, high;
};
ALIGNER_INLINE Doubles widen(vfloat v) {
#if defined(__AVX512F__)  // GCC 12 goes through the stack where halves are taken by memcpy
  const __m512 x = (__m512)v;
  return {(vdouble)_mm512_cvtps_pd(_mm512_castps512_ps256(x)), (vdouble)_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
#elif defined(__AVX2__)
  const __m256 x = (__m256)v;
  return {(vdouble)_mm256_cvtps_pd(_mm256_castps256_ps128(x)), (vdouble)_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#else
  vfloat_half low, high;
  memcpy(&low, &v, sizeof low);
  memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  return {__builtin_convertvector(low, vdouble), __builtin_convertvector(high, vdouble)};
#endif
}
ALIGNER_INLINE vfloat narrow(Doubles d) {
  const vfloat_half low = __builtin_convertvector(d.low, vfloat_half);
  const vfloat_half high = __builtin_convertvector(d.high, vfloat_half);
  vfloat v;
  memcpy(&v, &low, sizeof low);
  memcpy((char*)&v + sizeof low, &high, sizeof high);
  return v;
}
ALIGNER_INLINE vdouble widen_sum(vfloat v) {  // floats folded into half as many doubles
  const Doubles d = widen(v);
  return d.low + d.high;
}

// 2^f for |f| <= 1/2: minimax polynomials, about 1 ulp of degree 6, or `brief`ly 2.6e-6 of degree 4.
template <bool brief = false>
ALIGNER_INLINE vfloat exp2_fraction(vfloat f) {
  if constexpr (brief) {
    vfloat p = splat(0.0095701017f);
    p = p * f + 0.0559178603f;
    p = p * f + 0.2402474483f;
    p = p * f + 0.6931218147f;
    return p * f + 0.9999992614f;
  }
  vfloat p = splat(0.000153458081f);
  p = p * f + 0.00133999309f;
  p = p * f + 0.00961848907f;
  p = p * f + 0.0555032864f;
  p = p * f + 0.240226462f;
  p = p * f + 0.693147182f;
  return p * f + 1.f;
}

// 2^y for -126 <= y < 128: nearest integer by a magic add.
template <bool brief = false>
ALIGNER_INLINE vfloat exp2_in_range(vfloat y) {
  const vfloat magic = splat(12582912.f);  // 1.5 * 2^23
  const vfloat n = y + magic;
  return (vfloat)((vint)exp2_fraction<brief>(y - (n - magic)) + ((vint)n << 23));
}

// 2^y for y < 128: 0 below float range, NaN for NaN. `y` comes back clamped, so that 0 * y is 0.
template <bool brief = false>
ALIGNER_INLINE vfloat exp2_or_zero(vfloat& y) {
#if defined(__AVX512F__)
  y = vmax(splat(-160.f), y);
  const __m512 n = _mm512_roundscale_ps((__m512)y, 0);
  return (vfloat)_mm512_scalef_ps((__m512)exp2_fraction<brief>(y - (vfloat)n), n);
#else
  const vint underflow = y <= splat(-126.f);
  y = underflow ? splat(-126.f) : y;
  return underflow ? splat(0.f) : exp2_in_range<brief>(y);
#endif
}

// e^x over the whole float range; infinities and NaN as in libm, denormal results may be 0.
ALIGNER_INLINE vfloat vexp(vfloat x) {
  // Cody-Waite: x * log2(e) alone would lose the last bits of a large |x|.
#if defined(__AVX512F__)
  const vfloat bounded = vmin(splat(100.f), vmax(splat(-110.f), x));
  const __m512 whole = _mm512_roundscale_ps((__m512)(bounded * LOG2E), 0);
  const vfloat rest = (bounded - (vfloat)whole * 0.693359375f) + (vfloat)whole * 2.12194440e-4f;
  const vfloat power = (vfloat)_mm512_scalef_ps((__m512)exp2_fraction(rest * LOG2E), whole);
  return x == x ? power : x;
#else
  const vfloat magic = splat(12582912.f);
  const vfloat clamped = vmin(splat(89.f), vmax(splat(-88.f), x));
  const vfloat n = (clamped * LOG2E + magic) - magic;
  const vfloat r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const vfloat half = exp2_in_range(r * LOG2E);
  const vint lo = __builtin_convertvector(n, vint) >> 1;  // two factors: 2^128 itself is not a float
  const vint hi = __builtin_convertvector(n, vint) - lo;
  const vfloat y = half * (vfloat)((lo + 127) << 23) * (vfloat)((hi + 127) << 23);
  const vfloat low = x < splat(-87.33654f) ? splat(0.f) : y;
  const vfloat high = x > splat(88.72283f) ? splat(INFINITY) : low;
  return x == x ? high : x;
#endif
}

}  // namespace aligner::ALIGNER_ISA
