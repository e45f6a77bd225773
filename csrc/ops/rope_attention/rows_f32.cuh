// rope_attention for fp32 inputs: no tensor core multiplies fp32, so a warp owns one row and multiplies by FMA.
// It takes 32 rows of the other side at a time: lane l the dot products with row l, then all lanes together the
// sums over rows, each lane every 32nd dimension. Correct first: meant for tests and for small models.
#pragma once

#include "ops/rope_attention/rotate.cuh"
#include "ops/rope_attention/tiles.cuh"

namespace hk {

constexpr int kSlots = 4;  // dimensions a lane keeps: D <= 128
constexpr int kMaxD = 128;

__device__ __forceinline__ const float* floats(const HeadRows& rows, int64_t n, int64_t a) {
  return reinterpret_cast<const float*>(rows.at(n, a));
}

// The row of a warp: one of 4 rows of a tile, or none.
struct WarpRow {
  int32_t sequence, row;
  bool any;
};
__device__ __forceinline__ WarpRow find_row(const int32_t* cu_seqlens, int32_t S) {
  const Tile tile = find_tile(cu_seqlens, S, kAttentionWarps, blockIdx.x);
  const int warp = threadIdx.x / kWarpSize;
  return {tile.sequence, tile.first + warp, warp < tile.rows};
}

__device__ __forceinline__ float dot(const Shared<float>& a, const float* b, int D) {
  float sum = 0.0f;
  for (int d = 0; d < D; d += 4) {
    const Pack<16> x = a.get_pack<16>(d), y = load_pack<16>(b + d);
#pragma unroll
    for (int w = 0; w < 4; ++w) sum = fmaf(f32_of_bits(x.words[w]), f32_of_bits(y.words[w]), sum);
  }
  return sum;
}

// sums[i] += weight of lane l * (dimension 32 i + lane of row first + l), over the first `count` lanes.
__device__ __forceinline__ void add_rows(float (&sums)[kSlots], float weight, const HeadRows& rows, int64_t first,
                                         int count, int head, int D) {
  const int lane = threadIdx.x % kWarpSize;
  for (int l = 0; l < count; ++l) {
    const float w = shuffle(weight, l);
    const float* row = floats(rows, first + l, head);
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (i * kWarpSize + lane < D) sums[i] = fmaf(w, load_value(row + i * kWarpSize + lane), sums[i]);
  }
}

}  // namespace hk
