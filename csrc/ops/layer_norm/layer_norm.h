// layer_norm, shared by the CPU and CUDA sides: the arguments of a call. Strides count elements.
#pragma once

#include <stdint.h>

#include "cpu/level.h"
#include "hulukern/hulukern.h"

namespace hk {

struct LayerNormArgs {
  const void *x, *residual;  // residual may be null, then summed is too
  const void *weight, *bias;
  void *y, *summed;
  float *mean, *rstd;
  int32_t dtype, weight_dtype;
  int64_t N, E;
  int64_t x_stride, residual_stride, y_stride, summed_stride;
  float eps;
  int32_t num_threads;
};

struct LayerNormBackwardArgs {
  const void *grad, *grad_summed, *summed;  // grad_summed may be null
  const void* weight;
  const float *mean, *rstd;
  void *grad_x, *grad_weight, *grad_bias;
  float* partial;  // [B, 2, E]: of weight, of bias
  int32_t dtype, weight_dtype;
  int64_t N, E, B;
  int64_t grad_stride, grad_summed_stride, summed_stride, grad_x_stride;
  int32_t num_threads;
};

}  // namespace hk

HK_DECLARE_CPU(layer_norm, hk::LayerNormArgs)
HK_DECLARE_CPU(layer_norm_backward, hk::LayerNormBackwardArgs)
HK_DECLARE_CUDA(layer_norm, hk::LayerNormArgs)
HK_DECLARE_CUDA(layer_norm_backward, hk::LayerNormBackwardArgs)
