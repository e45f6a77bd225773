// layer_norm on the CPU, a row at a time. The row is read once and passed over three times in L1, in its own
// dtype: the sum and its mean, the variance about that mean, the result. The next row is fetched meanwhile.
//
// The backward's columns (gradients of weight and bias) are summed per stretch of rows, then over the
// stretches in order: the bits depend on the stretches, which the shape fixes, and not on the threads.
#include "cpu/row_norm.h"
#include "cpu/vec.h"
#include "hulukern/hulukern.h"
#include "ops/layer_norm/layer_norm.h"

namespace {

using hk::LayerNormArgs;
using hk::LayerNormBackwardArgs;

template <class T>
void forward_row(const LayerNormArgs& a, int64_t row, const float* weight, const float* bias) {
  const T *x = static_cast<const T*>(a.x) + row * a.x_stride, *next = x + a.x_stride;
  T* y = static_cast<T*>(a.y) + row * a.y_stride;
  const T* next_residual = next;
  float mean;
  if (a.residual == nullptr) {
    mean = mean_of(x, a.E, [](int64_t) {});
  } else {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* summed = static_cast<T*>(a.summed) + row * a.summed_stride;
    const f32x16 sum = sum_stretches(a.E, [&](int64_t i, int64_t n) {
      store(summed + i, load(x + i, n) + load(residual + i, n), n);
      return load(summed + i, n);
    });
    mean = total(sum) / static_cast<float>(a.E);
    next_residual = residual + a.residual_stride;
    x = summed;
  }
  const float rstd = rstd_of(x, mean, a.E, a.eps, [&](int64_t i) { fetch(next + i); });
  a.mean[row] = mean;
  a.rstd[row] = rstd;
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    fetch(next_residual + i);
    store(y + i, (load(x + i, n) - mean) * rstd * load(weight + i) + load(bias + i), n);
  });
}

template <class T>
int forward(const LayerNormArgs& a) {
  float* weight = allocate_floats(2 * (a.E + kLanes));
  if (weight == nullptr) return HK_OUT_OF_MEMORY;
  float* bias = weight + (a.E + kLanes - 1) / kLanes * kLanes;
  to_floats(weight, a.weight, a.weight_dtype, a.E);
  to_floats(bias, a.bias, a.weight_dtype, a.E);
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t row = 0; row < a.N; ++row) forward_row<T>(a, row, weight, bias);
  free(weight);
  return HK_OK;
}

template <class T>
void backward_row(const LayerNormBackwardArgs& a, int64_t row, const float* weight, float* of_weight, float* of_bias) {
  const T* grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
  const T* summed = static_cast<const T*>(a.summed) + row * a.summed_stride;
  T* grad_x = static_cast<T*>(a.grad_x) + row * a.grad_x_stride;
  const float mean = a.mean[row], rstd = a.rstd[row];
  f32x16 sum = {}, dot = {};
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    const f32x16 g = load(grad + i, n), normed = (load(summed + i, n) - mean) * rstd;
    const f32x16 gw = g * load(weight + i, n);
    fetch(grad + a.grad_stride + i);
    fetch(summed + a.summed_stride + i);
    sum += gw;
    dot += gw * normed;
    store(of_weight + i, load(of_weight + i, n) + g * normed, n);
    store(of_bias + i, load(of_bias + i, n) + g, n);
  });
  const float mean_gw = total(sum) / static_cast<float>(a.E), mean_dot = total(dot) / static_cast<float>(a.E);
  const T* other = a.grad_summed ? static_cast<const T*>(a.grad_summed) + row * a.grad_summed_stride : nullptr;
  each_stretch(a.E, [&](int64_t i, int64_t n) {
    const f32x16 normed = (load(summed + i, n) - mean) * rstd;
    f32x16 gx = rstd * (load(grad + i, n) * load(weight + i, n) - mean_gw - normed * mean_dot);
    if (other != nullptr) {
      fetch(other + a.grad_summed_stride + i);
      gx += load(other + i, n);
    }
    store(grad_x + i, gx, n);
  });
}

template <class T>
int backward(const LayerNormBackwardArgs& a) {
  float* weight = allocate_floats(a.E);
  if (weight == nullptr) return HK_OUT_OF_MEMORY;
  to_floats(weight, a.weight, a.weight_dtype, a.E);
  const int64_t stretch = (a.N + a.B - 1) / a.B;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.num_threads)
  for (int64_t b = 0; b < a.B; ++b) {
    float *of_weight = a.partial + 2 * b * a.E, *of_bias = of_weight + a.E;
    memset(of_weight, 0, static_cast<size_t>(2 * a.E) * sizeof(float));
    const int64_t end = (b + 1) * stretch < a.N ? (b + 1) * stretch : a.N;
    for (int64_t row = b * stretch; row < end; ++row) backward_row<T>(a, row, weight, of_weight, of_bias);
  }
  add_stretches(a.partial, a.B, 2 * a.E);
  from_floats(a.grad_weight, a.partial, a.weight_dtype, a.E);
  from_floats(a.grad_bias, a.partial + a.E, a.weight_dtype, a.E);
  free(weight);
  return HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int layer_norm(const LayerNormArgs& args) {
  return with_type(args.dtype, [&](auto* type) { return forward<Pointee<decltype(type)>>(args); });
}

int layer_norm_backward(const LayerNormBackwardArgs& args) {
  return with_type(args.dtype, [&](auto* type) { return backward<Pointee<decltype(type)>>(args); });
}

}  // namespace hk::HK_CPU_LEVEL
