// Tiles of [rows, D] 16-bit values in shared memory and their products, for attention forward and backward.
// Rows are kTileStride<D> values apart (device/mma.cuh), so that every ldmatrix is free of bank conflicts.
#pragma once

#include "device/async.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/varlen.cuh"
#include "ops/rope_attention/rope_attention.h"

namespace hk {

constexpr int kAttentionThreads = 128, kAttentionWarps = 4;
constexpr int kKeyRows = 64;  // keys a step

template <int kD>
constexpr int kTileBytes = kKeyRows * kTileStride<kD> * 2;  // of one tile of 64 rows

// One tensor's rows of one head, in bytes.
struct HeadRows {
  const unsigned char* data;
  int64_t row, head;

  __device__ __forceinline__ const unsigned char* at(int64_t n, int64_t a) const { return data + n * row + a * head; }
};

// Starts copying rows first .. first + kRows of a head; rows from `rows` on become zeros. Neighbouring threads
// take neighbouring 16-byte units.
template <int kD, int kRows>
__device__ __forceinline__ void copy_tile_async(const Shared<uint16_t>& tile, const HeadRows& from, int first, int rows,
                                                int head) {
  constexpr int kUnits = kD / 8;
  for (int i = threadIdx.x; i < kRows * kUnits; i += kAttentionThreads) {
    const int row = i / kUnits, unit = i % kUnits;
    copy_async_16(tile, row * kTileStride<kD> + 8 * unit, from.at(first + row, head) + 16 * unit, row < rows);
  }
}

// A operands over all of D: 16 rows from row `row` of a tile. D = 72 is 4 of k = 16 and 1 of k = 8.
template <int kD>
struct RowFragments {
  static constexpr int kK16 = kD / 16, kK8 = kD % 16 / 8;
  uint32_t k16[kK16][4];
  uint32_t k8[kK8 > 0 ? 1 : 1][2];

  __device__ __forceinline__ void load(const Shared<uint16_t>& tile, int row) {
    const int lane = threadIdx.x % kWarpSize;
    const int at = (row + lane % 16) * kTileStride<kD>;
#pragma unroll
    for (int k = 0; k < kK16; ++k) load_matrices<4>(k16[k], tile, at + 16 * k + lane / 16 * 8);
    if constexpr (kK8 > 0) load_matrices<2>(k8[0], tile, at + 16 * kK16);
  }
};

// sums[i][j] += A_i . (rows 8 j .. of the tile), over D: the product with a transposed tile. kRowTiles tiles of
// 16 rows share each load of the right operand.
template <int kDtype, int kD, int kRowTiles, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRowTiles][kColumns][4],
                                              const RowFragments<kD> (&a)[kRowTiles], const Shared<uint16_t>& tile) {
  static_assert(kColumns % 4 == 0, "four matrices a load");
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < kColumns; j += 2) {
    const int at = (8 * j + lane / 16 * 8 + lane % 8) * kTileStride<kD> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t b[4];  // columns j: k 0..7, k 8..15; columns j + 1: the same
      load_matrices<4>(b, tile, at + 16 * k);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_k16<kDtype>(sums[i][j], a[i].k16[k], b[0], b[1]);
        mma_k16<kDtype>(sums[i][j + 1], a[i].k16[k], b[2], b[3]);
      }
    }
  }
  if constexpr (kD % 16 != 0) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 4) {
      uint32_t b[4];  // columns j .. j + 3, the last 8 of D
      load_matrices<4>(b, tile, (8 * j + lane) * kTileStride<kD> + kD / 16 * 16);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) mma_k8<kDtype>(sums[i][j + c], a[i].k8[0], b[c]);
    }
  }
}

// sums[i][j] += P_i . (columns 8 j .. of the tile), over the tile's first 16 * kSteps rows. P_i comes as the
// packed results of an earlier product: p[i][s] is its A operand for rows 16 s .. 16 s + 15.
template <int kDtype, int kD, int kRowTiles, int kSteps>
__device__ __forceinline__ void multiply_columns(float (&sums)[kRowTiles][kD / 8][4],
                                                 const uint32_t (&p)[kRowTiles][kSteps][4],
                                                 const Shared<uint16_t>& tile) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int at = (16 * s + lane % 16) * kTileStride<kD>;
#pragma unroll
    for (int j = 0; j + 1 < kD / 8; j += 2) {
      uint32_t b[4];
      load_matrices_transposed<4>(b, tile, at + 8 * j + lane / 16 * 8);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_k16<kDtype>(sums[i][j], p[i][s], b[0], b[1]);
        mma_k16<kDtype>(sums[i][j + 1], p[i][s], b[2], b[3]);
      }
    }
    if constexpr (kD / 8 % 2 != 0) {
      uint32_t b[2];
      load_matrices_transposed<2>(b, tile, at + kD - 8);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) mma_k16<kDtype>(sums[i][kD / 8 - 1], p[i][s], b[0], b[1]);
    }
  }
}

// Two neighbouring results side by side are one A operand.
template <int kDtype>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<kDtype>(left[0], left[1]);
  a[1] = pack2<kDtype>(left[2], left[3]);
  a[2] = pack2<kDtype>(right[0], right[1]);
  a[3] = pack2<kDtype>(right[2], right[3]);
}

// Rows of a tile to global memory, by packs; a warp writes the rows that it wrote to the tile.
template <int kD>
__device__ __forceinline__ void store_rows(const Shared<uint16_t>& tile, int row, int count, unsigned char* to,
                                           int64_t to_row) {
  constexpr int kUnits = kD / 8;
  for (int i = threadIdx.x % kWarpSize; i < count * kUnits; i += kWarpSize)
    store_pack<16>(to + i / kUnits * to_row + i % kUnits * 16,
                   tile.get_pack<16>((row + i / kUnits) * kTileStride<kD> + i % kUnits * 8));
}

// One result of 16 rows into a tile, rounded to 16 bits and scaled per row: low rows g, high rows g + 8.
template <int kDtype, int kD>
__device__ __forceinline__ void put_rows(const Shared<uint16_t>& tile, int row, const float (&sums)[kD / 8][4],
                                         float low, float high) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kD / 8; ++j) {
    const int at = (row + g) * kTileStride<kD> + 8 * j + 2 * t;
    tile.set_pack<4>(at, {{pack2<kDtype>(sums[j][0] * low, sums[j][1] * low)}});
    tile.set_pack<4>(at + 8 * kTileStride<kD>, {{pack2<kDtype>(sums[j][2] * high, sums[j][3] * high)}});
  }
}

}  // namespace hk
