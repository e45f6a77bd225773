// spatial_merge on the CPU, a cell at a time: its rows are read once, normalised in L1 and added up there.
// The backward sums the columns of weight and bias per stretch of cells and then over the
// stretches, in order, and clears the cells that were left out on its way past them.
#include "cpu/row_norm.h"
#include "ops/spatial_merge/spatial_merge.h"

namespace {

using hk::SpatialMergeArgs;
using hk::SpatialMergeBackwardArgs;

template <class T>
void merge_cell(const SpatialMergeArgs& a, int64_t k, const float* weight, const float* bias) {
  const T *rows = static_cast<const T*>(a.x), *x = rows + (a.keep ? a.keep[k] : k) * a.area * a.x_stride;
  const T* next_cell = rows + (a.keep && k + 1 < a.K ? a.keep[k + 1] : k + 1) * a.area * a.x_stride;
  T* out = static_cast<T*>(a.out) + k * a.out_stride;
  const float each = 1.0f / static_cast<float>(a.area);
  float *mean = a.mean + k * a.area, *rstd = a.rstd + k * a.area;
  for (int64_t r = 0; r < a.area && weight != nullptr; ++r) {
    const T *row = x + r * a.x_stride, *next = next_cell + r * a.x_stride;
    const f32x16 sum = sum_stretches(a.E, [&](int64_t i, int64_t n) { return load(row + i, n); });
    const Statistics z = statistics(row, total(sum), a.E, a.eps, [&](int64_t i) { fetch(next + i); });
    mean[r] = z.mean;
    rstd[r] = z.rstd;
  }
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    f32x16 sum = {};
    for (int64_t r = 0; r < a.area; ++r) {
      const f32x16 v = load(x + r * a.x_stride + i, n);
      if (weight == nullptr) fetch(next_cell + r * a.x_stride + i);
      sum += weight ? (v - mean[r]) * rstd[r] : v;
    }
    sum *= each;
    store(out + i, weight ? sum * load(weight + i) + load(bias + i) : sum, n);
  });
}

template <class T>
int forward(const SpatialMergeArgs& a) {
  const int64_t row = (a.E + kLanes - 1) / kLanes * kLanes;
  float *weight = nullptr, *bias = nullptr;
  if (a.weight != nullptr) {
    weight = allocate_floats(2 * row);
    if (weight == nullptr) return HK_OUT_OF_MEMORY;
    bias = weight + row;
    to_floats(weight, a.weight, a.weight_dtype, a.E);
    to_floats(bias, a.bias, a.weight_dtype, a.E);
  }
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t k = 0; k < a.K; ++k) merge_cell<T>(a, k, weight, bias);
  free(weight);
  return HK_OK;
}

template <class T>
void clear_cells(const SpatialMergeBackwardArgs& a, int64_t first, int64_t end) {
  for (int64_t row = first * a.area; row < end * a.area; ++row)
    memset(static_cast<T*>(a.grad_x) + row * a.grad_x_stride, 0, static_cast<size_t>(a.E) * sizeof(T));
}

template <class T>
void spread_cell(const SpatialMergeBackwardArgs& a, int64_t k, const float* weight, float* of_weight, float* of_bias) {
  const T* grad = static_cast<const T*>(a.grad) + k * a.grad_stride;
  const int64_t first = (a.keep ? a.keep[k] : k) * a.area;
  const float each = 1.0f / static_cast<float>(a.area), E = static_cast<float>(a.E);
  for (int64_t r = 0; r < a.area; ++r) {
    T* grad_x = static_cast<T*>(a.grad_x) + (first + r) * a.grad_x_stride;
    if (weight == nullptr) {
      each_stretch(a.E, [&](int64_t i, int64_t n) { store(grad_x + i, load(grad + i, n) * each, n); });
      continue;
    }
    const T* x = static_cast<const T*>(a.x) + (first + r) * a.x_stride;
    const float mean = a.mean[k * a.area + r], rstd = a.rstd[k * a.area + r];
    f32x16 sum = {}, dot = {};
    each_stretch(a.E, [&](int64_t i, int64_t n) {
      fetch(x + a.x_stride + i);
      const f32x16 g = load(grad + i, n), normed = (load(x + i, n) - mean) * rstd, gw = g * each * load(weight + i, n);
      sum += gw;
      dot += gw * normed;
      store(of_weight + i, load(of_weight + i, n) + g * each * normed, n);
      if (r == 0) store(of_bias + i, load(of_bias + i, n) + g, n);
    });
    const float mean_gw = total(sum) / E, mean_dot = total(dot) / E;
    each_stretch(a.E, [&](int64_t i, int64_t n) {
      const f32x16 normed = (load(x + i, n) - mean) * rstd, gw = load(grad + i, n) * each * load(weight + i, n);
      store(grad_x + i, rstd * (gw - mean_gw - normed * mean_dot), n);
    });
  }
}

template <class T>
int backward(const SpatialMergeBackwardArgs& a) {
  float* weight = nullptr;
  if (a.weight != nullptr) {
    weight = allocate_floats(a.E);
    if (weight == nullptr) return HK_OUT_OF_MEMORY;
    to_floats(weight, a.weight, a.weight_dtype, a.E);
  }
  const int64_t B = weight != nullptr ? a.B : 32, stretch = (a.K + B - 1) / B;
  if (a.K == 0) clear_cells<T>(a, 0, a.cells);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int64_t b = 0; b < B; ++b) {
    float *of_weight = weight ? a.partial + 2 * b * a.E : nullptr, *of_bias = weight ? of_weight + a.E : nullptr;
    if (weight != nullptr) memset(of_weight, 0, static_cast<size_t>(2 * a.E) * sizeof(float));
    const int64_t end = (b + 1) * stretch < a.K ? (b + 1) * stretch : a.K;
    for (int64_t k = b * stretch; k < end; ++k) {
      spread_cell<T>(a, k, weight, of_weight, of_bias);
      if (a.keep == nullptr) continue;
      clear_cells<T>(a, k == 0 ? 0 : a.keep[k - 1] + 1, a.keep[k]);
      if (k == a.K - 1) clear_cells<T>(a, a.keep[k] + 1, a.cells);
    }
  }
  if (weight != nullptr) {
    add_stretches(a.partial, B, 2 * a.E);
    from_floats(a.grad_weight, a.partial, a.weight_dtype, a.E);
    from_floats(a.grad_bias, a.partial + a.E, a.weight_dtype, a.E);
  }
  free(weight);
  return HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int spatial_merge(const SpatialMergeArgs& args) {
  return with_type(args.dtype, [&](auto* type) { return forward<Pointee<decltype(type)>>(args); });
}

int spatial_merge_backward(const SpatialMergeBackwardArgs& args) {
  return with_type(args.dtype, [&](auto* type) { return backward<Pointee<decltype(type)>>(args); });
}

}  // namespace hk::HK_CPU_LEVEL
