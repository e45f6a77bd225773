// rope_attention, shared by the CPU and CUDA sides: the arguments of a call. Strides count elements.
#pragma once

#include <stdint.h>

#include "cpu/level.h"
#include "hulukern/hulukern.h"

namespace hk {

constexpr int kMaxHeadDim = 256;

// Pair j turns by positions[axis[j]] * frequency[j] and joins dimensions j and j + pairs.
struct Rope {
  float frequency[kMaxHeadDim / 2];
  uint8_t axis[kMaxHeadDim / 2];
  int32_t pairs, axes;
};

// [N, A, D], inner stride 1.
struct Heads {
  void* data;
  int64_t row, head;
};

struct RopeAttentionArgs {
  Heads q, k, v, out;
  const int32_t *positions_q, *positions_k;    // [N, axes], rows contiguous
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [S+1]
  float* lse;                                  // [A, Nq]
  int32_t dtype, D;
  int64_t Nq, Nk, A, S;
  Rope rope;
  float scale;
  int32_t num_threads;
  void* k_rotated;  // CUDA: [Nk, A, D] dense scratch
};

struct RopeAttentionBackwardArgs {
  RopeAttentionArgs forward;  // out and lse are read
  Heads grad, grad_q, grad_k, grad_v;
  float* delta;     // [A, Nq]
  void* q_rotated;  // CUDA: [Nq, A, D] dense scratch
};

struct RopeAttentionRotateArgs {
  Heads x, out;
  const int32_t* positions;
  int32_t dtype, D, inverse;
  int64_t N, A;
  Rope rope;
  int32_t num_threads;
};

}  // namespace hk

HK_DECLARE_CPU_PRODUCTS(rope_attention, hk::RopeAttentionArgs)
HK_DECLARE_CPU_PRODUCTS(rope_attention_backward, hk::RopeAttentionBackwardArgs)
HK_DECLARE_CPU(rope_attention_rotate, hk::RopeAttentionRotateArgs)
HK_DECLARE_CUDA(rope_attention, hk::RopeAttentionArgs)
HK_DECLARE_CUDA(rope_attention_backward, hk::RopeAttentionBackwardArgs)
HK_DECLARE_CUDA(rope_attention_rotate, hk::RopeAttentionRotateArgs)
