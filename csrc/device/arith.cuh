// Arithmetic whose exact instruction matters, each with a host version of the same result (approximate
// instructions: of at least their accuracy).
#pragma once

#include <stdint.h>

#include "device/at.cuh"
#include "hulukern/hulukern.h"
#ifdef HK_SIM
#include "cpu/half.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace hk {

// --- IEEE division, bits ----------------------------------------------------------------------------

// Rounded to nearest even, whatever -use_fast_math or -prec-div say.
__device__ __forceinline__ float div_rn(float a, float b) {
#ifdef HK_SIM
  return a / b;
#else
  return __fdiv_rn(a, b);
#endif
}

// Not contracted with what comes before or after.
__device__ __forceinline__ float sub_rn(float a, float b) {
#ifdef HK_SIM
  return a - b;
#else
  return __fsub_rn(a, b);
#endif
}

__device__ __forceinline__ float f32_of_bits(uint32_t x) {
#ifdef HK_SIM
  return as_float(x);
#else
  return __uint_as_float(x);
#endif
}
__device__ __forceinline__ uint32_t bits_of_f32(float x) {
#ifdef HK_SIM
  return as_bits(x);
#else
  return __float_as_uint(x);
#endif
}

constexpr float kInfinity = __builtin_huge_valf();

// --- transcendental functions -----------------------------------------------------------------------

// One instruction, 2 ulp; 2^-inf is 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef HK_SIM
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float log2_fast(float x) {
#ifdef HK_SIM
  return log2f(x);
#else
  return __log2f(x);
#endif
}
// One instruction, 1 ulp. An IEEE division is a subroutine, for which ptxas may save registers to local memory.
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef HK_SIM
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
// 2 ulp
__device__ __forceinline__ float rsqrt_fast(float x) {
#ifdef HK_SIM
  return 1.0f / sqrtf(x);
#else
  return rsqrtf(x);
#endif
}

// --- packed pixels ----------------------------------------------------------------------------------

#ifdef HK_SIM
// The 16-bit half `h` of a word, sign-extended.
inline int32_t half_of(uint32_t x, int h) {
  return static_cast<int16_t>(x >> (16 * h));
}
#endif

// sum + the |a - b| of four u8.
__device__ __forceinline__ uint32_t add_abs_diff_u8x4(uint32_t sum, uint32_t a, uint32_t b) {
#ifdef HK_SIM
  for (int shift = 0; shift < 32; shift += 8) {
    const int d = static_cast<int>(a >> shift & 255) - static_cast<int>(b >> shift & 255);
    sum += static_cast<uint32_t>(d < 0 ? -d : d);
  }
  return sum;
#else
  return sum + __vsadu4(a, b);
#endif
}

// Both i16 halves clamped to the halves of lo and hi.
__device__ __forceinline__ uint32_t clamp_i16x2(uint32_t x, uint32_t lo, uint32_t hi) {
#ifdef HK_SIM
  uint32_t out = 0;
  for (int h = 0; h < 2; ++h) {
    int32_t v = half_of(x, h);
    v = v < half_of(lo, h) ? half_of(lo, h) : v;
    v = v > half_of(hi, h) ? half_of(hi, h) : v;
    out |= (static_cast<uint32_t>(v) & 0xffffu) << (16 * h);
  }
  return out;
#else
  return __vmins2(__vmaxs2(x, lo), hi);
#endif
}

// sum + the |a - b| of two i16. A difference of up to 65535 wraps to itself as u16; dp2a adds both.
__device__ __forceinline__ uint32_t add_abs_diff_i16x2(uint32_t sum, uint32_t a, uint32_t b) {
#ifdef HK_SIM
  for (int h = 0; h < 2; ++h) {
    const int32_t d = half_of(a, h) - half_of(b, h);
    sum += static_cast<uint32_t>(d < 0 ? -d : d);
  }
  return sum;
#else
  return __dp2a_lo(__vsub2(__vmaxs2(a, b), __vmins2(a, b)), 0x0101u, sum);
#endif
}

// --- 16-bit floats ----------------------------------------------------------------------------------

template <int kDtype>
constexpr int kElementBytes = kDtype == HK_F32 || kDtype == HK_I32 ? 4
                              : kDtype == HK_U8                    ? 1
                                                                   : 2;

// The two 16-bit floats of a word, lower half first.
__device__ __forceinline__ float2 bf16x2_to_float2(uint32_t x) {
  return {f32_of_bits(x << 16), f32_of_bits(x & 0xffff0000u)};
}
__device__ __forceinline__ float2 f16x2_to_float2(uint32_t x) {
#ifdef HK_SIM
  return {to_float(f16{static_cast<uint16_t>(x)}), to_float(f16{static_cast<uint16_t>(x >> 16)})};
#else
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
#endif
}

// Rounded to nearest even, `lo` in the lower half.
__device__ __forceinline__ uint32_t float2_to_bf16x2(float lo, float hi) {
#ifdef HK_SIM
  return from_float<bf16>(lo).bits | static_cast<uint32_t>(from_float<bf16>(hi).bits) << 16;
#else
  const __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&x);
#endif
}
__device__ __forceinline__ uint32_t float2_to_f16x2(float lo, float hi) {
#ifdef HK_SIM
  return from_float<f16>(lo).bits | static_cast<uint32_t>(from_float<f16>(hi).bits) << 16;
#else
  const __half2 x = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&x);
#endif
}

template <int kDtype>
__device__ __forceinline__ float2 unpack2(uint32_t x) {
  static_assert(kDtype == HK_BF16 || kDtype == HK_F16, "16-bit floats");
  if constexpr (kDtype == HK_BF16) {
    return bf16x2_to_float2(x);
  } else {
    return f16x2_to_float2(x);
  }
}
template <int kDtype>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  static_assert(kDtype == HK_BF16 || kDtype == HK_F16, "16-bit floats");
  if constexpr (kDtype == HK_BF16) {
    return float2_to_bf16x2(lo, hi);
  } else {
    return float2_to_f16x2(lo, hi);
  }
}

// x as the dtype would hold it.
template <int kDtype>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (kDtype == HK_F32) {
    return x;
  } else {
    return unpack2<kDtype>(pack2<kDtype>(x, 0.0f)).x;
  }
}

}  // namespace hk
