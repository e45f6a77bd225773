// patch_embed on the CPU: frames -> normalised patches and temporal scores, one pass over the pixels.
//
// A task is one row of cells of one frame: M*P image rows, 42 KB at 504x3. Each image row is split into
// planes, normalised, and its P-pixel pieces are put where they belong; the row of cells is then scored
// while it is still in L1. No float image exists.
//
// Normalising u8: the 256 possible results per channel are tabulated with the reference's roundings
// (/255, -mean, /std, then to the output dtype). If a * u + b gives the same 256 results, which it does
// for bf16 and fp16 with the usual means, the loop computes that in vectors; else it looks them up.
#include <stdlib.h>
#include <string.h>

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
  Out value[hk::kMaxChannels][256];
  float scale[hk::kMaxChannels], shift[hk::kMaxChannels];
  bool affine[hk::kMaxChannels];
};

template <class Out>
void fill(Table<Out>& table, const PixelNorm& a) {
  for (int c = 0; c < a.channels; ++c) {
    table.scale[c] = a.raw ? 1.0f : static_cast<float>(1.0 / (255.0 * a.std_dev[c]));
    table.shift[c] = a.raw ? 0.0f : static_cast<float>(-static_cast<double>(a.mean[c]) / a.std_dev[c]);
    table.affine[c] = true;
    for (int u = 0; u < 256; ++u) {
      const float x = static_cast<float>(u);
      table.value[c][u] = from_float<Out>(a.raw ? x : normalise(a, c, x / 255.0f));
      const Out guess = from_float<Out>(x * table.scale[c] + table.shift[c]);
      table.affine[c] &= memcmp(&guess, &table.value[c][u], sizeof(Out)) == 0;
    }
  }
}

template <class Out>
void normalise_row(Out* out, const uint8_t* in, int64_t n, const PixelNorm&, const Table<Out>& table, int c) {
  if (table.affine[c]) {
    const float scale = table.scale[c], shift = table.shift[c];
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<Out>(static_cast<float>(in[i]) * scale + shift);
  } else {
    const Out* value = table.value[c];
    for (int64_t i = 0; i < n; ++i) out[i] = value[in[i]];
  }
}

template <class Out>
void normalise_row(Out* out, const int16_t* in, int64_t n, const PixelNorm& a, const Table<Out>&, int c) {
  const int32_t lo = a.lo, hi = a.hi;
  const float width = static_cast<float>(hi - lo);
  const float mean = a.raw ? 0.0f : a.mean[c], std_dev = a.raw ? 1.0f / 255.0f : a.std_dev[c];
  for (int64_t i = 0; i < n; ++i) {
    int32_t x = in[i];
    x = x < lo ? lo : x > hi ? hi : x;
    const float unit = static_cast<float>(x - lo) / width;
    out[i] = from_float<Out>(a.raw ? unit * 255.0f : (unit - mean) / std_dev);
  }
}

// planes[c][x] = row[x][c]
template <class In>
void split_planes(In* __restrict planes, const In* __restrict row, int64_t W, int64_t C) {
  if (C == 1) {
    memcpy(planes, row, static_cast<size_t>(W) * sizeof(In));
  } else if (C == 3) {
    In *__restrict r = planes, *__restrict g = planes + W, *__restrict b = planes + 2 * W;
    for (int64_t x = 0; x < W; ++x) {
      r[x] = row[3 * x];
      g[x] = row[3 * x + 1];
      b[x] = row[3 * x + 2];
    }
  } else {
    for (int64_t x = 0; x < W; ++x)
      for (int64_t c = 0; c < C; ++c) planes[c * W + x] = row[x * C + c];
  }
}

// Puts the P-pixel pieces of one normalised image row into their patches. side > 0 fixes P at compile
// time: the copy becomes a few moves instead of a call.
template <int side, class Out>
void place_row(Out* patches, const Out* row, const PatchEmbedCutArgs& a) {
  const int64_t P = side > 0 ? side : a.P, M = a.M, cells = a.W / (P * M);
  for (int64_t cell = 0; cell < cells; ++cell)
    for (int64_t mx = 0; mx < M; ++mx)
      memcpy(patches + (cell * M * M + mx) * a.patch_stride, row + (cell * M + mx) * P,
             static_cast<size_t>(P) * sizeof(Out));
}

template <class In, class Out>
void cut_cells(const PatchEmbedCutArgs& a, const Table<Out>& table, int64_t t, int64_t cell_y, In* planes, Out* row) {
  const In* frame = static_cast<const In*>(a.frames) + t * a.stride_t;
  const int64_t side = static_cast<int64_t>(a.P) * a.M, first = (t * (a.H / side) + cell_y) * (a.W / side) * a.M * a.M;
  for (int64_t y = 0; y < side; ++y) {
    split_planes(planes, frame + (cell_y * side + y) * a.stride_y, a.W, a.C);
    const int64_t my = y / a.P, py = y % a.P;
    for (int c = 0; c < a.norm.channels; ++c) {
      normalise_row(row, planes + (a.C == 1 ? 0 : c) * a.W, a.W, a.norm, table, c);
      Out* patches = static_cast<Out*>(a.patches) + (first + my * a.M) * a.patch_stride + (c * a.P + py) * a.P;
      if (a.P == 14)
        place_row<14>(patches, row, a);
      else if (a.P == 16)
        place_row<16>(patches, row, a);
      else
        place_row<0>(patches, row, a);
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
    In* planes = static_cast<In*>(malloc(static_cast<size_t>(a.W * a.C) * sizeof(In)));
    Out* row = static_cast<Out*>(malloc(static_cast<size_t>(a.W) * sizeof(Out)));
    out_of_memory = planes == nullptr || row == nullptr;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < v.T * v.cells_y; ++task) {
      if (out_of_memory) continue;
      const int64_t t = task / v.cells_y, cell_y = task % v.cells_y;
      cut_cells(a, table, t, cell_y, planes, row);
      for (int64_t x = 0; a.scores != nullptr && x < v.cells_x; ++x) {
        const int64_t in_frame = cell_y * v.stride_y + x * v.stride_x;
        const int64_t before = t > 0 ? (t - 1) * v.stride_t : a.previous;
        a.scores[task * v.cells_x + x] =
            t > 0 || a.has_previous ? cell_score(a.score, t * v.stride_t + in_frame, before + in_frame)
                                    : __builtin_inff();
      }
    }
    free(planes);
    free(row);
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
      normalise_row(static_cast<Out*>(a.out) + n * a.out_stride + c * a.plane,
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
