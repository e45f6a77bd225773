// token_score: the C ABI. Checks, turns patches and frames into the one CellView, picks the device.
#include "ops/token_score/token_score.h"

#include "cpu/status.h"

namespace hk {

static int check_score_options(const char* op, int32_t merge_size, int32_t reference, float threshold) {
  HK_REQUIRE(merge_size >= 1, "%s: merge_size has value %d, expected at least 1", op, merge_size);
  HK_REQUIRE(reference == HK_PREVIOUS || reference == HK_KEPT,
             "%s: reference has value %d, expected HK_PREVIOUS (0) or HK_KEPT (1)", op, reference);
  HK_REQUIRE(reference == HK_PREVIOUS || threshold >= 0, "%s: threshold has value %g, expected at least 0", op,
             static_cast<double>(threshold));
  return HK_OK;
}

static int check_scores(const char* op, const hk_tensor* scores, int64_t cells) {
  HK_RETURN_IF_ERROR(check_tensor(op, "scores", scores, 1));
  HK_REQUIRE(scores->dtype == HK_F32, "%s: scores has dtype %s, expected f32", op, dtype_name(scores->dtype));
  HK_RETURN_IF_ERROR(check_shape(op, "scores", scores, 0, cells, "cells"));
  return check_dense(op, "scores", scores, 1);
}

static int run(const hk_exec* exec, const char* op, const TokenScoreArgs& args) {
  if (args.view.T * args.view.cells_y * args.view.cells_x == 0) return HK_OK;
  HK_REQUIRE(args.view.run <= 65536, "%s: a run has %d elements, expected at most 65536", op, args.view.run);
  return HK_DISPATCH(token_score, args);
}

}  // namespace hk

using namespace hk;

extern "C" int hk_token_score(const hk_exec* exec, const hk_tensor* patches, const hk_tensor* scores,
                              const int64_t* grid_thw, int64_t n_grids, int32_t merge_size, int32_t reference,
                              float threshold) {
  const char* op = "token_score";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "patches", patches, 2));
  HK_RETURN_IF_ERROR(check_score_options(op, merge_size, reference, threshold));
  const int32_t dtype = patches->dtype;
  HK_REQUIRE(dtype == HK_U8 || dtype == HK_F32 || dtype == HK_BF16 || dtype == HK_F16,
             "%s: patches has dtype %s, expected u8, f32, bf16 or f16", op, dtype_name(dtype));
  HK_RETURN_IF_ERROR(check_dense(op, "patches", patches, 1));
  HK_REQUIRE(n_grids == 0 || grid_thw != nullptr, "%s: grid_thw is NULL, expected [G, 3] sizes", op);
  const int64_t per_cell = static_cast<int64_t>(merge_size) * merge_size, L = patches->shape[1];
  int64_t rows = 0;
  for (int64_t g = 0; g < n_grids; ++g) {
    const int64_t *s = grid_thw + 3 * g, limit = int64_t{1} << 20;
    HK_REQUIRE(s[0] >= 0 && s[1] >= 0 && s[2] >= 0 && s[0] <= limit && s[1] <= limit && s[2] <= limit &&
                   s[1] % merge_size == 0 && s[2] % merge_size == 0,
               "%s: grid_thw has row %lld = (%lld, %lld, %lld), expected sizes with h and w divisible by "
               "merge_size %d",
               op, (long long)g, (long long)s[0], (long long)s[1], (long long)s[2], merge_size);
    rows += s[0] * s[1] * s[2];
  }
  HK_REQUIRE(rows == patches->shape[0], "%s: grid_thw has %lld patches in all, expected N=%lld", op, (long long)rows,
             (long long)patches->shape[0]);
  HK_RETURN_IF_ERROR(check_scores(op, scores, rows / per_cell));

  int64_t row = 0;
  for (int64_t g = 0; g < n_grids; ++g) {
    const int64_t t = grid_thw[3 * g], cells = grid_thw[3 * g + 1] * grid_thw[3 * g + 2] / per_cell;
    const int64_t stride = patches->stride[0];
    TokenScoreArgs args = {};
    args.view = {static_cast<const char*>(patches->data) + row * stride * dtype_size(dtype),
                 dtype,
                 static_cast<int32_t>(per_cell),
                 static_cast<int32_t>(L),
                 t,
                 1,
                 cells,
                 cells * per_cell * stride,
                 0,
                 per_cell * stride,
                 stride};
    args.windows[0] = u8_window(args.view);
    args.n_windows = 1;
    args.kept = reference == HK_KEPT;
    args.threshold = threshold;
    args.scores = static_cast<float*>(scores->data) + row / per_cell;
    args.num_threads = threads_for(exec, t * cells * per_cell * L * dtype_size(dtype));
    HK_RETURN_IF_ERROR(run(exec, op, args));
    row += t * cells * per_cell;
  }
  return HK_OK;
}

extern "C" int hk_token_score_frames(const hk_exec* exec, const hk_tensor* frames, const hk_tensor* scores,
                                     int32_t patch_size, int32_t merge_size, const int32_t* windows, int32_t n_windows,
                                     int32_t reference, float threshold) {
  const char* op = "token_score_frames";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "frames", frames, 4));
  HK_RETURN_IF_ERROR(check_score_options(op, merge_size, reference, threshold));
  HK_REQUIRE(frames->dtype == HK_U8 || frames->dtype == HK_I16, "%s: frames has dtype %s, expected u8 or i16", op,
             dtype_name(frames->dtype));
  HK_RETURN_IF_ERROR(check_dense(op, "frames", frames, 2));
  HK_REQUIRE(patch_size >= 1, "%s: patch_size has value %d, expected at least 1", op, patch_size);
  const int64_t side = static_cast<int64_t>(patch_size) * merge_size;
  const int64_t H = frames->shape[1], W = frames->shape[2];
  HK_REQUIRE(H % side == 0 && W % side == 0,
             "%s: frames has H=%lld, W=%lld, expected multiples of patch_size * merge_size = %lld", op, (long long)H,
             (long long)W, (long long)side);
  HK_RETURN_IF_ERROR(check_scores(op, scores, frames->shape[0] * (H / side) * (W / side)));

  TokenScoreArgs args = {};
  args.view = frame_cells(*frames, side);
  if (frames->dtype == HK_U8) {
    HK_REQUIRE(n_windows == 0, "%s: windows has %d rows, expected none for u8 frames", op, n_windows);
    args.windows[0] = u8_window(args.view);
    args.n_windows = 1;
  } else {
    HK_REQUIRE(n_windows >= 1 && n_windows <= kMaxWindows && windows != nullptr,
               "%s: windows has %d rows, expected 1 to %d for i16 frames", op, n_windows, kMaxWindows);
    for (int w = 0; w < n_windows; ++w) {
      const int32_t lo = windows[2 * w], hi = windows[2 * w + 1];
      HK_REQUIRE(lo < hi && lo >= -32768 && hi <= 32767,
                 "%s: windows has row %d = (%d, %d), expected -32768 <= lo < hi <= 32767", op, w, lo, hi);
      args.windows[w] = i16_window(args.view, lo, hi);
    }
    args.n_windows = n_windows;
  }
  args.kept = reference == HK_KEPT;
  args.threshold = threshold;
  args.scores = static_cast<float*>(scores->data);
  args.num_threads = threads_for(exec, frames->shape[0] * H * W * frames->shape[3] * dtype_size(frames->dtype));
  return run(exec, op, args);
}
