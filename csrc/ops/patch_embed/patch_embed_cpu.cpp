// patch_embed on the CPU: frames -> normalised patches and temporal scores, one pass over the pixels.
//
// A task is one row of cells of one frame: M*P image rows, 42 KB at 504x3. Patch by patch, the pixels are
// split into planes in a scratch patch (588 bytes), looked up and written out front to back; the row of
// cells is then scored while it is still in L1. No float image exists.
//
// Normalising u8 is a table of 256 results per channel, made with the reference's roundings (/255, -mean,
// /std, then to the output dtype): exact for any mean and std. 16-bit tables fit eight AVX-512 registers.
// Tried and dropped: normalising whole image rows and then placing their 14-pixel pieces, 14 ms for
// 32x504x504 to bf16 against 7 on 2 cores (each 28-byte piece crosses the vector stores it was made with).
#include <stdlib.h>
#include <string.h>
#ifdef HK_CPU_X86_LEVELS
#include <immintrin.h>
#endif

#include "cpu/half.h"
#include "ops/patch_embed/patch_embed.h"
#include "ops/token_score/cell_diff.h"

namespace {

using hk::PatchEmbedCutArgs;
using hk::PixelNorm;

inline float normalise(const PixelNorm& a, int c, float unit) {
  return (unit - a.mean[c]) / a.std_dev[c];
}

template <class Out>
struct Table {
  alignas(64) Out value[hk::kMaxChannels][256];
};

template <class Out>
void fill(Table<Out>& table, const PixelNorm& a) {
  for (int c = 0; c < a.channels; ++c)
    for (int u = 0; u < 256; ++u) {
      const float x = static_cast<float>(u);
      table.value[c][u] = from_float<Out>(a.raw ? x : normalise(a, c, x / 255.0f));
    }
}

template <class Out>
void look_up(Out* out, const uint8_t* in, int64_t n, const Out* value) {
  int64_t i = 0;
#ifdef __AVX512BW__
  if (sizeof(Out) == 2) {
    __m512i table[8];
    for (int k = 0; k < 8; ++k) table[k] = _mm512_load_si512(reinterpret_cast<const char*>(value) + 64 * k);
    for (; i + 32 <= n; i += 32) {
      // Bits 0..5 of a pixel pick from a pair of registers, bits 6 and 7 the pair.
      const __m512i u = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
      const __m512i a = _mm512_permutex2var_epi16(table[0], u, table[1]);
      const __m512i b = _mm512_permutex2var_epi16(table[2], u, table[3]);
      const __m512i c = _mm512_permutex2var_epi16(table[4], u, table[5]);
      const __m512i d = _mm512_permutex2var_epi16(table[6], u, table[7]);
      const __mmask32 bit6 = _mm512_test_epi16_mask(u, _mm512_set1_epi16(64));
      const __mmask32 bit7 = _mm512_test_epi16_mask(u, _mm512_set1_epi16(128));
      const __m512i picked =
          _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, a, b), _mm512_mask_blend_epi16(bit6, c, d));
      _mm512_storeu_si512(out + i, picked);
    }
  }
#endif
  for (; i < n; ++i) out[i] = value[in[i]];
}

template <class Out>
void normalise_plane(Out* out, const uint8_t* in, int64_t n, const PixelNorm&, const Table<Out>& table, int c) {
  look_up(out, in, n, table.value[c]);
}

template <class Out>
void normalise_plane(Out* out, const int16_t* in, int64_t n, const PixelNorm& a, const Table<Out>&, int c) {
  const int32_t lo = a.lo, hi = a.hi, raw = a.raw;
  const float width = static_cast<float>(hi - lo), mean = a.mean[c], std_dev = raw ? 1.0f : a.std_dev[c];
  for (int64_t i = 0; i < n; ++i) {
    int32_t x = in[i];
    x = x < lo ? lo : x > hi ? hi : x;
    const float unit = static_cast<float>(x - lo) / width;
    out[i] = from_float<Out>(raw ? unit * 255.0f : (unit - mean) / std_dev);
  }
}

// One image row of a patch, P pixels of C channels, into its planes: planes[c * stride + x] = row[x * C + c].
template <class In>
inline void split_row(In* planes, int64_t stride, const In* row, int64_t P, int64_t C) {
  if (C == 1) {
    for (int64_t x = 0; x < P; ++x) planes[x] = row[x];
    return;
  }
  for (int64_t x = 0; x < P; ++x)
    for (int64_t c = 0; c < C; ++c) planes[c * stride + x] = row[x * C + c];
}

constexpr int64_t kVectorPixels = 16;  // what split_row_rgb reads and writes, of which P are wanted

#ifdef __AVX2__
// 16 RGB pixels at once. Each plane is picked from three registers of 16 bytes; 0x80 picks nothing.
inline void split_row_rgb(uint8_t* planes, int64_t stride, const uint8_t* row) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16));
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 32));
  const char no = static_cast<char>(0x80);
  const __m128i from_a[3] = {_mm_setr_epi8(0, 3, 6, 9, 12, 15, no, no, no, no, no, no, no, no, no, no),
                             _mm_setr_epi8(1, 4, 7, 10, 13, no, no, no, no, no, no, no, no, no, no, no),
                             _mm_setr_epi8(2, 5, 8, 11, 14, no, no, no, no, no, no, no, no, no, no, no)};
  const __m128i from_b[3] = {_mm_setr_epi8(no, no, no, no, no, no, 2, 5, 8, 11, 14, no, no, no, no, no),
                             _mm_setr_epi8(no, no, no, no, no, 0, 3, 6, 9, 12, 15, no, no, no, no, no),
                             _mm_setr_epi8(no, no, no, no, no, 1, 4, 7, 10, 13, no, no, no, no, no, no)};
  const __m128i from_c[3] = {_mm_setr_epi8(no, no, no, no, no, no, no, no, no, no, no, 1, 4, 7, 10, 13),
                             _mm_setr_epi8(no, no, no, no, no, no, no, no, no, no, no, 2, 5, 8, 11, 14),
                             _mm_setr_epi8(no, no, no, no, no, no, no, no, no, no, 0, 3, 6, 9, 12, 15)};
  for (int k = 0; k < 3; ++k) {
    const __m128i plane = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, from_a[k]), _mm_shuffle_epi8(b, from_b[k])),
                                       _mm_shuffle_epi8(c, from_c[k]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + k * stride), plane);
  }
}
#endif

// Rows of one patch into planes of P*P, `stride` apart. `readable`: pixels from `pixels` to the end of
// its image row, beyond which nothing may be read. Rows are split top to bottom, so what a wide store
// leaves behind its row is overwritten by the next, and the last one's lands in the gap between planes.
inline void split_patch(uint8_t* planes, int64_t stride, const uint8_t* pixels, int64_t row_stride, int64_t P,
                        int64_t C, int64_t readable) {
#ifdef __AVX2__
  if (C == 3 && P <= kVectorPixels) {
    for (int64_t y = 0; y < P; ++y) {
      const uint8_t* row = pixels + y * row_stride;
      uint8_t last[3 * kVectorPixels];
      if (readable < kVectorPixels) {
        memcpy(last, row, static_cast<size_t>(3 * P));
        row = last;
      }
      split_row_rgb(planes + y * P, stride, row);
    }
    return;
  }
#endif
  (void)readable;
  for (int64_t y = 0; y < P; ++y) split_row(planes + y * P, stride, pixels + y * row_stride, P, C);
}

inline void split_patch(int16_t* planes, int64_t stride, const int16_t* pixels, int64_t row_stride, int64_t P,
                        int64_t C, int64_t) {
  for (int64_t y = 0; y < P; ++y) split_row(planes + y * P, stride, pixels + y * row_stride, P, C);
}

template <class In, class Out>
void cut_cells(const PatchEmbedCutArgs& a, const Table<Out>& table, int64_t t, int64_t cell_y, In* planes) {
  const int64_t P = a.P, M = a.M, area = P * P, stride = area + kVectorPixels;
  const In* frame = static_cast<const In*>(a.frames) + t * a.stride_t;
  const int64_t cells_x = a.W / (P * M), first = (t * (a.H / (P * M)) + cell_y) * cells_x * M * M;
  for (int64_t my = 0; my < M; ++my) {
    const In* rows = frame + (cell_y * M + my) * P * a.stride_y;
    for (int64_t px = 0; px < cells_x * M; ++px) {
      split_patch(planes, stride, rows + px * P * a.C, a.stride_y, P, a.C, a.W - px * P);
      const int64_t n = first + px / M * M * M + my * M + px % M;
      Out* patch = static_cast<Out*>(a.patches) + n * a.patch_stride;
      for (int c = 0; c < a.norm.channels; ++c)
        normalise_plane(patch + c * area, planes + (a.C == 1 ? 0 : c) * stride, area, a.norm, table, c);
    }
  }
}

template <class In, class Out>
int cut(const PatchEmbedCutArgs& a) {
  Table<Out> table;
  fill(table, a.norm);
  const hk::CellView& v = a.score.view;
  int out_of_memory = 0;
#pragma omp parallel num_threads(a.num_threads) reduction(| : out_of_memory)
  {
    const int64_t scratch = a.C * (static_cast<int64_t>(a.P) * a.P + kVectorPixels);
    In* planes = static_cast<In*>(malloc(static_cast<size_t>(scratch) * sizeof(In)));
    out_of_memory = planes == nullptr;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < v.T * v.cells_y; ++task) {
      if (out_of_memory) continue;
      const int64_t t = task / v.cells_y, cell_y = task % v.cells_y;
      cut_cells(a, table, t, cell_y, planes);
      for (int64_t x = 0; a.scores != nullptr && x < v.cells_x; ++x) {
        const int64_t in_frame = cell_y * v.stride_y + x * v.stride_x;
        const int64_t before = t > 0 ? (t - 1) * v.stride_t : a.previous;
        a.scores[task * v.cells_x + x] = t > 0 || a.has_previous
                                             ? cell_score(a.score, t * v.stride_t + in_frame, before + in_frame)
                                             : __builtin_inff();
      }
    }
    free(planes);
  }
  return out_of_memory ? HK_OUT_OF_MEMORY : HK_OK;
}

template <class In>
int cut_to(const PatchEmbedCutArgs& a) {
  if (a.out_dtype == HK_F32) return cut<In, float>(a);
  if (a.out_dtype == HK_BF16) return cut<In, bf16>(a);
  return cut<In, f16>(a);
}

template <class Out>
int normalize(const hk::PatchEmbedNormalizeArgs& a) {
  Table<Out> table;
  fill(table, a.norm);
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t n = 0; n < a.N; ++n)
    for (int c = 0; c < a.norm.channels; ++c)
      normalise_plane(static_cast<Out*>(a.out) + n * a.out_stride + c * a.plane,
                      a.patches + n * a.patch_stride + c * a.plane, a.plane, a.norm, table, c);
  return HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int patch_embed_normalize(const PatchEmbedNormalizeArgs& args) {
  if (args.out_dtype == HK_F32) return normalize<float>(args);
  if (args.out_dtype == HK_BF16) return normalize<bf16>(args);
  return normalize<f16>(args);
}

int patch_embed_cut(const PatchEmbedCutArgs& args) {
  return args.dtype == HK_U8 ? cut_to<uint8_t>(args) : cut_to<int16_t>(args);
}

}  // namespace hk::HK_CPU_LEVEL
