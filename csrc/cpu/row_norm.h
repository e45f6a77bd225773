// What ops with a LayerNorm share: a row's statistics, and sums over stretches of rows.
#pragma once

#include "cpu/vec.h"

namespace {

HK_INLINE float square_root(float x) {
#ifdef HK_CPU_X86_LEVELS
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}

// Of a row of E values. `beside(i)` is called per stretch, to fetch what comes next.
template <class T, class Beside>
HK_INLINE float mean_of(const T* row, int64_t E, Beside beside) {
  const f32x16 sum = sum_stretches(E, [&](int64_t i, int64_t n) {
    beside(i);
    return load(row + i, n);
  });
  return total(sum) / static_cast<float>(E);
}
// The variance is taken about the mean: a mean far from zero would cost E[x^2] - mean^2 its digits.
template <class T, class Beside>
HK_INLINE float rstd_of(const T* row, float mean, int64_t E, float eps, Beside beside) {
  const f32x16 squares = sum_stretches(E, [&](int64_t i, int64_t n) {
    beside(i);
    const f32x16 d = load(row + i, n) - mean;
    if (n == kLanes) return d * d;
    float part[kLanes] = {};  // beyond the row d is -mean
    store(part, d * d, n);
    return load(part);
  });
  return 1.0f / square_root(total(squares) / static_cast<float>(E) + eps);
}

// partial [B, n]: adds all to the first, in order.
inline void add_stretches(float* partial, int64_t B, int64_t n) {
  for (int64_t b = 1; b < B; ++b)
    each_stretch(
        n, [&](int64_t i, int64_t m) { store(partial + i, load(partial + i, m) + load(partial + b * n + i, m), m); });
}

}  // namespace
