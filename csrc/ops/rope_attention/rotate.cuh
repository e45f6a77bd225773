// rope_attention_rotate: the rotary alone. Also the first launch of attention, which then reads keys that are
// rotated already: a key is read by every tile of queries, so turning it there would repeat the sines and
// roundings up to 32 times; here it costs one more pass over K, 2 x 9.4 MB at 4096 x 16 x 72, about 6 us.
//
// A block owns kRotateRows rows. It computes their sines once for all heads, then moves 4 values of either
// half per thread: neighbouring threads take neighbouring packs of a head.
#pragma once

#include "device/reduce.cuh"
#include "device/rotate.cuh"
#include "device/shared.cuh"
#include "ops/rope_attention/rope_attention.h"

namespace hk {

constexpr int kRotateRows = 4, kRotateThreads = 128;
constexpr int kMaxPairs = 64;  // D <= 128

struct RotateWalk {
  const unsigned char* x;
  unsigned char* out;
  int64_t x_row, x_head, out_row, out_head;  // bytes
  const int32_t* positions;
  int32_t N, A, inverse;
  Rope rope;
};

// The angle of pair j of a row at `positions`; the same float everywhere.
__device__ __forceinline__ float rope_angle(const Rope& rope, const int32_t* positions, int64_t row, int j) {
  return static_cast<float>(load_value(positions + row * rope.axes + rope.axis[j])) * rope.frequency[j];
}

template <int kDtype>
__global__ void __launch_bounds__(kRotateThreads) rotate_rows(const RotateWalk walk) {
  constexpr int kBytes = 4 * kElementBytes<kDtype>;
  __shared__ SharedArray<float2, kRotateRows * kMaxPairs> array;
  const Shared<float2> turns = array.view();  // cosine, sine
  const int pairs = walk.rope.pairs, first = blockIdx.x * kRotateRows;
  const int rows = walk.N - first < kRotateRows ? walk.N - first : kRotateRows;

  for (int i = threadIdx.x; i < rows * pairs; i += kRotateThreads) {
    float2 turn;
    sine_cosine(rope_angle(walk.rope, walk.positions, first + i / pairs, i % pairs), &turn.y, &turn.x);
    if (walk.inverse) turn.y = -turn.y;
    turns.set(i, turn);
  }
  block_barrier();

  const int chunks = pairs / 4, per_row = walk.A * chunks;
  for (int i = threadIdx.x; i < rows * per_row; i += kRotateThreads) {
    const int row = i / per_row, head = i % per_row / chunks, chunk = i % chunks;
    const unsigned char* from = walk.x + (first + row) * walk.x_row + head * walk.x_head + chunk * kBytes;
    unsigned char* to = walk.out + (first + row) * walk.out_row + head * walk.out_head + chunk * kBytes;
    const int half = pairs * kElementBytes<kDtype>;
    float a[4], b[4], c[4], d[4];
    unpack<kDtype, kBytes>(a, load_pack<kBytes>(from));
    unpack<kDtype, kBytes>(b, load_pack<kBytes>(from + half));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 turn = turns.get(row * pairs + 4 * chunk + k);
      c[k] = a[k] * turn.x - b[k] * turn.y;
      d[k] = b[k] * turn.x + a[k] * turn.y;
    }
    store_pack<kBytes>(to, pack_floats<kDtype, kBytes>(c));
    store_pack<kBytes>(to + half, pack_floats<kDtype, kBytes>(d));
  }
}

}  // namespace hk
