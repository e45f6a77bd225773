// layer_norm kernels. Forward: a group of warps per row, mean, then squares about the mean, then the result;
// memory sees one read of x and residual and one write of y and the sum. At E = 1152 a warp has a row.
//
// Backward: a block owns a stretch of rows, thread p the columns of packs p, p + kThreads, ..; row by row it
// makes the two row sums, then grad_x, and adds up grad_weight and grad_bias in registers. Two launches of
// sum_columns finish those. Rows too long for that (kSlots packs a thread) take layer_norm_columns as a second pass.
#pragma once

#include "device/rows.cuh"
#include "ops/layer_norm/layer_norm.h"

namespace hk {

struct LayerNormWalk {
  const unsigned char *x, *residual;  // residual or NULL
  const void *weight, *bias;
  unsigned char *y, *summed;
  float *mean, *rstd;
  int64_t x_row, residual_row, y_row, summed_row;  // bytes
  int64_t N;
  int32_t packs, E, weight_dtype;
  float share, eps;  // share: 1 / E
};

// Pack i of what is normalised: x, or x + residual rounded to the dtype.
template <int kDtype, int kBytes>
__device__ __forceinline__ void load_summed(float (&v)[kPackElements<kDtype, kBytes>], const unsigned char* x,
                                            const unsigned char* residual, int i) {
  load_row<kDtype, kBytes>(v, x, i);
  if (residual == nullptr) return;
  float r[kPackElements<kDtype, kBytes>];
  load_row<kDtype, kBytes>(r, residual, i);
#pragma unroll
  for (int k = 0; k < kPackElements<kDtype, kBytes>; ++k) v[k] = rounded<kDtype>(v[k] + r[k]);
}

template <int kDtype, int kBytes, int kWarps>
__global__ void __launch_bounds__(RowGroup<kWarps>::kThreads) layer_norm_forward(const LayerNormWalk walk) {
  using Group = RowGroup<kWarps>;
  constexpr int kN = kPackElements<kDtype, kBytes>;
  __shared__ SharedArray<float, 2 * kWarps> array;
  const Shared<float> scratch = array.view();
  const Group group;
  if (group.row >= walk.N) return;
  const unsigned char* x = walk.x + group.row * walk.x_row;
  const unsigned char* residual = walk.residual == nullptr ? nullptr : walk.residual + group.row * walk.residual_row;
  float v[kN];

  float sum = 0.0f;
  for (int i = group.place; i < walk.packs; i += Group::kSize) {
    load_summed<kDtype, kBytes>(v, x, residual, i);
    if (residual != nullptr) store_row<kDtype, kBytes>(walk.summed + group.row * walk.summed_row, i, v);
#pragma unroll
    for (int k = 0; k < kN; ++k) sum += v[k];
  }
  const float mean = Group::sum(sum, scratch, 0) * walk.share;
  float squares = 0.0f;
  for (int i = group.place; i < walk.packs; i += Group::kSize) {
    load_summed<kDtype, kBytes>(v, x, residual, i);
#pragma unroll
    for (int k = 0; k < kN; ++k) squares = fmaf(v[k] - mean, v[k] - mean, squares);
  }
  const float variance = Group::sum(squares, scratch, 1) * walk.share;
  const float rstd = rsqrt_fast(variance + walk.eps);
  for (int i = group.place; i < walk.packs; i += Group::kSize) {
    float w[kN], b[kN];
    load_summed<kDtype, kBytes>(v, x, residual, i);
    load_vector<kDtype, kBytes>(w, walk.weight, walk.weight_dtype, i);
    load_vector<kDtype, kBytes>(b, walk.bias, walk.weight_dtype, i);
#pragma unroll
    for (int k = 0; k < kN; ++k) v[k] = fmaf((v[k] - mean) * rstd, w[k], b[k]);
    store_row<kDtype, kBytes>(walk.y + group.row * walk.y_row, i, v);
  }
  if (group.place == 0) {
    store_value(walk.mean + group.row, mean);
    store_value(walk.rstd + group.row, rstd);
  }
}

struct LayerNormBackwardWalk {
  const unsigned char *grad, *grad_summed, *summed;  // grad_summed or NULL
  const void* weight;
  const float *mean, *rstd;
  unsigned char* grad_x;
  float* partial;                                             // [B, 2, E]
  int64_t grad_row, grad_summed_row, summed_row, grad_x_row;  // bytes
  int32_t N, stretch;                                         // rows a block
  int32_t packs, E, weight_dtype;
  float share;  // 1 / E
};

constexpr int kBackwardWarps = 8, kBackwardThreads = 32 * kBackwardWarps;

template <int kDtype, int kBytes, int kSlots>
__global__ void __launch_bounds__(kBackwardThreads, 1) layer_norm_backward(const LayerNormBackwardWalk walk) {
  using Group = RowGroup<kBackwardWarps>;
  constexpr int kN = kPackElements<kDtype, kBytes>, kKept = kSlots > 0 ? kSlots : 1;
  __shared__ SharedArray<float, 2 * kBackwardWarps> first_array, second_array;
  const Shared<float> first = first_array.view(), second = second_array.view();
  const int begin = blockIdx.x * walk.stretch;
  const int end = walk.N - begin < walk.stretch ? walk.N : begin + walk.stretch;
  float of_weight[kKept][kN] = {}, of_bias[kKept][kN] = {};
  float g[kN], v[kN], w[kN];

  for (int row = begin; row < end; ++row) {
    const unsigned char *grad = walk.grad + row * walk.grad_row, *summed = walk.summed + row * walk.summed_row;
    const float mean = load_value(walk.mean + row), rstd = load_value(walk.rstd + row);
    float sum = 0.0f, product = 0.0f;
    for (int i = threadIdx.x; i < walk.packs; i += kBackwardThreads) {
      load_row<kDtype, kBytes>(g, grad, i);
      load_row<kDtype, kBytes>(v, summed, i);
      load_vector<kDtype, kBytes>(w, walk.weight, walk.weight_dtype, i);
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        sum = fmaf(g[k], w[k], sum);
        product = fmaf(g[k] * w[k], (v[k] - mean) * rstd, product);
      }
    }
    const int turn = (row - begin) % 2;
    sum = Group::sum(sum, first, turn) * walk.share;
    product = Group::sum(product, second, turn) * walk.share;
    const auto finish = [&](int i, int slot) {
      load_row<kDtype, kBytes>(g, grad, i);
      load_row<kDtype, kBytes>(v, summed, i);
      load_vector<kDtype, kBytes>(w, walk.weight, walk.weight_dtype, i);
      float other[kN] = {};
      if (walk.grad_summed != nullptr)
        load_row<kDtype, kBytes>(other, walk.grad_summed + row * walk.grad_summed_row, i);
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const float normed = (v[k] - mean) * rstd;
        of_weight[slot][k] = fmaf(g[k], normed, of_weight[slot][k]);
        of_bias[slot][k] += g[k];
        v[k] = fmaf(rstd, g[k] * w[k] - sum - normed * product, other[k]);
      }
      store_row<kDtype, kBytes>(walk.grad_x + row * walk.grad_x_row, i, v);
    };
    each_slot<kSlots, kBackwardThreads>(walk.packs, finish);
  }
  if constexpr (kSlots > 0) {
    store_column_sums<kBackwardThreads>(walk.partial, walk.E, of_weight, of_bias);
  }
}

// The column sums of a stretch alone, a thread per column.
template <int kDtype>
__global__ void __launch_bounds__(kBackwardThreads) layer_norm_columns(const LayerNormBackwardWalk walk) {
  const int e = blockIdx.y * kBackwardThreads + threadIdx.x;
  if (e >= walk.E) return;
  const int begin = blockIdx.x * walk.stretch;
  const int end = walk.N - begin < walk.stretch ? walk.N : begin + walk.stretch;
  float of_weight = 0.0f, of_bias = 0.0f;
  for (int row = begin; row < end; ++row) {
    const float g = load_float(walk.grad + row * walk.grad_row, kDtype, e);
    const float v = load_float(walk.summed + row * walk.summed_row, kDtype, e);
    of_weight = fmaf(g, (v - load_value(walk.mean + row)) * load_value(walk.rstd + row), of_weight);
    of_bias += g;
  }
  float* to = walk.partial + static_cast<int64_t>(blockIdx.x) * 2 * walk.E;
  store_value(to + e, of_weight);
  store_value(to + walk.E + e, of_bias);
}

}  // namespace hk
