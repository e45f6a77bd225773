// patch_embed kernels: normalising cut patches, and cutting frames. The product with the weight is cuBLAS's.
//
// A thread makes one pack of a patch, kN values that follow each other in (channel, y, x) order. u8 pixels become
// values through a table in shared memory, made per block with the reference's roundings: two IEEE divisions a
// pixel would cost as many instructions as a pixel's 3 bytes allow at copy bandwidth (28 on an H100). Cutting
// reads single pixels C apart, all of whose neighbours other threads of the warp read: L1 serves them, about 6
// wavefronts per 32 values, on a par with the time to write the values.
#pragma once

#include "device/reduce.cuh"
#include "device/shared.cuh"
#include "device/vec.cuh"
#include "ops/patch_embed/patch_embed.h"

namespace hk {

constexpr int kPatchThreads = 256;

// values[channel] by selection: indexed by a variable, a kernel argument would move to local memory.
__device__ __forceinline__ float of_channel(const float (&values)[kMaxChannels], int channel) {
  float x = values[0];
#pragma unroll
  for (int c = 1; c < kMaxChannels; ++c) x = channel == c ? values[c] : x;
  return x;
}

__device__ __forceinline__ float normalised(const PixelNorm& norm, int channel, float unit) {
  if (norm.raw) return unit * 255.0f;
  return div_rn(sub_rn(unit, of_channel(norm.mean, channel)), of_channel(norm.std_dev, channel));
}

// [channels][256] results, by the whole block.
__device__ __forceinline__ void fill_table(const Shared<float>& table, const PixelNorm& norm) {
  for (int i = threadIdx.x; i < norm.channels * 256; i += kPatchThreads) {
    const float u = static_cast<float>(i % 256);
    table.set(i, norm.raw ? u : normalised(norm, i / 256, div_rn(u, 255.0f)));
  }
  block_barrier();
}

struct NormalizeWalk {
  const uint8_t* patches;
  unsigned char* out;
  int64_t patch_row, out_row;  // bytes
  int64_t N;
  int32_t plane, length;  // values of a channel, of a patch
  PixelNorm norm;
};

template <int kDtype, int kN>
__global__ void __launch_bounds__(kPatchThreads) patch_embed_normalize_rows(const NormalizeWalk walk) {
  constexpr int kBytes = kN * kElementBytes<kDtype>;
  __shared__ SharedArray<float, kMaxChannels * 256> array;
  const Shared<float> table = array.view();
  fill_table(table, walk.norm);
  const int packs = walk.length / kN;
  for (int64_t n = blockIdx.x; n < walk.N; n += gridDim.x)
    for (int i = threadIdx.x; i < packs; i += kPatchThreads) {
      float v[kN];
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const int e = i * kN + k;
        v[k] = table.get(e / walk.plane * 256 + load_value(walk.patches + n * walk.patch_row + e));
      }
      store_pack<kBytes>(walk.out + n * walk.out_row + i * kBytes, pack_floats<kDtype, kBytes>(v));
    }
}

struct CutWalk {
  const void* frames;
  unsigned char* out;
  int64_t stride_t, stride_y, out_row;  // elements, elements, bytes
  int64_t N;
  int32_t C, P, M, rows_y, cells_x;  // rows of patches, cells a row
  int32_t length;                    // values of a patch
  PixelNorm norm;
};

// In is uint8_t or int16_t.
template <class In, int kDtype, int kN>
__global__ void __launch_bounds__(kPatchThreads) patch_embed_cut_patches(const CutWalk walk) {
  constexpr int kBytes = kN * kElementBytes<kDtype>;
  __shared__ SharedArray<float, kMaxChannels * 256> array;
  const Shared<float> table = array.view();
  if (sizeof(In) == 1) fill_table(table, walk.norm);
  const int P = walk.P, M = walk.M, packs = walk.length / kN;
  const float width = static_cast<float>(walk.norm.hi - walk.norm.lo);
  for (int64_t n = blockIdx.x; n < walk.N; n += gridDim.x) {
    // Merge-block order: (t, cell y, cell x, y in the cell, x in the cell).
    const int within = static_cast<int>(n % (M * M));
    const int64_t cell = n / (M * M), row = cell / walk.cells_x, rows = walk.rows_y / M;
    const int64_t t = row / rows, y = (row % rows * M + within / M) * P, x = (cell % walk.cells_x * M + within % M) * P;
    const In* patch = static_cast<const In*>(walk.frames) + t * walk.stride_t + y * walk.stride_y + x * walk.C;
    for (int i = threadIdx.x; i < packs; i += kPatchThreads) {
      int channel = i * kN / (P * P), py = i * kN / P % P, px = i * kN % P;
      float v[kN];
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const int pixel = load_value(patch + py * walk.stride_y + px * walk.C + (walk.C == 1 ? 0 : channel));
        if constexpr (sizeof(In) == 1) {
          v[k] = table.get(channel * 256 + pixel);
        } else {
          const int lo = walk.norm.lo, hi = walk.norm.hi, clamped = pixel < lo ? lo : pixel > hi ? hi : pixel;
          v[k] = normalised(walk.norm, channel, div_rn(static_cast<float>(clamped - lo), width));
        }
        if (++px == P) {
          px = 0;
          if (++py == P) {
            py = 0;
            ++channel;
          }
        }
      }
      store_pack<kBytes>(walk.out + n * walk.out_row + i * kBytes, pack_floats<kDtype, kBytes>(v));
    }
  }
}

}  // namespace hk
