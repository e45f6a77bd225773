// rope_attention forward for fp32 inputs; how is told at the head of rows_f32.cuh.
#pragma once

#include "ops/rope_attention/rows_f32.cuh"

namespace hk {

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
  // 0 without keys; a NaN must stay one.
  float* to = walk.out + own.row * walk.out_row + head * walk.out_head;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (i * kWarpSize + lane < D) store_value(to + i * kWarpSize + lane, sum == 0 ? 0.0f : out[i] / sum);
  if (lane == 0) store_value(walk.lse + head * walk.Nq + own.row, sum == 0 ? -kInfinity : maximum + logf(sum));
}

}  // namespace hk
