// token_score kernels: a block owns one cell and walks over its versions. Convention: strides are bytes,
// a "pack" is one load instruction, packs of a cell are numbered run after run.
//
// Cost: score_cells reads each pixel once (previous: once more the version before each chunk, mostly from
// L2) and writes 4 bytes per cell and version; about 1 integer instruction per 4 u8 or 4 per 2 i16 and
// window. So it should run at copy bandwidth: kDepth versions are in flight per block, 9 KB of a
// 28 x 28 x 3 u8 cell, and a multiprocessor needs about 20 KB in flight, two blocks.
// Cells of frames begin at any multiple of 4 bytes: 84-byte rows touch 1.3 times their bytes in L2 sectors.
#pragma once

#include "device/arith.cuh"
#include "device/reduce.cuh"
#include "device/shared.cuh"
#include "device/vec.cuh"
#include "ops/token_score/token_score.h"

namespace hk {

constexpr int kDepth = 4;  // versions loaded together
constexpr int kMaxScoreThreads = 256, kMaxScoreWarps = kMaxScoreThreads / kWarpSize;
// Packs a thread holds of one version: 64 bytes, or 8 loads. With kDepth versions and the reference that is
// about 130 registers, hence no more than 256 threads.
template <int kBytes>
constexpr int kThreadPacks = kBytes == 16 ? 4 : 8;

struct ScoreWalk {
  const unsigned char* data;
  int64_t stride_t, stride_y, stride_x, stride_run;
  int64_t T, cells, cells_x;
  int64_t chunk;     // versions per blockIdx.y
  int64_t previous;  // of the version before the first, if there is one
  int32_t has_previous;
  int32_t packs, packs_per_run;
  ScoreWindow windows[kMaxWindows];
  int32_t n_windows;
  float threshold;
  float* scores;  // [T, cells]
};

// How |a - b| of packed words adds up per dtype. Large is the sum over a cell of any size.
template <int kDtype>
struct FloatDiff {
  using Sum = float;
  using Large = float;
  static __device__ float add(float sum, uint32_t a, uint32_t b, const ScoreWindow&) {
    if constexpr (kDtype == HK_F32) {
      return sum + fabsf(f32_of_bits(a) - f32_of_bits(b));
    } else {
      const float2 x = kDtype == HK_BF16 ? bf16x2_to_float2(a) : f16x2_to_float2(a);
      const float2 y = kDtype == HK_BF16 ? bf16x2_to_float2(b) : f16x2_to_float2(b);
      return sum + fabsf(x.x - y.x) + fabsf(x.y - y.y);
    }
  }
};

template <int kDtype>
struct Diff : FloatDiff<kDtype> {};

template <>
struct Diff<HK_U8> {
  using Sum = uint32_t;
  using Large = uint64_t;
  static __device__ uint32_t add(uint32_t sum, uint32_t a, uint32_t b, const ScoreWindow&) {
    return add_abs_diff_u8x4(sum, a, b);
  }
};

template <>
struct Diff<HK_I16> {
  using Sum = uint32_t;
  using Large = uint64_t;
  static __device__ uint32_t add(uint32_t sum, uint32_t a, uint32_t b, const ScoreWindow& window) {
    const uint32_t lo = (static_cast<uint32_t>(window.lo) & 0xffffu) * 0x10001u;
    const uint32_t hi = (static_cast<uint32_t>(window.hi) & 0xffffu) * 0x10001u;
    return add_abs_diff_i16x2(sum, clamp_i16x2(a, lo, hi), clamp_i16x2(b, lo, hi));
  }
};

// sum + the differences of two packs. A pack adds at most 8 * 65535, a thread of score_cells less
// than 2^22 and a block less than 2^30: 32 bits hold any sum.
template <int kDtype, int kBytes>
__device__ __forceinline__ typename Diff<kDtype>::Sum add_pack(typename Diff<kDtype>::Sum sum, const Pack<kBytes>& a,
                                                               const Pack<kBytes>& b, const ScoreWindow& window) {
#pragma unroll
  for (int w = 0; w < Pack<kBytes>::kWords; ++w) sum = Diff<kDtype>::add(sum, a.words[w], b.words[w], window);
  return sum;
}

// The score from the warps' sums per window, in warp order, `first` being the first window's first.
// i16 takes the largest; others have one window.
template <int kDtype, class Sum>
__device__ __forceinline__ float score_of(const ScoreWalk& walk, const Shared<Sum>& partial, int first, int warps) {
  float score = 0;
  for (int w = 0; w < (kDtype == HK_I16 ? walk.n_windows : 1); ++w) {
    Sum sum = 0;
    for (int i = 0; i < warps; ++i) sum += partial.get(first + w * kMaxScoreWarps + i);
    const float s = div_rn(static_cast<float>(sum), walk.windows[w].denominator);
    score = kDtype == HK_I16 ? (s > score ? s : score) : s;
  }
  return score;
}

__device__ __forceinline__ const unsigned char* cell_start(const ScoreWalk& walk, int64_t cell) {
  return walk.data + cell / walk.cells_x * walk.stride_y + cell % walk.cells_x * walk.stride_x;
}

// The first version of a chunk that has a score, and where a version begins; -1 is the one before the first.
__device__ __forceinline__ int64_t first_scored(const ScoreWalk& walk, int64_t begin) {
  return begin > 0 || walk.has_previous ? begin : 1;
}
__device__ __forceinline__ int64_t version_start(const ScoreWalk& walk, int64_t t) {
  return t < 0 ? walk.previous : t * walk.stride_t;
}

template <int kBytes>
__device__ __forceinline__ int64_t pack_offset(const ScoreWalk& walk, int pack) {
  return pack / walk.packs_per_run * walk.stride_run + pack % walk.packs_per_run * kBytes;
}

// Cells that fit in the block's registers, blockDim.x * kThreadPacks packs. grid (cells, chunks of T); kept
// is a chain over all versions, hence one chunk.
template <int kDtype, int kBytes, bool kKept>
__global__ void __launch_bounds__(kMaxScoreThreads, 1) score_cells(const ScoreWalk walk) {
  using Sum = typename Diff<kDtype>::Sum;
  constexpr int kPacks = kThreadPacks<kBytes>;
  constexpr int kTogether = kKept ? 1 : kDepth;  // versions reduced behind one barrier
  constexpr int kWindows = kDtype == HK_I16 ? kMaxWindows : 1;
  // Two sets in turn: a warp may write the next sums while another still reads the last.
  // [2][kTogether][kWindows][warps]
  __shared__ SharedArray<Sum, 2 * kTogether * kWindows * kMaxScoreWarps> sums;
  const Shared<Sum> partial = sums.view();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;

  int32_t offset[kPacks];  // the launcher sees to it that a version spans less than 2 GiB
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    offset[i] = pack < walk.packs ? static_cast<int32_t>(pack_offset<kBytes>(walk, pack)) : -1;
  }
  const int64_t begin = blockIdx.y * walk.chunk;
  const int64_t end = begin + walk.chunk < walk.T ? begin + walk.chunk : walk.T;
  int set = 0;

  for (int64_t cell = blockIdx.x; cell < walk.cells; cell += gridDim.x) {
    const unsigned char* data = cell_start(walk, cell);
    const int64_t first = first_scored(walk, begin);
    Pack<kBytes> reference[kPacks], version[kDepth][kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      reference[i] =
          offset[i] < 0 ? zero_pack<kBytes>() : load_pack<kBytes>(data + version_start(walk, first - 1) + offset[i]);
    if (first > begin && threadIdx.x == 0) store_value(walk.scores + cell, kInfinity);

    for (int64_t t = first; t < end; t += kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int i = 0; i < kPacks; ++i)
          version[d][i] = offset[i] < 0 || t + d >= end ? zero_pack<kBytes>()
                                                        : load_pack<kBytes>(data + (t + d) * walk.stride_t + offset[i]);
#pragma unroll
      for (int group = 0; group < kDepth; group += kTogether) {
        for (int w = 0; w < (kDtype == HK_I16 ? walk.n_windows : 1); ++w) {
#pragma unroll
          for (int d = group; d < group + kTogether; ++d) {
            Sum sum = 0;
#pragma unroll
            for (int i = 0; i < kPacks; ++i)
              sum =
                  add_pack<kDtype>(sum, version[d][i], d == group ? reference[i] : version[d - 1][i], walk.windows[w]);
            sum = warp_sum(sum);
            if (lane == 0) partial.set(((set * kTogether + d - group) * kWindows + w) * kMaxScoreWarps + warp, sum);
          }
        }
        block_barrier();
        // previous: one thread per version. kept: every thread needs the score to keep or drop.
        const int mine = kKept ? 0 : threadIdx.x;
        if (mine < kTogether && t + group + mine < end) {
          const int first = (set * kTogether + mine) * kWindows * kMaxScoreWarps;
          const float score = score_of<kDtype>(walk, partial, first, warps);
          if (!kKept || threadIdx.x == 0) store_value(walk.scores + (t + group + mine) * walk.cells + cell, score);
          if (kKept && !(score <= walk.threshold)) {
#pragma unroll
            for (int i = 0; i < kPacks; ++i) reference[i] = version[group][i];
          }
        }
        set ^= 1;
      }
      if (!kKept) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) reference[i] = version[kDepth - 1][i];
      }
    }
  }
}

// Cells of any size: both versions are read from memory, the older one mostly from L2, once per window.
template <int kDtype, int kBytes>
__global__ void __launch_bounds__(kMaxScoreThreads) score_large_cells(const ScoreWalk walk, const bool kept) {
  using Large = typename Diff<kDtype>::Large;
  constexpr int kWindows = kDtype == HK_I16 ? kMaxWindows : 1;
  __shared__ SharedArray<Large, 2 * kWindows * kMaxScoreWarps> sums;  // [2][kWindows][warps]
  const Shared<Large> partial = sums.view();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  const int64_t begin = blockIdx.y * walk.chunk;
  const int64_t end = begin + walk.chunk < walk.T ? begin + walk.chunk : walk.T;
  int set = 0;

  for (int64_t cell = blockIdx.x; cell < walk.cells; cell += gridDim.x) {
    const unsigned char* data = cell_start(walk, cell);
    int64_t t = first_scored(walk, begin), reference = t - 1;
    if (t > begin && threadIdx.x == 0) store_value(walk.scores + cell, kInfinity);
    for (; t < end; ++t) {
      for (int w = 0; w < (kDtype == HK_I16 ? walk.n_windows : 1); ++w) {
        Large sum = 0;
        for (int pack = threadIdx.x; pack < walk.packs; pack += blockDim.x) {
          const unsigned char* at = data + pack_offset<kBytes>(walk, pack);
          sum += add_pack<kDtype>(typename Diff<kDtype>::Sum(0), load_pack<kBytes>(at + t * walk.stride_t),
                                  load_pack<kBytes>(at + version_start(walk, reference)), walk.windows[w]);
        }
        sum = warp_sum(sum);
        if (lane == 0) partial.set((set * kWindows + w) * kMaxScoreWarps + warp, sum);
      }
      block_barrier();
      const float score = score_of<kDtype>(walk, partial, set * kWindows * kMaxScoreWarps, warps);
      if (threadIdx.x == 0) store_value(walk.scores + t * walk.cells + cell, score);
      if (!kept || !(score <= walk.threshold)) reference = t;
      set ^= 1;
    }
  }
}

}  // namespace hk
