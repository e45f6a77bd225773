// Arithmetic whose exact instruction matters: IEEE division, and differences of packed pixels.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

namespace hk {

// Rounded to nearest even, whatever -use_fast_math or -prec-div say.
__device__ __forceinline__ float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}

// sum + the |a - b| of four u8.
__device__ __forceinline__ uint32_t add_abs_diff_u8x4(uint32_t sum, uint32_t a, uint32_t b) {
  return sum + __vsadu4(a, b);
}

// Both i16 halves clamped to the halves of lo and hi.
__device__ __forceinline__ uint32_t clamp_i16x2(uint32_t x, uint32_t lo, uint32_t hi) {
  return __vmins2(__vmaxs2(x, lo), hi);
}

// sum + the |a - b| of two i16. A difference of up to 65535 wraps to itself as u16; dp2a adds both.
__device__ __forceinline__ uint32_t add_abs_diff_i16x2(uint32_t sum, uint32_t a, uint32_t b) {
  return __dp2a_lo(__vsub2(__vmaxs2(a, b), __vmins2(a, b)), 0x0101u, sum);
}

__device__ __forceinline__ float f32_of_bits(uint32_t x) {
  return __uint_as_float(x);
}

// The two 16-bit floats of a word, lower half first.
__device__ __forceinline__ float2 bf16x2_to_float2(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
__device__ __forceinline__ float2 f16x2_to_float2(uint32_t x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

}  // namespace hk
