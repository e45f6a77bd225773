// patch_embed: arguments of the CPU kernel that cuts frames into normalised patches.
#pragma once

#include <stdint.h>

#include "cpu/level.h"
#include "ops/token_score/token_score.h"

namespace hk {

constexpr int kMaxChannels = 4;

// How a pixel becomes a value; raw: no mean and std, values 0..255.
struct PixelNorm {
  int32_t channels, raw;
  int32_t lo, hi;  // i16: the window
  float mean[kMaxChannels], std_dev[kMaxChannels];
};

struct PatchEmbedNormalizeArgs {
  const uint8_t* patches;  // [N, channels * plane]
  void* out;
  int32_t out_dtype;
  int64_t N, plane, patch_stride, out_stride;  // elements
  PixelNorm norm;
  int32_t num_threads;
};

struct PatchEmbedCutArgs {
  const void* frames;  // [T, H, W, C] u8 or i16, pixels dense
  int32_t dtype;
  int64_t T, H, W, C;
  int64_t stride_t, stride_y;  // elements
  int64_t previous;            // offset of the frame before frames[0], in elements
  int32_t has_previous;
  int32_t P, M;
  PixelNorm norm;
  void* patches;
  int32_t out_dtype;
  int64_t patch_stride;  // elements
  float* scores;         // or NULL
  TokenScoreArgs score;  // how scores are taken; its view covers `frames`
  int32_t num_threads;
};

// Output i is the sum of `count[i]` inputs from `first[i]` on, by weights[i * size ..] / 2^22.
struct Taps {
  const int32_t *weights, *first, *count;
  int32_t size;
};

struct PatchEmbedResizeArgs {
  const uint8_t* frames;  // [T, H, W, C]
  uint8_t* out;           // [T, h, w, C], dense
  int64_t T, H, W, C, h, w;
  int64_t stride_t, stride_y;
  Taps across, down;
  int32_t num_threads;
};

}  // namespace hk

HK_DECLARE_CPU(patch_embed_normalize, hk::PatchEmbedNormalizeArgs)
HK_DECLARE_CPU(patch_embed_cut, hk::PatchEmbedCutArgs)
HK_DECLARE_CPU(patch_embed_resize, hk::PatchEmbedResizeArgs)
HK_DECLARE_CUDA(patch_embed_normalize, hk::PatchEmbedNormalizeArgs)
HK_DECLARE_CUDA(patch_embed_cut, hk::PatchEmbedCutArgs)
