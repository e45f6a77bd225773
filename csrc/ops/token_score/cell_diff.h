// Sums of |a - b| over one run, the inner loop of token_score_cpu.cpp and of the score that
// patch_embed_cpu.cpp computes in its own pass. Per-level code: unnamed namespace, C headers only.
#pragma once

#include <stdint.h>
#ifdef HK_CPU_X86_LEVELS
#include <immintrin.h>
#endif

#include "cpu/half.h"
#include "ops/token_score/token_score.h"

namespace {

// The compiler's vectorised loop leaves a scalar tail of up to 63 of the 84 bytes of a run, hence psadbw
// by hand: x3.5 on runs of 84 (AVX-512).
inline uint64_t sum_abs_diff(const uint8_t* a, const uint8_t* b, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  __m512i sum = _mm512_setzero_si512();
  int i = 0;
  for (; i + 64 <= n; i += 64)
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i)));
  if (i < n) {
    const __mmask64 tail = ~0ull >> (64 - (n - i));
    sum = _mm512_add_epi64(sum,
                           _mm512_sad_epu8(_mm512_maskz_loadu_epi8(tail, a + i), _mm512_maskz_loadu_epi8(tail, b + i)));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
#elif defined(__AVX2__)
  __m256i sum = _mm256_setzero_si256();
  int i = 0;
  for (; i + 32 <= n; i += 32)
    sum = _mm256_add_epi64(
        sum, _mm256_sad_epu8(_mm256_loadu_si256((const __m256i*)(a + i)), _mm256_loadu_si256((const __m256i*)(b + i))));
  __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  for (; i + 16 <= n; i += 16)
    half = _mm_add_epi64(
        half, _mm_sad_epu8(_mm_loadu_si128((const __m128i*)(a + i)), _mm_loadu_si128((const __m128i*)(b + i))));
  uint64_t total = static_cast<uint64_t>(_mm_cvtsi128_si64(half)) + static_cast<uint64_t>(_mm_extract_epi64(half, 1));
  for (; i < n; ++i) total += static_cast<uint64_t>(a[i] < b[i] ? b[i] - a[i] : a[i] - b[i]);
  return total;
#else
  uint32_t sum = 0;
  for (int i = 0; i < n; ++i) {
    const int d = a[i] - b[i];
    sum += static_cast<uint32_t>(d < 0 ? -d : d);
  }
  return sum;
#endif
}

// At most 65535 per element: 32 bits hold a run of 65536, and launchers allow no longer one.
inline uint64_t sum_abs_diff_window(const int16_t* a, const int16_t* b, int n, int32_t lo, int32_t hi) {
  uint32_t sum = 0;
  for (int i = 0; i < n; ++i) {
    int32_t x = a[i], y = b[i];
    x = x < lo ? lo : x > hi ? hi : x;
    y = y < lo ? lo : y > hi ? hi : y;
    sum += static_cast<uint32_t>(x < y ? y - x : x - y);
  }
  return sum;
}

template <class T>
inline float sum_abs_diff_float(const T* a, const T* b, int n) {
  // Sixteen partial sums: a fixed order at every level, so that all levels give the same bits.
  float lanes[16] = {0};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += __builtin_fabsf(to_float(a[i + j]) - to_float(b[i + j]));
  for (int j = 0; i < n; ++i, ++j) lanes[j] += __builtin_fabsf(to_float(a[i]) - to_float(b[i]));
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

// The score of version `a` of a cell against version `b`, both given by their first element's offset.
inline float cell_score(const hk::TokenScoreArgs& args, int64_t a, int64_t b) {
  const hk::CellView& v = args.view;
  if (v.dtype == HK_U8) {
    const uint8_t* data = static_cast<const uint8_t*>(v.data);
    uint64_t sum = 0;
    for (int r = 0; r < v.runs; ++r, a += v.stride_run, b += v.stride_run)
      sum += sum_abs_diff(data + a, data + b, v.run);
    return static_cast<float>(sum) / args.windows[0].denominator;
  }
  if (v.dtype == HK_I16) {
    const int16_t* data = static_cast<const int16_t*>(v.data);
    float score = 0;
    for (int w = 0; w < args.n_windows; ++w) {
      const hk::ScoreWindow& window = args.windows[w];
      uint64_t sum = 0;
      for (int r = 0; r < v.runs; ++r)
        sum +=
            sum_abs_diff_window(data + a + r * v.stride_run, data + b + r * v.stride_run, v.run, window.lo, window.hi);
      const float s = static_cast<float>(sum) / window.denominator;
      score = s > score ? s : score;
    }
    return score;
  }
  double sum = 0;
  for (int r = 0; r < v.runs; ++r, a += v.stride_run, b += v.stride_run) {
    if (v.dtype == HK_F32)
      sum += sum_abs_diff_float((const float*)v.data + a, (const float*)v.data + b, v.run);
    else if (v.dtype == HK_BF16)
      sum += sum_abs_diff_float((const bf16*)v.data + a, (const bf16*)v.data + b, v.run);
    else
      sum += sum_abs_diff_float((const f16*)v.data + a, (const f16*)v.data + b, v.run);
  }
  return static_cast<float>(sum / (static_cast<double>(v.runs) * v.run));
}

}  // namespace
