// spatial_merge kernels. Forward: a group of warps per kept cell, statistics of its M*M rows, then the mean of
// the normalised rows; memory sees each kept row once. Backward: a block owns a stretch of cells and thread p
// the columns of packs p, p + kThreads, .., as in layer_norm; rows of cells left out are zeroed between the
// kept ones, by a launch of its own, so that no mask or search is needed.
#pragma once

#include "device/rows.cuh"
#include "ops/spatial_merge/spatial_merge.h"

namespace hk {

constexpr int kMaxArea = 64;  // rows a cell: M <= 8

struct SpatialMergeWalk {
  const unsigned char* x;
  const void *weight, *bias;  // NULL: no LayerNorm
  const int64_t* keep;        // NULL: all
  unsigned char* out;
  float *mean, *rstd;
  int64_t x_row, out_row, K;  // bytes; cells
  int32_t packs, E, area, weight_dtype;
  float of_row, of_cell, eps;  // 1 / E, 1 / area
};

template <int kDtype, int kBytes, int kWarps>
__global__ void __launch_bounds__(RowGroup<kWarps>::kThreads, 1) spatial_merge_forward(const SpatialMergeWalk walk) {
  using Group = RowGroup<kWarps>;
  constexpr int kN = kPackElements<kDtype, kBytes>;
  __shared__ SharedArray<float, 2 * kWarps> array;
  __shared__ SharedArray<float2, Group::kRows * kMaxArea> statistics_array;
  const Shared<float> scratch = array.view();
  const Group group;
  const Shared<float2> statistics =  // mean, rstd of the group's rows
      statistics_array.view().part(static_cast<int>(threadIdx.x) / Group::kSize * kMaxArea, kMaxArea);
  if (group.row >= walk.K) return;
  const int64_t cell = walk.keep == nullptr ? group.row : load_value(walk.keep + group.row);
  const unsigned char* rows = walk.x + cell * walk.area * walk.x_row;
  float v[kN];

  for (int r = 0; walk.weight != nullptr && r < walk.area; ++r) {
    const unsigned char* row = rows + r * walk.x_row;
    float sum = 0.0f, squares = 0.0f;
    for (int i = group.place; i < walk.packs; i += Group::kSize) {
      load_row<kDtype, kBytes>(v, row, i);
#pragma unroll
      for (int k = 0; k < kN; ++k) sum += v[k];
    }
    const float mean = Group::sum(sum, scratch, 0) * walk.of_row;
    for (int i = group.place; i < walk.packs; i += Group::kSize) {
      load_row<kDtype, kBytes>(v, row, i);
#pragma unroll
      for (int k = 0; k < kN; ++k) squares = fmaf(v[k] - mean, v[k] - mean, squares);
    }
    const float variance = Group::sum(squares, scratch, 1) * walk.of_row;
    const float rstd = rsqrt_fast(variance + walk.eps);
    if (group.place == 0) {
      statistics.set(r, {mean, rstd});
      store_value(walk.mean + group.row * walk.area + r, mean);
      store_value(walk.rstd + group.row * walk.area + r, rstd);
    }
  }
  if constexpr (kWarps == 1) {
    warp_barrier();
  } else {
    block_barrier();
  }
  const float share = walk.of_cell;
  for (int i = group.place; i < walk.packs; i += Group::kSize) {
    float sum[kN] = {};
    for (int r = 0; r < walk.area; ++r) {
      const float2 of = walk.weight == nullptr ? float2{0.0f, 1.0f} : statistics.get(r);
      load_row<kDtype, kBytes>(v, rows + r * walk.x_row, i);
#pragma unroll
      for (int k = 0; k < kN; ++k) sum[k] = fmaf(v[k] - of.x, of.y, sum[k]);
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) sum[k] *= share;
    if (walk.weight != nullptr) {
      float w[kN], b[kN];
      load_vector<kDtype, kBytes>(w, walk.weight, walk.weight_dtype, i);
      load_vector<kDtype, kBytes>(b, walk.bias, walk.weight_dtype, i);
#pragma unroll
      for (int k = 0; k < kN; ++k) sum[k] = fmaf(sum[k], w[k], b[k]);
    }
    store_row<kDtype, kBytes>(walk.out + group.row * walk.out_row, i, sum);
  }
}

struct SpatialMergeBackwardWalk {
  const unsigned char *grad, *x;
  const void* weight;   // NULL: no LayerNorm
  const int64_t* keep;  // NULL: all
  const float *mean, *rstd;
  unsigned char* grad_x;
  float* partial;                       // [B, 2, E]
  int64_t grad_row, x_row, grad_x_row;  // bytes
  int64_t cells;
  int32_t K, stretch;  // cells a block
  int32_t packs, E, area, weight_dtype;
  float of_row, of_cell;  // 1 / E, 1 / area
};

constexpr int kMergeWarps = 8, kMergeThreads = 32 * kMergeWarps;
constexpr int64_t kZeroBlocks = 1056;  // 8 a multiprocessor

// kSlots: packs a thread adds up columns for; 0: none, and spatial_merge_columns does.
template <int kDtype, int kBytes, int kSlots>
__global__ void __launch_bounds__(kMergeThreads, 1) spatial_merge_backward(const SpatialMergeBackwardWalk walk) {
  using Group = RowGroup<kMergeWarps>;
  constexpr int kN = kPackElements<kDtype, kBytes>, kKept = kSlots > 0 ? kSlots : 1;
  __shared__ SharedArray<float, 2 * kMergeWarps> sum_array, product_array;
  const Shared<float> sums = sum_array.view(), products = product_array.view();
  const int begin = blockIdx.x * walk.stretch;
  const int end = walk.K - begin < walk.stretch ? walk.K : begin + walk.stretch;
  const float share = walk.of_cell;
  float of_weight[kKept][kN] = {}, of_bias[kKept][kN] = {};
  float g[kN], v[kN], w[kN];
  int turn = 0;

  for (int b = begin; b < end; ++b) {
    const unsigned char* grad = walk.grad + b * walk.grad_row;
    const int64_t first = (walk.keep == nullptr ? b : load_value(walk.keep + b)) * walk.area;
    for (int r = 0; r < walk.area; ++r) {
      const unsigned char* row = walk.x + (first + r) * walk.x_row;
      float mean = 0.0f, rstd = 1.0f, sum = 0.0f, product = 0.0f;
      if (walk.weight != nullptr) {
        mean = load_value(walk.mean + static_cast<int64_t>(b) * walk.area + r);
        rstd = load_value(walk.rstd + static_cast<int64_t>(b) * walk.area + r);
        for (int i = threadIdx.x; i < walk.packs; i += kMergeThreads) {
          load_row<kDtype, kBytes>(g, grad, i);
          load_row<kDtype, kBytes>(v, row, i);
          load_vector<kDtype, kBytes>(w, walk.weight, walk.weight_dtype, i);
#pragma unroll
          for (int k = 0; k < kN; ++k) {
            sum = fmaf(g[k], w[k], sum);
            product = fmaf(g[k] * w[k], (v[k] - mean) * rstd, product);
          }
        }
        sum = Group::sum(sum, sums, turn) * walk.of_row;
        product = Group::sum(product, products, turn) * walk.of_row;
        turn ^= 1;
      }
      const auto finish = [&](int i, int slot) {
        load_row<kDtype, kBytes>(g, grad, i);
        if (walk.weight == nullptr) {
#pragma unroll
          for (int k = 0; k < kN; ++k) v[k] = g[k] * share;
        } else {
          load_row<kDtype, kBytes>(v, row, i);
          load_vector<kDtype, kBytes>(w, walk.weight, walk.weight_dtype, i);
#pragma unroll
          for (int k = 0; k < kN; ++k) {
            const float normed = (v[k] - mean) * rstd;
            of_weight[slot][k] = fmaf(g[k] * share, normed, of_weight[slot][k]);
            of_bias[slot][k] = fmaf(g[k], share, of_bias[slot][k]);
            v[k] = rstd * share * (g[k] * w[k] - sum - normed * product);
          }
        }
        store_row<kDtype, kBytes>(walk.grad_x + (first + r) * walk.grad_x_row, i, v);
      };
      each_slot<kSlots, kMergeThreads>(walk.packs, finish);
    }
  }
  if constexpr (kSlots > 0) {
    if (walk.partial == nullptr) return;
    store_column_sums<kMergeThreads>(walk.partial, walk.E, of_weight, of_bias);
  }
}

// The column sums of a stretch alone, a thread per column.
template <int kDtype>
__global__ void __launch_bounds__(kMergeThreads) spatial_merge_columns(const SpatialMergeBackwardWalk walk) {
  const int e = blockIdx.y * kMergeThreads + threadIdx.x;
  if (e >= walk.E) return;
  const int begin = blockIdx.x * walk.stretch;
  const int end = walk.K - begin < walk.stretch ? walk.K : begin + walk.stretch;
  const float share = walk.of_cell;
  float of_weight = 0.0f, of_bias = 0.0f;
  for (int b = begin; b < end; ++b) {
    const float g = load_float(walk.grad + b * walk.grad_row, kDtype, e);
    const int64_t first = (walk.keep == nullptr ? b : load_value(walk.keep + b)) * walk.area;
    for (int r = 0; r < walk.area; ++r) {
      const float v = load_float(walk.x + (first + r) * walk.x_row, kDtype, e);
      const float normed = (v - load_value(walk.mean + static_cast<int64_t>(b) * walk.area + r)) *
                           load_value(walk.rstd + static_cast<int64_t>(b) * walk.area + r);
      of_weight = fmaf(g * share, normed, of_weight);
    }
    of_bias += g;
  }
  float* to = walk.partial + static_cast<int64_t>(blockIdx.x) * 2 * walk.E;
  store_value(to + e, of_weight);
  store_value(to + walk.E + e, of_bias);
}

// Blocks (i, *): zeros for the rows of the cells between kept cells i - 1 and i.
template <int kBytes>
__global__ void __launch_bounds__(kMergeThreads) zero_cells_left_out(const SpatialMergeBackwardWalk walk) {
  const int i = blockIdx.x;
  const int64_t begin = (i == 0 ? 0 : load_value(walk.keep + i - 1) + 1) * walk.area;
  const int64_t end = (i == walk.K ? walk.cells : load_value(walk.keep + i)) * walk.area;
  for (int64_t row = begin + blockIdx.y; row < end; row += gridDim.y)
    for (int p = threadIdx.x; p < walk.packs; p += kMergeThreads)
      store_pack<kBytes>(walk.grad_x + row * walk.grad_x_row + static_cast<int64_t>(p) * kBytes, zero_pack<kBytes>());
}

}  // namespace hk
