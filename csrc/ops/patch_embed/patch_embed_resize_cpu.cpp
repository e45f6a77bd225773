// patch_embed_resize on the CPU: Pillow's 8-bit resampling, bit for bit. Two passes of integer weights with 22
// fractional bits, across and then down, each rounded and clipped to u8. (Pillow 13 goes down first where height
// shrinks much more than width; the order here is that of every release before, with which models were trained.)
// A task is a band of output rows of one
// frame: its input rows are resampled into scratch that stays in L2, and summed from there.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ops/patch_embed/patch_embed.h"

namespace {

using hk::PatchEmbedResizeArgs;
using hk::Taps;

constexpr int kBits = 22;
constexpr int64_t kBand = 32;

inline uint8_t clip(int32_t sum) {
  const int32_t x = sum >> kBits;
  return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
}

template <int C>
void resample_row(uint8_t* to, const uint8_t* from, int64_t width, const Taps& taps) {
  for (int64_t x = 0; x < width; ++x) {
    const int32_t* weight = taps.weights + x * taps.size;
    const uint8_t* pixel = from + taps.first[x] * C;
    int32_t sum[C];
    for (int c = 0; c < C; ++c) sum[c] = 1 << (kBits - 1);
    for (int32_t k = 0; k < taps.count[x]; ++k)
      for (int c = 0; c < C; ++c) sum[c] += pixel[k * C + c] * weight[k];
    for (int c = 0; c < C; ++c) to[x * C + c] = clip(sum[c]);
  }
}

// [rows of scratch, n] to one row, 64 columns at a time.
void sum_rows(uint8_t* to, const uint8_t* rows, int64_t n, const int32_t* weight, int32_t count) {
  for (int64_t x0 = 0; x0 < n; x0 += 64) {
    const int64_t m = n - x0 < 64 ? n - x0 : 64;
    int32_t sum[64];
    for (int64_t x = 0; x < m; ++x) sum[x] = 1 << (kBits - 1);
    for (int32_t k = 0; k < count; ++k) {
      const uint8_t* row = rows + k * n + x0;
      const int32_t w = weight[k];
      for (int64_t x = 0; x < m; ++x) sum[x] += row[x] * w;
    }
    for (int64_t x = 0; x < m; ++x) to[x0 + x] = clip(sum[x]);
  }
}

void resize_band(const PatchEmbedResizeArgs& a, int64_t t, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t n = a.w * a.C;
  const uint8_t* frame = a.frames + t * a.stride_t;
  const int64_t first = a.down.first[begin], last = a.down.first[end - 1] + a.down.count[end - 1];
  for (int64_t y = first; y < last; ++y) {
    const uint8_t* row = frame + y * a.stride_y;
    uint8_t* to = scratch + (y - first) * n;
    if (a.w == a.W)
      memcpy(to, row, static_cast<size_t>(n));
    else if (a.C == 3)
      resample_row<3>(to, row, a.w, a.across);
    else
      resample_row<1>(to, row, a.w, a.across);
  }
  for (int64_t y = begin; y < end; ++y) {
    uint8_t* to = a.out + (t * a.h + y) * n;
    if (a.h == a.H)
      memcpy(to, scratch + (y - first) * n, static_cast<size_t>(n));
    else
      sum_rows(to, scratch + (a.down.first[y] - first) * n, n, a.down.weights + y * a.down.size, a.down.count[y]);
  }
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int patch_embed_resize(const PatchEmbedResizeArgs& args) {
  const int64_t bands = (args.h + kBand - 1) / kBand;
  int64_t most = 0;  // input rows of a band
  for (int64_t b = 0; b < bands; ++b) {
    const int64_t begin = b * kBand, end = begin + kBand < args.h ? begin + kBand : args.h;
    const int64_t rows = args.down.first[end - 1] + args.down.count[end - 1] - args.down.first[begin];
    most = rows > most ? rows : most;
  }
  int out_of_memory = 0;
#pragma omp parallel num_threads(args.num_threads) reduction(| : out_of_memory)
  {
    uint8_t* scratch = static_cast<uint8_t*>(malloc(static_cast<size_t>(most * args.w * args.C)));
    out_of_memory = scratch == nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < args.T * bands; ++task) {
      if (out_of_memory) continue;
      const int64_t begin = task % bands * kBand, end = begin + kBand < args.h ? begin + kBand : args.h;
      resize_band(args, task / bands, begin, end, scratch);
    }
    free(scratch);
  }
  return out_of_memory ? HK_OUT_OF_MEMORY : HK_OK;
}

}  // namespace hk::HK_CPU_LEVEL
