// bias_gelu, shared by the CPU and CUDA sides: the arguments of a call. Strides count elements.
#pragma once

#include <stdint.h>

#include "cpu/level.h"
#include "hulukern/hulukern.h"

namespace hk {

struct BiasGeluArgs {
  const void *x, *bias;  // bias may be null
  void* out;
  int32_t dtype, gelu;
  int64_t N, E, x_stride, out_stride;
  int32_t num_threads;
};

struct BiasGeluBackwardArgs {
  const void *grad, *x, *bias;
  void *grad_x, *grad_bias;  // grad_bias and partial are null without a bias
  float* partial;            // [B, E]
  int32_t dtype, gelu;
  int64_t N, E, B, grad_stride, x_stride, grad_x_stride;
  int32_t num_threads;
};

}  // namespace hk

HK_DECLARE_CPU(bias_gelu, hk::BiasGeluArgs)
HK_DECLARE_CPU(bias_gelu_backward, hk::BiasGeluBackwardArgs)
HK_DECLARE_CUDA(bias_gelu, hk::BiasGeluArgs)
HK_DECLARE_CUDA(bias_gelu_backward, hk::BiasGeluBackwardArgs)
