// bias_gelu on the CPU, one pass.
//   tanh  u * sigmoid(2 z), z = sqrt(2/pi) (u + 0.044715 u^3): one exponential and one division
//   erf   u * Phi(u), Phi(-|u|) = t poly(t) exp(-u^2/2) / 2 with t = 1 / (1 + p |u| / sqrt 2): Abramowitz and
//         Stegun 7.1.26, 0.75e-7 of Phi, which fp32 rounding equals
// Bits are the same for all thread counts; levels without FMA, or with a reciprocal of 14 bits, round differently,
// within the tolerance of the dtype. The bias gradient is summed per stretch of rows and
// then over the stretches, in order.
#include "cpu/row_norm.h"
#include "ops/bias_gelu/bias_gelu.h"

namespace {

using hk::BiasGeluArgs;
using hk::BiasGeluBackwardArgs;

template <class T>
constexpr bool kRounds = false;
template <>
constexpr bool kRounds<bf16> = true;

constexpr float kLog2e = 1.44269504f, kSqrt2OverPi = 0.797884561f, kCubic = 0.044715f;
constexpr float kLinearExponent = -2.0f * kSqrt2OverPi * kLog2e;  // of 2 in exp(-2 z), by u and u^3
constexpr float kCubicExponent = kLinearExponent * kCubic;

// Beyond it GELU is u or 0 and its slope 1 or 0, in fp32 too, while powers of u overflow.
constexpr float kFar = 40.0f;

constexpr int64_t kAhead = 512;  // values

// To 1e-4 where the result is rounded to bf16, 4e-3.
template <class T>
HK_INLINE f32x16 exponential(f32x16 x) {
  return exp2<kRounds<T> ? 3 : 6>(smaller(splat(126.0f), x * kLog2e));
}

// exp(-2 z); u2 = u^2.
template <class T>
HK_INLINE f32x16 exp_minus_2z(f32x16 u, f32x16 u2) {
  const f32x16 by_u = multiply_add(u2, splat(kCubicExponent), splat(kLinearExponent));
  return exp2<kRounds<T> ? 3 : 6>(smaller(splat(126.0f), u * by_u));
}

// Phi(u), and exp(-u^2/2) beside it.
template <class T>
HK_INLINE f32x16 normal_cdf(f32x16 u, f32x16* bell) {
  const f32x16 x = floats_of(bits_of(u) & 0x7fffffffu) * 0.707106781f;
  const f32x16 t = reciprocal<!kRounds<T>>(multiply_add(x, splat(0.3275911f), splat(1.0f)));
  *bell = exponential<T>(-(x * x));
  f32x16 y = multiply_add(t, splat(1.061405429f), splat(-1.453152027f));
  y = multiply_add(y, t, splat(1.421413741f));
  y = multiply_add(y, t, splat(-0.284496736f));
  y = multiply_add(y, t, splat(0.254829592f));
  const f32x16 tail = 0.5f * (y * t * *bell);
  return pick(u < 0.0f, tail, 1.0f - tail);
}

template <class T, bool erf>
HK_INLINE f32x16 gelu(f32x16 u) {
  if (erf) {
    f32x16 bell;
    return u * normal_cdf<T>(u, &bell);
  }
  return larger(splat(-kFar), u) * reciprocal<!kRounds<T>>(1.0f + exp_minus_2z<T>(u, u * u));
}

template <class T, bool erf>
HK_INLINE f32x16 slope(f32x16 u) {
  u = smaller(splat(kFar), larger(splat(-kFar), u));
  if (erf) {
    f32x16 bell;
    const f32x16 below = normal_cdf<T>(u, &bell);
    return below + u * bell * 0.398942280f;
  }
  const f32x16 u2 = u * u, e = exp_minus_2z<T>(u, u2);
  const f32x16 s = reciprocal<!kRounds<T>>(1.0f + e);
  // s (1 - s) as e s^2: nothing cancels where s is nearly 1.
  const f32x16 dz = u * multiply_add(u2, splat(6.0f * kSqrt2OverPi * kCubic), splat(2.0f * kSqrt2OverPi));
  return multiply_add(dz, e * s * s, s);
}

template <class T, bool erf>
int forward(const BiasGeluArgs& a) {
  float* bias = nullptr;
  if (a.bias != nullptr) {
    bias = allocate_floats(a.E);
    if (bias == nullptr) return HK_OUT_OF_MEMORY;
    to_floats(bias, a.bias, a.dtype, a.E);
  }
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t row = 0; row < a.N; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    each_stretch(a.E, [&](int64_t i, int64_t n) {
      fetch(x + i + kAhead);
      f32x16 u = load(x + i, n);
      if (bias != nullptr) u += load(bias + i);
      store(out + i, gelu<T, erf>(u), n);
    });
  }
  free(bias);
  return HK_OK;
}

template <class T, bool erf>
int backward(const BiasGeluBackwardArgs& a) {
  float* bias = nullptr;
  if (a.bias != nullptr) {
    bias = allocate_floats(a.E);
    if (bias == nullptr) return HK_OUT_OF_MEMORY;
    to_floats(bias, a.bias, a.dtype, a.E);
  }
  const int64_t B = bias != nullptr ? a.B : 32, stretch = (a.N + B - 1) / B;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int64_t b = 0; b < B; ++b) {
    float* sums = bias != nullptr ? a.partial + b * a.E : nullptr;
    if (sums != nullptr) memset(sums, 0, static_cast<size_t>(a.E) * sizeof(float));
    const int64_t end = (b + 1) * stretch < a.N ? (b + 1) * stretch : a.N;
    for (int64_t row = b * stretch; row < end; ++row) {
      const T* grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      T* grad_x = static_cast<T*>(a.grad_x) + row * a.grad_x_stride;
      each_stretch(a.E, [&](int64_t i, int64_t n) {
        fetch(x + i + kAhead);
        fetch(grad + i + kAhead);
        f32x16 u = load(x + i, n);
        if (bias != nullptr) u += load(bias + i);
        const f32x16 g = load(grad + i, n) * slope<T, erf>(u);
        store(grad_x + i, g, n);
        if (sums != nullptr) store(sums + i, load(sums + i, n) + g, n);
      });
    }
  }
  if (bias != nullptr) {
    add_stretches(a.partial, B, a.E);
    from_floats(a.grad_bias, a.partial, a.dtype, a.E);
  }
  free(bias);
  return HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int bias_gelu(const BiasGeluArgs& args) {
  return with_type(args.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    return args.gelu == HK_GELU_ERF ? forward<T, true>(args) : forward<T, false>(args);
  });
}

int bias_gelu_backward(const BiasGeluBackwardArgs& args) {
  return with_type(args.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    return args.gelu == HK_GELU_ERF ? backward<T, true>(args) : backward<T, false>(args);
  });
}

}  // namespace hk::HK_CPU_LEVEL
