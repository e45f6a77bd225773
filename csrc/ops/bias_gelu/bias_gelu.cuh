// bias_gelu kernels: a thread owns one pack of columns and walks down a stretch of rows, so that the bias is
// read once and its gradient adds up in registers. Memory sees one read and one write of every element.
// About 12 (tanh) or 30 (erf) operations an element against 4 bytes: memory-bound at either.
#pragma once

#include "device/gelu.cuh"
#include "device/rows.cuh"
#include "ops/bias_gelu/bias_gelu.h"

namespace hk {

struct BiasGeluWalk {
  const unsigned char *grad, *x, *bias;  // grad: backward; bias or NULL
  unsigned char* out;                    // or grad_x
  float* partial;                        // [B, E], backward with a bias
  int64_t grad_row, x_row, out_row;      // bytes
  int64_t N, stretch;                    // rows a block
  int32_t packs, E;
};

constexpr int kGeluThreads = 128;

template <int kDtype, int kBytes, bool kTanh, bool kBackward>
__global__ void __launch_bounds__(kGeluThreads, 1) bias_gelu_rows(const BiasGeluWalk walk) {
  constexpr int kN = kPackElements<kDtype, kBytes>;
  const int i = blockIdx.y * kGeluThreads + threadIdx.x;
  if (i >= walk.packs) return;
  const int64_t begin = blockIdx.x * walk.stretch;
  const int64_t end = begin + walk.stretch < walk.N ? begin + walk.stretch : walk.N;
  float bias[kN] = {}, of_bias[kN] = {};
  if (walk.bias != nullptr) load_row<kDtype, kBytes>(bias, walk.bias, i);
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    float v[kN], g[kN];
    load_row<kDtype, kBytes>(v, walk.x + row * walk.x_row, i);
    if (kBackward) load_row<kDtype, kBytes>(g, walk.grad + row * walk.grad_row, i);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      const Gelu y = gelu<kTanh>(v[k] + bias[k]);
      v[k] = kBackward ? g[k] * y.slope : y.value;
      of_bias[k] += v[k];
    }
    store_row<kDtype, kBytes>(walk.out + row * walk.out_row, i, v);
  }
  if (kBackward && walk.partial != nullptr) {
#pragma unroll
    for (int k = 0; k < kN; ++k)
      store_value(walk.partial + static_cast<int64_t>(blockIdx.x) * walk.E + static_cast<int64_t>(i) * kN + k,
                  of_bias[k]);
  }
}

}  // namespace hk
