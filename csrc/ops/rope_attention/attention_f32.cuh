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

struct AttentionF32Walk {
  HeadRows q, k, v;  // k rotated; forward: q not rotated yet
  float* out;
  int64_t out_row, out_head;  // elements
  float* lse;
  const int32_t *positions_q, *cu_seqlens_q, *cu_seqlens_k;
  int64_t Nq;
  int32_t S, D;
  float scale;
  Rope rope;
};

__global__ void __launch_bounds__(kAttentionThreads) attention_forward_f32(const AttentionF32Walk walk) {
  __shared__ SharedArray<float, kAttentionWarps * kMaxD> array;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, head = blockIdx.y, D = walk.D;
  const Shared<float> query = array.view().part(warp * kMaxD, kMaxD);
  const WarpRow own = find_row(walk.cu_seqlens_q, walk.S);
  if (!own.any) return;
  const float* from = floats(walk.q, own.row, head);
  for (int j = lane; j < D / 2; j += kWarpSize) {
    float sine, cosine;
    sine_cosine(rope_angle(walk.rope, walk.positions_q, own.row, j), &sine, &cosine);
    const float a = load_value(from + j), b = load_value(from + j + D / 2);
    query.set(j, a * cosine - b * sine);
    query.set(j + D / 2, b * cosine + a * sine);
  }
  warp_barrier();

  const int begin = load_value(walk.cu_seqlens_k + own.sequence);
  const int end = load_value(walk.cu_seqlens_k + own.sequence + 1);
  float out[kSlots] = {}, maximum = -kInfinity, sum = 0.0f;
  for (int first = begin; first < end; first += kWarpSize) {
    const int count = end - first < kWarpSize ? end - first : kWarpSize;
    const float score = lane < count ? dot(query, floats(walk.k, first + lane, head), D) * walk.scale : -kInfinity;
    const float most = Max::of(maximum, warp_reduce<Max>(score)), shrink = expf(maximum - most);
    const float p = expf(score - most);
    maximum = most;
    sum = fmaf(sum, shrink, warp_sum(p));
#pragma unroll
    for (int i = 0; i < kSlots; ++i) out[i] *= shrink;
    add_rows(out, p, walk.v, first, count, head, D);
  }
  float* to = walk.out + own.row * walk.out_row + head * walk.out_head;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (i * kWarpSize + lane < D) store_value(to + i * kWarpSize + lane, sum > 0 ? out[i] / sum : 0.0f);
  if (lane == 0) store_value(walk.lse + head * walk.Nq + own.row, sum > 0 ? maximum + logf(sum) : -kInfinity);
}

}  // namespace hk
