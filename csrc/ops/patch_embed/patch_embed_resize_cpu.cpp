// patch_embed_resize on the CPU: Pillow's 8-bit resampling, bit for bit. Two passes of integer weights with 22
// fractional bits, across and then down, each rounded and clipped to u8. (Pillow 13 goes down first where height
// shrinks much more than width; the order here is that of every release before, with which models were trained.)
// A task is a band of output rows of one
// frame: its input rows are resampled into scratch that stays in L2, and summed from there.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef HK_CPU_X86_LEVELS
#include <immintrin.h>
#endif

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

typedef int32_t i32x4 __attribute__((vector_size(16)));

inline i32x4 widen(const uint8_t* p) {
#ifdef __SSE4_1__
  int32_t four;
  memcpy(&four, p, 4);
  return reinterpret_cast<i32x4>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
#else
  return i32x4{p[0], p[1], p[2], p[3]};
#endif
}

// Of x >> kBits, as clip().
inline void store_colour(uint8_t* to, i32x4 x) {
#ifdef __SSE4_1__
  const __m128i shorts = _mm_packs_epi32(reinterpret_cast<__m128i>(x >> kBits), _mm_setzero_si128());
  const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
  memcpy(to, &four, 3);
#else
  for (int c = 0; c < 3; ++c) to[c] = clip(x[c]);
#endif
}

// The three channels of a pixel and the byte after it, which nothing reads: four lanes, of which three count. Taps is
// a number, where the loop is unrolled over it and weights beyond a pixel's own are 0, or 0: as many as there are.
template <int kTaps>
inline void resample_colour(uint8_t* to, const uint8_t* from, const int32_t* weight, int32_t count) {
  i32x4 sum = {1 << (kBits - 1), 1 << (kBits - 1), 1 << (kBits - 1), 0};
  const int32_t n = kTaps ? kTaps : count;
#pragma GCC unroll 8
  for (int32_t k = 0; k < n; ++k) sum += widen(from + 3 * k) * weight[k];
  store_colour(to, sum);
}

// Pixels whose taps reach the row's last byte are left to the plain loop.
template <int C, int kTaps>
void resample_row(uint8_t* to, const uint8_t* from, int64_t from_width, int64_t width, const Taps& taps) {
  for (int64_t x = 0; x < width; ++x) {
    const int32_t *weight = taps.weights + x * taps.size, count = taps.count[x];
    const uint8_t* pixel = from + taps.first[x] * C;
    if (C == 3 && taps.first[x] + (kTaps ? kTaps : count) < from_width) {
      resample_colour<kTaps>(to + x * C, pixel, weight, count);
      continue;
    }
    for (int c = 0; c < C; ++c) {
      int32_t sum = 1 << (kBits - 1);
      for (int32_t k = 0; k < count; ++k) sum += pixel[k * C + c] * weight[k];
      to[x * C + c] = clip(sum);
    }
  }
}

void resample(uint8_t* to, const uint8_t* from, const PatchEmbedResizeArgs& a) {
  if (a.C == 1) return resample_row<1, 0>(to, from, a.W, a.w, a.across);
  // Larger or a little smaller (by less than a half): the usual cases.
  if (a.across.size == 5) return resample_row<3, 5>(to, from, a.W, a.w, a.across);
  if (a.across.size == 7) return resample_row<3, 7>(to, from, a.W, a.w, a.across);
  return resample_row<3, 0>(to, from, a.W, a.w, a.across);
}

constexpr int64_t kColumns = 64;

// Columns x0 .. x0 + m of rows of scratch, [count, n], to one row.
inline void sum_columns(uint8_t* to, const uint8_t* rows, int64_t n, int64_t m, const int32_t* weight, int32_t count) {
  int32_t sum[kColumns];
  for (int64_t x = 0; x < m; ++x) sum[x] = 1 << (kBits - 1);
  for (int32_t k = 0; k < count; ++k) {
    const uint8_t* row = rows + k * n;
    const int32_t w = weight[k];
    for (int64_t x = 0; x < m; ++x) sum[x] += row[x] * w;
  }
  for (int64_t x = 0; x < m; ++x) to[x] = clip(sum[x]);
}

void sum_rows(uint8_t* to, const uint8_t* rows, int64_t n, const int32_t* weight, int32_t count) {
  int64_t x = 0;
  for (; x + kColumns <= n; x += kColumns) sum_columns(to + x, rows + x, n, kColumns, weight, count);
  sum_columns(to + x, rows + x, n, n - x, weight, count);
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
    else
      resample(to, row, a);
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
