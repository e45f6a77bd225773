// spatial_merge, shared by the CPU and CUDA sides: the arguments of a call. Strides count elements.
#pragma once

#include <stdint.h>

#include "cpu/level.h"
#include "hulukern/hulukern.h"

namespace hk {

struct SpatialMergeArgs {
  const void* x;              // [N, E]
  const void *weight, *bias;  // null: no LayerNorm
  const int64_t* keep;        // [K] cells, null: all
  void* out;                  // [K, E]
  float *mean, *rstd;         // [K, area]
  int32_t dtype, weight_dtype;
  int64_t K, E, area;  // area = M * M rows a cell
  int64_t x_stride, out_stride;
  float eps;
  int32_t num_threads;
};

struct SpatialMergeBackwardArgs {
  const void *grad, *x, *weight;
  const int64_t* keep;
  const float *mean, *rstd;
  void *grad_x, *grad_weight, *grad_bias;
  float* partial;  // [B, 2, E]: of weight, of bias; the K cells go in B stretches of ceil(K / B)
  int32_t dtype, weight_dtype;
  int64_t K, cells, E, area, B;
  int64_t grad_stride, x_stride, grad_x_stride;
  int32_t num_threads;
};

}  // namespace hk

HK_DECLARE_CPU(spatial_merge, hk::SpatialMergeArgs)
HK_DECLARE_CPU(spatial_merge_backward, hk::SpatialMergeBackwardArgs)
HK_DECLARE_CUDA(spatial_merge, hk::SpatialMergeArgs)
HK_DECLARE_CUDA(spatial_merge_backward, hk::SpatialMergeBackwardArgs)
