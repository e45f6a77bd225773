// Sixteen floats at a time, in the compiler's own vectors: one source for every level. AVX2 works on two
// halves, SSE2 on four quarters, in the same order, so that sums and roundings are the same bits everywhere.
// The exceptions are multiply_add, fused where the level has it, reciprocal, and bf16 below 2^-126, which avx512_bf16
// stores as 0. Included by per-level files only.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef HK_CPU_X86_LEVELS
#include <immintrin.h>
#endif

#include "cpu/half.h"
#include "hulukern/hulukern.h"

namespace {

#define HK_INLINE inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;

HK_INLINE f32x16 splat(float x) {
  return x - f32x16{};
}
HK_INLINE u32x16 bits_of(f32x16 x) {
  return reinterpret_cast<u32x16>(x);
}
HK_INLINE f32x16 floats_of(u32x16 x) {
  return reinterpret_cast<f32x16>(x);
}
HK_INLINE f32x16 pick(i32x16 condition, f32x16 yes, f32x16 no) {
  return condition ? yes : no;
}
HK_INLINE f32x16 larger(f32x16 a, f32x16 b) {  // b where either is NaN
#ifdef __AVX512F__
  return reinterpret_cast<f32x16>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return pick(a > b, a, b);
#endif
}
HK_INLINE f32x16 smaller(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
  return reinterpret_cast<f32x16>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return pick(a < b, a, b);
#endif
}

HK_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32x16>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  union Halves {
    f32x16 whole;
    __m256 half[2];
  } x = {a}, y = {b}, z = {c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
#else
  return a * b + c;
#endif
}

// Halves are added, then quarters, then eighths, then the last two.
HK_INLINE float total(f32x16 x) {
  const f32x8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

HK_INLINE f32x16 load(const float* p) {
  f32x16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
#ifdef __AVX512BW__
// Every word into the upper half of its own 32 bits: one shuffle, where an extension and a shift are two.
HK_INLINE f32x16 widen(__m256i words) {
  alignas(64) static const uint16_t order[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return reinterpret_cast<f32x16>(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(order), _mm512_castsi256_si512(words)));
}
#endif
HK_INLINE f32x16 load(const bf16* p) {
#ifdef __AVX512BW__
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  u16x16 x;
  memcpy(&x, p, sizeof x);
  return floats_of(__builtin_convertvector(x, u32x16) << 16);
#endif
}
HK_INLINE f32x16 load(const f16* p) {
#ifdef __AVX512F__
  return reinterpret_cast<f32x16>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  u16x16 half;
  memcpy(&half, p, sizeof half);
  const u32x16 x = __builtin_convertvector(half, u32x16);
  const u32x16 magnitude = (x & 0x7fffu) << 13;
  const u32x16 finite = bits_of(floats_of(magnitude) * 0x1p112f);
  const u32x16 huge = reinterpret_cast<u32x16>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return floats_of(finite | huge | ((x & 0x8000u) << 16));
#endif
}

HK_INLINE void store(float* p, f32x16 x) {
  memcpy(p, &x, sizeof x);
}
HK_INLINE void store(bf16* p, f32x16 x) {
#ifdef __AVX512BF16__
  const __m256bh y = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  memcpy(p, &y, sizeof y);
#elif defined(__AVX512F__)
  // As below, with the mask registers that the compiler's own vectors make no use of.
  const __m512i u = reinterpret_cast<__m512i>(x), one = _mm512_set1_epi32(1);
  const __m512i up = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
  const __mmask16 nan = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(x), _CMP_UNORD_Q);
  const __m512i y = _mm512_mask_or_epi32(_mm512_add_epi32(u, up), nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16)));
#else
  const u32x16 u = bits_of(x);
  const u32x16 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const u32x16 nan = reinterpret_cast<u32x16>(x != x);
  const u16x16 y = __builtin_convertvector(((rounded & ~nan) | ((u | 0x400000u) & nan)) >> 16, u16x16);
  memcpy(p, &y, sizeof y);
#endif
}
HK_INLINE void store(f16* p, f32x16 x) {
#ifdef __AVX512F__
  const __m256i y = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &y, sizeof y);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(x[i]);
#endif
}

#ifdef __AVX512BW__
HK_INLINE __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1u << n) - 1);
}
HK_INLINE f32x16 load_some(const float* p, int64_t n) {
  return reinterpret_cast<f32x16>(_mm512_maskz_loadu_ps(first_lanes(n), p));
}
HK_INLINE f32x16 load_some(const bf16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
HK_INLINE f32x16 load_some(const f16* p, int64_t n) {
  return reinterpret_cast<f32x16>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
}
#endif

// The last n < 16 values of a row; what is not there reads as 0 and is not written.
template <class T>
HK_INLINE f32x16 load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
#ifdef __AVX512BW__
  return load_some(p, n);
#else
  alignas(64) T part[kLanes] = {};
  memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
#endif
}
template <class T>
HK_INLINE void store(T* p, f32x16 x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  alignas(64) T part[kLanes];
  store(part, x);
#ifdef __AVX512BW__
  if (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, first_lanes(n), _mm512_load_si512(part));
  else
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
#else
  memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
#endif
}

// Calls body(i, n) for stretches of a row of E values: n = 16, and what is left.
template <class Body>
HK_INLINE void each_stretch(int64_t E, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= E; i += kLanes) body(i, kLanes);
  if (i < E) body(i, E - i);
}

// Adds up value(i, n) over the stretches of a row, in four chains: one would wait for itself at every addition.
template <class Value>
HK_INLINE f32x16 sum_stretches(int64_t E, Value value) {
  f32x16 a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= E; i += 4 * kLanes) {
    a += value(i, kLanes);
    b += value(i + kLanes, kLanes);
    c += value(i + 2 * kLanes, kLanes);
    d += value(i + 3 * kLanes, kLanes);
  }
  for (; i + kLanes <= E; i += kLanes) a += value(i, kLanes);
  if (i < E) b += value(i, E - i);
  return (a + b) + (c + d);
}

// Fetches what comes next while a row is worked on in L1: hardware does not look across pages, or past the last use
// of a row. An address beyond the data does no harm.
HK_INLINE void fetch(const void* p) {
  __builtin_prefetch(p);
}
// To L2 only, for what is needed after the next.
HK_INLINE void fetch_later(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

HK_INLINE float* allocate_floats(int64_t n) {
  // Rows end in whole vectors, and so do allocations.
  return static_cast<float*>(aligned_alloc(64, static_cast<size_t>((n + 31) / 16 * 16) * sizeof(float)));
}

template <class P>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
  using type = T;
};
template <class P>
using Pointee = typename PointeeOf<P>::type;

// Calls body with a null pointer of the element type that a dtype names.
template <class Body>
HK_INLINE int with_type(int32_t dtype, Body body) {
  if (dtype == HK_F32) return body(static_cast<float*>(nullptr));
  if (dtype == HK_BF16) return body(static_cast<bf16*>(nullptr));
  return body(static_cast<f16*>(nullptr));
}

// 1 / x for a positive x whose reciprocal is normal; half as slow where 1e-4 will do.
template <bool exact>
HK_INLINE f32x16 reciprocal(f32x16 x) {
#ifdef __AVX512F__
  if (!exact) return reinterpret_cast<f32x16>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
#endif
  return 1.0f / x;
}

// 2^x for x <= 0 or small: the nearest integer goes into the exponent, 2^rest is a polynomial of minimax
// coefficients. Relative error 3e-9 (degree 6) or 1e-4 (degree 3), and fp32 rounding. Below -126 it stays at
// 2^-126, above 127 it is wrong. NaN stays NaN.
template <int degree>
HK_INLINE f32x16 exp2(f32x16 x) {
  x = larger(splat(-126.0f), x);
  const f32x16 shifted = x + 0x1.8p23f;
  const f32x16 rest = x - (shifted - 0x1.8p23f);
  f32x16 y;
  if (degree == 3) {
    y = multiply_add(rest, splat(0.055922035f), splat(0.24264008f));
    y = multiply_add(rest, y, splat(0.693121f));
    y = multiply_add(rest, y, splat(0.99992448f));
  } else {
    y = multiply_add(rest, splat(0.00015469732f), splat(0.0013400433f));
    y = multiply_add(rest, y, splat(0.0096180253f));
    y = multiply_add(rest, y, splat(0.0555032715f));
    y = multiply_add(rest, y, splat(0.2402265072f));
    y = multiply_add(rest, y, splat(0.6931471825f));
    y = multiply_add(rest, y, splat(1.0f));
  }
  y = floats_of(bits_of(y) + (bits_of(shifted) << 23));
  return degree == 3 ? y : multiply_add(x, splat(0.0f), y);  // of a NaN with a payload the sum is none
}

// [E] of any float dtype to fp32.
inline void to_floats(float* out, const void* in, int32_t dtype, int64_t E) {
  with_type(dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(in));
    each_stretch(E, [&](int64_t i, int64_t n) { store(out + i, load(from + i, n), n); });
    return 0;
  });
}

inline void from_floats(void* out, const float* in, int32_t dtype, int64_t E) {
  with_type(dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(out);
    each_stretch(E, [&](int64_t i, int64_t n) { store(to + i, load(in + i, n), n); });
    return 0;
  });
}

}  // namespace
