// GELU and its slope. tanh: u * sigmoid(2 z), which has no cancellation for negative u. fp32.
#pragma once

#include "device/arith.cuh"

namespace hk {

struct Gelu {
  float value, slope;
};

template <bool kTanh>
__device__ __forceinline__ Gelu gelu(float u) {
  if constexpr (kTanh) {
    constexpr float kScale = 0.797884561f, kCubic = 0.044715f, kLog2e = 1.44269504f;
    // Beyond 40 GELU is u or 0 and its slope 1 or 0, while powers of u overflow. NaN stays.
    const float value = u < -40.0f ? -40.0f : u;
    u = value > 40.0f ? 40.0f : value;
    const float z = kScale * fmaf(kCubic * u * u, u, u);
    const float exponent = -2.0f * kLog2e * z;
    const float e = exp2_fast(exponent < 126.0f ? exponent : 126.0f);  // finite: e / (1 + e) stays 1
    const float s = reciprocal_fast(1.0f + e);
    return {value * s, fmaf(u * s * (e * s), 2.0f * kScale * fmaf(3.0f * kCubic * u, u, 1.0f), s)};
  } else {
    const float phi = 0.5f * (1.0f + erff(u * 0.707106781f));
    return {u * phi, fmaf(u * 0.398942280f, exp2_fast(-0.721347520f * u * u), phi)};
  }
}

}  // namespace hk
