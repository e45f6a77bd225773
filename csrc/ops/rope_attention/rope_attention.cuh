// rope_attention forward for 16-bit inputs: a block of 4 warps owns 64 * kRowTiles queries of one head and walks
// over the keys of their sequence, 64 a step, through two stages of shared memory that cp.async fills.
//
// A warp owns 16 * kRowTiles rows: scores, softmax and output stay in its registers, so warps meet only where
// a stage changes. Queries are rotated in fp32 as they are loaded; keys come rotated (rotate.cuh).
// Work: per 16 x 8 results of QK^T at D = 72, 4 products of k = 16 and 1 of k = 8, and PV is 9 wide:
// 64 * 64 * 72 * 2 * 2 FLOPs a step and none for padding. Two row tiles halve the reads of K and V from shared
// memory, which at one row tile would take as long as the products (256 bytes for 2048 multiply-adds).
#pragma once

#include "ops/rope_attention/rotate.cuh"
#include "ops/rope_attention/tiles.cuh"

namespace hk {

struct AttentionWalk {
  HeadRows q, k, v;  // k rotated
  unsigned char* out;
  int64_t out_row, out_head;  // bytes
  float* lse;                 // [A, Nq]
  const int32_t *positions_q, *cu_seqlens_q, *cu_seqlens_k;
  int64_t Nq;
  int32_t S;
  float scale;
  Rope rope;
};

// Rows beyond the accumulators' registers would spill: two row tiles up to D = 72 (at 80 sm_100 spills a register).
template <int kD>
constexpr int kRowTilesOf = kD <= 72 ? 2 : 1;
template <int kD>
constexpr int kQueryRows = 16 * kAttentionWarps * kRowTilesOf<kD>;
// Stage s: K, V of 64 rows each. The queries pass through stage 1, of 128 rows, before keys do.
template <int kD>
constexpr int kAttentionSharedBytes = 4 * kTileBytes<kD>;

// kRows rotated rows of queries into a tile; rows from `rows` on become zeros.
template <int kDtype, int kD, int kRows>
__device__ __forceinline__ void load_rotated(const Shared<uint16_t>& tile, const AttentionWalk& walk, int first,
                                             int rows, int head) {
  constexpr int kChunks = kD / 8;  // of 4 pairs
  for (int i = threadIdx.x; i < kRows * kChunks; i += kAttentionThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    Pack<8> low = zero_pack<8>(), high = zero_pack<8>();
    if (row < rows) {
      const unsigned char* from = walk.q.at(first + row, head) + 8 * chunk;
      float a[4], b[4], c[4], d[4];
      unpack<kDtype, 8>(a, load_pack<8>(from));
      unpack<kDtype, 8>(b, load_pack<8>(from + kD));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float sine, cosine;
        sine_cosine(rope_angle(walk.rope, walk.positions_q, first + row, 4 * chunk + k), &sine, &cosine);
        c[k] = a[k] * cosine - b[k] * sine;
        d[k] = b[k] * cosine + a[k] * sine;
      }
      low = pack_floats<kDtype, 8>(c);
      high = pack_floats<kDtype, 8>(d);
    }
    tile.set_pack<8>(row * kTileStride<kD> + 4 * chunk, low);
    tile.set_pack<8>(row * kTileStride<kD> + 4 * chunk + kD / 2, high);
  }
}

// One step of the online softmax on scores of 16 rows: scores become probabilities against the new maximum,
// `out` and `sum` are brought to it. [0] is row g, [1] row g + 8; `c` is scale * log2(e).
template <int kColumns, int kOut>
__device__ __forceinline__ void softmax_step(float (&scores)[kColumns][4], float (&out)[kOut][4], float (&maximum)[2],
                                             float (&sum)[2], float c) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = maximum[h];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) most = Max::of(most, Max::of(scores[j][2 * h], scores[j][2 * h + 1]));
    most = warp_reduce<Max, 4>(most);
    const float shrink = exp2_fast((maximum[h] - most) * c);
    maximum[h] = most;
    sum[h] *= shrink;
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        scores[j][e] = exp2_fast(fmaf(scores[j][e], c, -most * c));
        sum[h] += scores[j][e];
      }
#pragma unroll
    for (int j = 0; j < kOut; ++j) {
      out[j][2 * h] *= shrink;
      out[j][2 * h + 1] *= shrink;
    }
  }
}

template <int kDtype, int kD>
__global__ void __launch_bounds__(kAttentionThreads) attention_forward(const AttentionWalk walk) {
  constexpr int kRowTiles = kRowTilesOf<kD>, kRows = kQueryRows<kD>, kColumns = kKeyRows / 8;
  constexpr int kTile = kTileBytes<kD> / 2;  // values
  const Tile tile = find_tile(walk.cu_seqlens_q, walk.S, kRows, blockIdx.x);
  if (tile.rows <= 0) return;
  const int head = blockIdx.y, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, t = lane % 4;
  const int key_begin = load_value(walk.cu_seqlens_k + tile.sequence);
  const int keys = load_value(walk.cu_seqlens_k + tile.sequence + 1) - key_begin;
  const int steps = (keys + kKeyRows - 1) / kKeyRows;
  const Shared<uint16_t> shared = dynamic_shared<uint16_t>(0, 4 * kTile);

  const auto copy_step = [&](int step) {
    const int first = step * kKeyRows, stage = step % 2 * 2 * kTile;
    copy_tile_async<kD, kKeyRows>(shared.part(stage, kTile), walk.k, key_begin + first, keys - first, head);
    copy_tile_async<kD, kKeyRows>(shared.part(stage + kTile, kTile), walk.v, key_begin + first, keys - first, head);
    commit_async();
  };
  if (steps > 0) copy_step(0);

  const Shared<uint16_t> queries = shared.part(2 * kTile, 2 * kTile);
  load_rotated<kDtype, kD, kRows>(queries, walk, tile.first, tile.rows, head);
  block_barrier();
  RowFragments<kD> q[kRowTiles];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) q[i].load(queries, (warp * kRowTiles + i) * 16);

  float out[kRowTiles][kD / 8][4] = {}, maximum[kRowTiles][2], sum[kRowTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) maximum[i][0] = maximum[i][1] = -kInfinity;
  const float c = walk.scale * 1.44269504f;

  for (int step = 0; step < steps; ++step) {
    wait_async<0>();
    block_barrier();  // this stage has come, and everyone is done with the other
    if (step + 1 < steps) copy_step(step + 1);
    const int stage = step % 2 * 2 * kTile, left = keys - step * kKeyRows;

    float scores[kRowTiles][kColumns][4] = {};
    multiply_rows<kDtype, kD>(scores, q, shared.part(stage, kTile));
    if (left < kKeyRows) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (8 * j + 2 * t + e % 2 >= left) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) scores[i][j][e] = -kInfinity;
          }
    }
    uint32_t p[kRowTiles][kColumns / 2][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      softmax_step(scores[i], out[i], maximum[i], sum[i], c);
#pragma unroll
      for (int s = 0; s < kColumns / 2; ++s) pack_operand<kDtype>(p[i][s], scores[i][2 * s], scores[i][2 * s + 1]);
    }
    multiply_columns<kDtype, kD>(out, p, shared.part(stage + kTile, kTile));
  }

  block_barrier();  // the tiles are free: rows leave through them
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int row = (warp * kRowTiles + i) * 16;
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = warp_reduce<Add, 4>(sum[i][h]);
      inverse[h] = total == 0 ? 0.0f : reciprocal_fast(total);  // 0 without keys; a NaN must stay one
      const int of = row + lane / 4 + 8 * h;
      if (t == 0 && of < tile.rows)
        store_value(walk.lse + head * walk.Nq + tile.first + of,
                    total == 0 ? -kInfinity : fmaf(maximum[i][h], walk.scale, log2_fast(total) * 0.693147181f));
    }
    put_rows<kDtype, kD>(shared, row, out[i], inverse[0], inverse[1]);
    warp_barrier();
    const int count = tile.rows - row < 16 ? tile.rows - row : 16;
    store_rows<kD>(shared, row, count, walk.out + (tile.first + row) * walk.out_row + head * walk.out_head,
                   walk.out_row);
  }
}

}  // namespace hk
