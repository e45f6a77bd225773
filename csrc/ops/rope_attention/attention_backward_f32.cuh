// rope_attention backward for fp32 inputs; how is told at the head of rows_f32.cuh.
#pragma once

#include "ops/rope_attention/rows_f32.cuh"

namespace hk {

struct AttentionBackwardF32Walk {
  HeadRows a, b, x, y;  // as in attention_backward.cuh
  float *grad_a, *grad_b;
  int64_t grad_a_row, grad_a_head, grad_b_row, grad_b_head;  // elements
  const float *lse, *delta;
  const int32_t *positions, *cu_seqlens, *cu_seqlens_other;
  int64_t Nq;
  int32_t S, D;
  float scale;
  Rope rope;
};

template <bool kOwnKeys>
__global__ void __launch_bounds__(kAttentionThreads) attention_backward_f32(const AttentionBackwardF32Walk walk) {
  __shared__ SharedArray<float, 2 * kAttentionWarps * kMaxD> array;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, head = blockIdx.y, D = walk.D;
  const Shared<float> a = array.view().part(2 * warp * kMaxD, kMaxD);
  const Shared<float> b = array.view().part((2 * warp + 1) * kMaxD, kMaxD);
  const WarpRow own = find_row(walk.cu_seqlens, walk.S);
  if (!own.any) return;
  for (int d = lane; d < D; d += kWarpSize) {
    a.set(d, load_value(floats(walk.a, own.row, head) + d));
    b.set(d, load_value(floats(walk.b, own.row, head) + d));
  }
  warp_barrier();
  const float *lse = walk.lse + head * walk.Nq, *delta = walk.delta + head * walk.Nq;
  const int begin = load_value(walk.cu_seqlens_other + own.sequence);
  const int end = load_value(walk.cu_seqlens_other + own.sequence + 1);
  float grad_a[kSlots] = {}, grad_b[kSlots] = {};
  for (int first = begin; first < end; first += kWarpSize) {
    const int count = end - first < kWarpSize ? end - first : kWarpSize, other = first + lane;
    float p = 0.0f, ds = 0.0f;
    if (lane < count) {
      const int query = kOwnKeys ? other : own.row;
      p = expf(dot(a, floats(walk.x, other, head), D) * walk.scale - load_value(lse + query));
      ds = p * (dot(b, floats(walk.y, other, head), D) - load_value(delta + query)) * walk.scale;
    }
    add_rows(grad_a, ds, walk.x, first, count, head, D);
    if (kOwnKeys) add_rows(grad_b, p, walk.y, first, count, head, D);
  }
  warp_barrier();  // `a` is free: grad_a passes through it to meet its other half
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int d = i * kWarpSize + lane;
    if (d >= D) continue;
    a.set(d, grad_a[i]);
    if (kOwnKeys) store_value(walk.grad_b + own.row * walk.grad_b_row + head * walk.grad_b_head + d, grad_b[i]);
  }
  warp_barrier();
  float* to = walk.grad_a + own.row * walk.grad_a_row + head * walk.grad_a_head;
  for (int j = lane; j < D / 2; j += kWarpSize) {
    float sine, cosine;
    sine_cosine(rope_angle(walk.rope, walk.positions, own.row, j), &sine, &cosine);
    const float low = a.get(j), high = a.get(j + D / 2);
    store_value(to + j, low * cosine + high * sine);
    store_value(to + j + D / 2, high * cosine - low * sine);
  }
}

}  // namespace hk
