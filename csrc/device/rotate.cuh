// Sine and cosine for rotary angles, the same arithmetic on device and host.
#pragma once

#include "device/arith.cuh"

namespace hk {

// Within 2 ulp of the float angle's sine and cosine for |angle| < 50,000: pi/2 is taken off in three parts
// (Cody and Waite), the rest are minimax polynomials (Cephes). No table and no slow path, hence no stack.
__device__ __forceinline__ void sine_cosine(float angle, float* sine, float* cosine) {
  const float turns = rintf(angle * 0.636619772f);
  const int quarter = static_cast<int>(turns);
  float r = fmaf(turns, -1.57079601f, angle);
  r = fmaf(turns, -3.13916473e-7f, r);
  r = fmaf(turns, -5.39030253e-15f, r);
  const float r2 = r * r;
  const float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, r2, 8.3321608736e-3f), r2, -1.6666654611e-1f), r2 * r, r);
  const float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, r2, -1.388731625493765e-3f), r2, 4.166664568298827e-2f),
                       r2 * r2, fmaf(-0.5f, r2, 1.0f));
  const float a = quarter & 1 ? c : s, b = quarter & 1 ? s : c;
  *sine = quarter & 2 ? -a : a;
  *cosine = (quarter + 1) & 2 ? -b : b;
}

}  // namespace hk
