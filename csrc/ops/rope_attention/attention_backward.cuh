// rope_attention backward for 16-bit inputs, deterministic: one launch per row's delta, one in which blocks own
// queries (grad_q), one in which blocks own keys (grad_k, grad_v). Nothing is added across blocks.
//
// Both are the same kernel. A block of 4 warps owns 64 rows of a pair (a, b), a warp 16 of them, and walks over
// rows of the other pair (x, y), (q, grad) against (k, v) or the other way round:
//   s = a . x    d = b . y    p = exp(s * scale - lse)    ds = p * (d - delta) * scale
//   grad_a += ds x,  and where keys are owned  grad_b += p y
// so scores of the key side come out transposed and no operand has to be turned. q and k come rotated; grad_a is
// turned back in fp32 before it is rounded.
// Work: 5 products for grad_k and grad_v of which 2 (s, d) are done again for grad_q: 7 against the 5 that one
// pass with atomic adds would need, the price of the same bits at every call.
#pragma once

#include "ops/rope_attention/rotate.cuh"
#include "ops/rope_attention/tiles.cuh"

namespace hk {

struct AttentionBackwardWalk {
  HeadRows a, b, x, y;  // of the owned and the other side
  unsigned char *grad_a, *grad_b;
  int64_t grad_a_row, grad_a_head, grad_b_row, grad_b_head;  // bytes
  const float *lse, *delta;                                  // [A, Nq]
  const int32_t *positions, *cu_seqlens, *cu_seqlens_other;  // positions of the owned side
  int64_t Nq;
  int32_t S;
  float scale;
  Rope rope;
};

constexpr int kOwnedRows = 16 * kAttentionWarps;
// Rows a step: sums of two products of that many columns share the registers with two of D.
template <int kD>
constexpr int kBackwardStep = kD <= 80 ? 64 : 32;
// Whether operands of the owned rows stay in registers or are read again at each step.
template <int kD>
constexpr bool kResident = kD <= 96;
// Owned tiles a, b; two stages of x, y; and lse, delta of each stage.
template <int kD>
constexpr int kBackwardSharedBytes =
    (2 * kOwnedRows + 4 * kBackwardStep<kD>)*kTileStride<kD> * 2 + 4 * kBackwardStep<kD> * 4;

// Results of 16 rows in fp32, turned back by the rows' angles and rounded. `tile` is the warp's own.
template <int kDtype, int kD>
__device__ __forceinline__ void store_turned_back(const Shared<float>& tile, const float (&sums)[kD / 8][4],
                                                  const AttentionBackwardWalk& walk, int first, int count, int head) {
  constexpr int kStride = kD + 4, kChunks = kD / 8;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
    const int at = g * kStride + 8 * j + 2 * t;
    tile.template set_pack<8>(at, {{bits_of_f32(sums[j][0]), bits_of_f32(sums[j][1])}});
    tile.template set_pack<8>(at + 8 * kStride, {{bits_of_f32(sums[j][2]), bits_of_f32(sums[j][3])}});
  }
  warp_barrier();
  for (int i = lane; i < count * kChunks; i += kWarpSize) {
    const int row = i / kChunks, chunk = i % kChunks;
    float a[4], b[4], c[4], d[4];
    unpack<HK_F32, 16>(a, tile.template get_pack<16>(row * kStride + 4 * chunk));
    unpack<HK_F32, 16>(b, tile.template get_pack<16>(row * kStride + 4 * chunk + kD / 2));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float sine, cosine;
      sine_cosine(rope_angle(walk.rope, walk.positions, first + row, 4 * chunk + k), &sine, &cosine);
      c[k] = a[k] * cosine + b[k] * sine;
      d[k] = b[k] * cosine - a[k] * sine;
    }
    unsigned char* to = walk.grad_a + (first + row) * walk.grad_a_row + head * walk.grad_a_head + 8 * chunk;
    store_pack<8>(to, pack_floats<kDtype, 8>(c));
    store_pack<8>(to + kD, pack_floats<kDtype, 8>(d));
  }
}

template <int kDtype, int kD, bool kOwnKeys>
__global__ void __launch_bounds__(kAttentionThreads) attention_backward(const AttentionBackwardWalk walk) {
  constexpr int kStep = kBackwardStep<kD>, kColumns = kStep / 8, kStride = kTileStride<kD>;
  constexpr int kOwn = kOwnedRows * kStride, kOther = kStep * kStride;  // values of a tile
  const Tile tile = find_tile(walk.cu_seqlens, walk.S, kOwnedRows, blockIdx.x);
  if (tile.rows <= 0) return;
  const int head = blockIdx.y, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4,
            t = lane % 4;
  const int begin = load_value(walk.cu_seqlens_other + tile.sequence);
  const int others = load_value(walk.cu_seqlens_other + tile.sequence + 1) - begin;
  const int steps = (others + kStep - 1) / kStep;
  const Shared<uint16_t> shared = dynamic_shared<uint16_t>(0, 2 * kOwn + 4 * kOther);
  const Shared<float> statistics = dynamic_shared<float>((2 * kOwn + 4 * kOther) * 2, 4 * kStep);
  const Shared<uint16_t> own_a = shared.part(0, kOwn), own_b = shared.part(kOwn, kOwn);
  const float* lse = walk.lse + head * walk.Nq;
  const float* delta = walk.delta + head * walk.Nq;
  const float c = walk.scale * 1.44269504f;

  const auto copy_step = [&](int step) {
    const int first = step * kStep, at = 2 * kOwn + step % 2 * 2 * kOther;
    copy_tile_async<kD, kStep>(shared.part(at, kOther), walk.x, begin + first, others - first, head);
    copy_tile_async<kD, kStep>(shared.part(at + kOther, kOther), walk.y, begin + first, others - first, head);
    commit_async();
    if (kOwnKeys) {  // a query past the end has no probability
      for (int i = threadIdx.x; i < kStep; i += kAttentionThreads) {
        const bool any = first + i < others;
        statistics.set(step % 2 * 2 * kStep + i, any ? load_value(lse + begin + first + i) * 1.44269504f : kInfinity);
        statistics.set(step % 2 * 2 * kStep + kStep + i, any ? load_value(delta + begin + first + i) : 0.0f);
      }
    }
  };
  copy_tile_async<kD, kOwnedRows>(own_a, walk.a, tile.first, tile.rows, head);
  copy_tile_async<kD, kOwnedRows>(own_b, walk.b, tile.first, tile.rows, head);
  commit_async();
  if (steps > 0) copy_step(0);

  float row_lse[2], row_delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + g + 8 * h;
    const bool any = !kOwnKeys && row < tile.rows;
    row_lse[h] = any ? load_value(lse + tile.first + row) * 1.44269504f : kInfinity;
    row_delta[h] = any ? load_value(delta + tile.first + row) : 0.0f;
  }

  RowFragments<kD> a[1], b[1];
  float grad_a[1][kD / 8][4] = {}, grad_b[1][kD / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_async<0>();
    block_barrier();  // this stage has come, and everyone is done with the other
    if (step + 1 < steps) copy_step(step + 1);
    const int left = others - step * kStep, at = 2 * kOwn + step % 2 * 2 * kOther;
    const Shared<uint16_t> x = shared.part(at, kOther), y = shared.part(at + kOther, kOther);
    const Shared<float> of = statistics.part(step % 2 * 2 * kStep, 2 * kStep);

    float p[1][kColumns][4] = {}, d[1][kColumns][4] = {};
    if (!kResident<kD> || step == 0) a[0].load(own_a, 16 * warp);
    multiply_rows<kDtype, kD>(p, a, x);
    if (!kResident<kD> || step == 0) b[0].load(own_b, 16 * warp);
    multiply_rows<kDtype, kD>(d, b, y);
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * j + 2 * t + e % 2;
        const float of_lse = kOwnKeys ? of.get(column) : row_lse[e / 2];
        const float of_delta = kOwnKeys ? of.get(kStep + column) : row_delta[e / 2];
        const float probability = kOwnKeys || column < left ? exp2_fast(fmaf(p[0][j][e], c, -of_lse)) : 0.0f;
        d[0][j][e] = probability * (d[0][j][e] - of_delta) * walk.scale;
        p[0][j][e] = probability;
      }
    uint32_t operand[1][kColumns / 2][4];
    if (kOwnKeys) {
#pragma unroll
      for (int s = 0; s < kColumns / 2; ++s) pack_operand<kDtype>(operand[0][s], p[0][2 * s], p[0][2 * s + 1]);
      multiply_columns<kDtype, kD>(grad_b, operand, y);
    }
#pragma unroll
    for (int s = 0; s < kColumns / 2; ++s) pack_operand<kDtype>(operand[0][s], d[0][2 * s], d[0][2 * s + 1]);
    multiply_columns<kDtype, kD>(grad_a, operand, x);
  }
  wait_async<0>();
  block_barrier();  // the tiles are free: rows leave through them

  const int row = 16 * warp, count = tile.rows - row < 16 ? tile.rows - row : 16;
  constexpr int kWarpFloats = 16 * (kD + 4);
  store_turned_back<kDtype, kD>(dynamic_shared<float>(warp * kWarpFloats * 4, kWarpFloats), grad_a[0], walk,
                                tile.first + row, count, head);
  if constexpr (kOwnKeys) {
    warp_barrier();
    const Shared<uint16_t> rows = dynamic_shared<uint16_t>(warp * kWarpFloats * 4, 16 * kStride);
    put_rows<kDtype, kD>(rows, 0, grad_b[0], 1.0f, 1.0f);
    warp_barrier();
    store_rows<kD>(rows, 0, count, walk.grad_b + (tile.first + row) * walk.grad_b_row + head * walk.grad_b_head,
                   walk.grad_b_row);
  }
}

// delta[a, n] = sum over D of grad * out: a thread per row of a head, neighbours take neighbouring heads.
struct DeltaWalk {
  HeadRows grad, out;
  float* delta;
  int64_t Nq;
  int32_t A, D;
};

template <int kDtype>
__global__ void __launch_bounds__(kAttentionThreads) attention_delta(const DeltaWalk walk) {
  constexpr int kN = kPackElements<kDtype, 16>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (i >= walk.Nq * walk.A) return;
  const int64_t n = i / walk.A, head = i % walk.A;
  const unsigned char *grad = walk.grad.at(n, head), *out = walk.out.at(n, head);
  float sum = 0.0f, a[kN], b[kN];
  for (int at = 0; at < walk.D; at += kN) {
    unpack<kDtype, 16>(a, load_pack<16>(grad + at * kElementBytes<kDtype>));
    unpack<kDtype, 16>(b, load_pack<16>(out + at * kElementBytes<kDtype>));
#pragma unroll
    for (int k = 0; k < kN; ++k) sum = fmaf(a[k], b[k], sum);
  }
  store_value(walk.delta + head * walk.Nq + n, sum);
}

}  // namespace hk
