// spatial_merge on the CPU, a cell at a time: its rows are read once and passed over three times in L1, all
// rows in each pass: the next pass over a row waits for a division. Meanwhile the next cell is fetched to L1 and the
// one after it to L2: a third faster than hardware's own prefetching, which stops where cells were left out.
// The backward sums the columns of weight and bias per stretch of cells and then over the
// stretches, in order, and clears the cells that were left out on its way past them.
#include "cpu/row_norm.h"
#include "ops/spatial_merge/spatial_merge.h"

namespace {

using hk::SpatialMergeArgs;
using hk::SpatialMergeBackwardArgs;

// Cell k of those kept; the last one where there are not so many.
template <class Args>
HK_INLINE int64_t cell_of(const Args& a, int64_t k) {
  const int64_t i = k < a.K ? k : a.K - 1;
  return a.keep ? a.keep[i] : i;
}

// kArea is the number of rows of a cell, 0 where only the call knows it.
template <class T, int64_t kArea>
void merge_cell(const SpatialMergeArgs& a, int64_t k, const float* weight, const float* bias) {
  const int64_t area = kArea ? kArea : a.area;
  const int64_t cell_stride = area * a.x_stride;
  const T *rows = static_cast<const T*>(a.x), *x = rows + cell_of(a, k) * cell_stride;
  const T *next = rows + cell_of(a, k + 1) * cell_stride, *later = rows + cell_of(a, k + 2) * cell_stride;
  T* out = static_cast<T*>(a.out) + k * a.out_stride;
  const float each = 1.0f / static_cast<float>(area);
  if (weight == nullptr) {
    each_stretch(a.E, [&](int64_t i, int64_t n) {
      f32x16 sum = load(x + i, n);
      for (int64_t r = 1; r < area; ++r) sum += load(x + r * a.x_stride + i, n);
      for (int64_t r = 0; r < area; ++r) fetch(next + r * a.x_stride + i);
      store(out + i, sum * each, n);
    });
    return;
  }
  float *mean = a.mean + k * area, *rstd = a.rstd + k * area;
  for (int64_t r = 0; r < area; ++r)
    mean[r] = mean_of(x + r * a.x_stride, a.E, [&](int64_t i) { fetch_later(later + r * a.x_stride + i); });
  for (int64_t r = 0; r < area; ++r)
    rstd[r] = rstd_of(x + r * a.x_stride, mean[r], a.E, a.eps, [&](int64_t i) { fetch(next + r * a.x_stride + i); });
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    f32x16 sum = (load(x + i, n) - mean[0]) * rstd[0];
    for (int64_t r = 1; r < area; ++r) sum += (load(x + r * a.x_stride + i, n) - mean[r]) * rstd[r];
    store(out + i, sum * each * load(weight + i) + load(bias + i), n);
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
  for (int64_t k = 0; k < a.K; ++k) {
    if (a.area == 4)
      merge_cell<T, 4>(a, k, weight, bias);
    else
      merge_cell<T, 0>(a, k, weight, bias);
  }
  free(weight);
  return HK_OK;
}

template <class T>
void clear_cells(const SpatialMergeBackwardArgs& a, int64_t first, int64_t end) {
  for (int64_t row = first * a.area; row < end * a.area; ++row)
    memset(static_cast<T*>(a.grad_x) + row * a.grad_x_stride, 0, static_cast<size_t>(a.E) * sizeof(T));
}

// Gradients of kRows rows of a cell, from row `first` of it on.
template <class T, int kRows>
void spread_rows(const SpatialMergeBackwardArgs& a, int64_t k, int64_t first, const float* weight, float* of_weight,
                 float* of_bias) {
  const T* grad = static_cast<const T*>(a.grad) + k * a.grad_stride;
  const int64_t row = cell_of(a, k) * a.area + first;
  const T *rows = static_cast<const T*>(a.x), *x = rows + row * a.x_stride;
  const T* next = rows + (cell_of(a, k + 1) * a.area + first) * a.x_stride;
  T* grad_x = static_cast<T*>(a.grad_x) + row * a.grad_x_stride;
  const float each = 1.0f / static_cast<float>(a.area), E = static_cast<float>(a.E);
  if (weight == nullptr) {
    each_stretch(a.E, [&](int64_t i, int64_t n) {
      const f32x16 g = load(grad + i, n) * each;
      for (int r = 0; r < kRows; ++r) store(grad_x + r * a.grad_x_stride + i, g, n);
    });
    return;
  }
  const float *mean = a.mean + k * a.area + first, *rstd = a.rstd + k * a.area + first;
  f32x16 sum = {}, dot[kRows] = {};
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    const f32x16 g = load(grad + i, n), gw = g * each * load(weight + i, n);
    f32x16 by_weight = load(of_weight + i, n);
    for (int r = 0; r < kRows; ++r) {
      fetch(next + r * a.x_stride + i);
      const f32x16 normed = (load(x + r * a.x_stride + i, n) - mean[r]) * rstd[r];
      dot[r] += gw * normed;
      by_weight += g * each * normed;
    }
    sum += gw;
    store(of_weight + i, by_weight, n);
    if (first == 0) store(of_bias + i, load(of_bias + i, n) + g, n);
  });
  const float mean_gw = total(sum) / E;
  float mean_dot[kRows];
  for (int r = 0; r < kRows; ++r) mean_dot[r] = total(dot[r]) / E;
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    const f32x16 gw = load(grad + i, n) * each * load(weight + i, n);
    for (int r = 0; r < kRows; ++r) {
      const f32x16 normed = (load(x + r * a.x_stride + i, n) - mean[r]) * rstd[r];
      store(grad_x + r * a.grad_x_stride + i, rstd[r] * (gw - mean_gw - normed * mean_dot[r]), n);
    }
  });
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
      int64_t row = 0;
      for (; row + 4 <= a.area; row += 4) spread_rows<T, 4>(a, k, row, weight, of_weight, of_bias);
      for (; row < a.area; ++row) spread_rows<T, 1>(a, k, row, weight, of_weight, of_bias);
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
