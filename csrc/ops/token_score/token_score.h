// token_score, shared by the CPU and CUDA sides: what a cell is in memory, and the call's arguments.
#pragma once

#include <stdint.h>

#include "cpu/level.h"
#include "hulukern/hulukern.h"

namespace hk {

// One clip of T versions of `cells` cells. A version of a cell is `runs` stretches of `run` adjacent
// elements: M*M patch rows of C*P*P, or P*M image rows of P*M*C. Strides count elements, so frames and
// cut patches are the same problem.
struct CellView {
  const void* data;
  int32_t dtype;
  int32_t runs, run;
  int64_t T, cells_y, cells_x;
  int64_t stride_t, stride_y, stride_x, stride_run;
};

struct ScoreWindow {
  int32_t lo, hi;     // i16 values are clamped to it before the difference
  float denominator;  // runs * run, times (hi - lo) / 255
};

constexpr int kMaxWindows = 8;

struct TokenScoreArgs {
  CellView view;
  ScoreWindow windows[kMaxWindows];  // integers: at least one; u8 uses {0, 255}
  int32_t n_windows;
  int32_t kept;     // 1: compare with the last kept version
  float threshold;  // kept only
  float* scores;    // [T, cells_y * cells_x]
  int32_t num_threads;
  int64_t previous;      // CUDA: offset of the version before the first, in elements
  int32_t has_previous;  // else the first scores +inf
};

// Cells of side x side pixels of frames [T, H, W, C].
inline CellView frame_cells(const hk_tensor& frames, int64_t side) {
  const int64_t C = frames.shape[3], row = frames.stride[1];
  return {frames.data,
          frames.dtype,
          static_cast<int32_t>(side),
          static_cast<int32_t>(side * C),
          frames.shape[0],
          frames.shape[1] / side,
          frames.shape[2] / side,
          frames.stride[0],
          side * row,
          side * C,
          row};
}

inline ScoreWindow u8_window(const CellView& view) {
  return {0, 255, static_cast<float>(static_cast<int64_t>(view.runs) * view.run)};
}

inline ScoreWindow i16_window(const CellView& view, int32_t lo, int32_t hi) {
  return {lo, hi, u8_window(view).denominator * (static_cast<float>(hi - lo) / 255.0f)};
}

}  // namespace hk

HK_DECLARE_CPU(token_score, hk::TokenScoreArgs)
HK_DECLARE_CUDA(token_score, hk::TokenScoreArgs)
