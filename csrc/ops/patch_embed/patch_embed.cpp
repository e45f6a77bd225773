// patch_embed: the C ABI. Checks, then the CPU kernel.
#include "ops/patch_embed/patch_embed.h"

#include "cpu/status.h"

namespace hk {

static int read_norm(const char* op, const hk_cut_options& o, PixelNorm* norm) {
  HK_REQUIRE(o.channels >= 1 && o.channels <= kMaxChannels, "%s: channels has value %d, expected 1 to %d", op,
             o.channels, kMaxChannels);
  HK_REQUIRE((o.mean == nullptr) == (o.std_dev == nullptr),
             "%s: only one of mean and std is given, expected both or neither", op);
  norm->channels = o.channels;
  norm->raw = o.mean == nullptr;
  norm->lo = o.lo;
  norm->hi = o.hi;
  for (int c = 0; c < o.channels && !norm->raw; ++c) {
    HK_REQUIRE(o.std_dev[c] > 0, "%s: std has value %g, expected above 0", op, static_cast<double>(o.std_dev[c]));
    norm->mean[c] = o.mean[c];
    norm->std_dev[c] = o.std_dev[c];
  }
  return HK_OK;
}

}  // namespace hk

using namespace hk;

extern "C" int hk_patch_embed_normalize(const hk_exec* exec, const hk_tensor* patches, const hk_tensor* out,
                                        const hk_cut_options* options) {
  const char* op = "patch_embed";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_REQUIRE(options != nullptr, "%s: options is NULL, expected hk_cut_options", op);
  PatchEmbedNormalizeArgs args = {};
  HK_RETURN_IF_ERROR(read_norm(op, *options, &args.norm));
  HK_RETURN_IF_ERROR(check_tensor(op, "patches", patches, 2));
  HK_REQUIRE(patches->dtype == HK_U8, "%s: patches has dtype %s, expected u8", op, dtype_name(patches->dtype));
  HK_REQUIRE(patches->shape[1] % options->channels == 0, "%s: patches has L=%lld, expected a multiple of channels=%d",
             op, (long long)patches->shape[1], options->channels);
  HK_RETURN_IF_ERROR(check_dense(op, "patches", patches, 1));
  HK_RETURN_IF_ERROR(check_tensor(op, "out", out, 2));
  HK_RETURN_IF_ERROR(check_float(op, "out", out));
  HK_RETURN_IF_ERROR(check_shape(op, "out", out, 0, patches->shape[0], "N"));
  HK_RETURN_IF_ERROR(check_shape(op, "out", out, 1, patches->shape[1], "L"));
  HK_RETURN_IF_ERROR(check_dense(op, "out", out, 1));
  args.patches = static_cast<const uint8_t*>(patches->data);
  args.out = out->data;
  args.out_dtype = out->dtype;
  args.N = patches->shape[0];
  args.plane = patches->shape[1] / options->channels;
  args.patch_stride = patches->stride[0];
  args.out_stride = out->stride[0];
  args.num_threads = threads_for(exec, args.N * patches->shape[1] * dtype_size(out->dtype));
  return HK_DISPATCH(patch_embed_normalize, args);
}

extern "C" int hk_patch_embed_cut(const hk_exec* exec, const hk_tensor* frames, const hk_tensor* previous,
                                  const hk_tensor* patches, const hk_tensor* scores, const hk_cut_options* options) {
  const char* op = "patch_embed_cut";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_REQUIRE(options != nullptr, "%s: options is NULL, expected hk_cut_options", op);
  PatchEmbedCutArgs args = {};
  const hk_cut_options& o = *options;
  HK_REQUIRE(o.patch_size >= 1 && o.merge_size >= 1,
             "%s: patch_size, merge_size have values %d, %d, expected at least 1", op, o.patch_size, o.merge_size);
  HK_RETURN_IF_ERROR(read_norm(op, o, &args.norm));
  HK_RETURN_IF_ERROR(check_tensor(op, "frames", frames, 4));
  HK_REQUIRE(frames->dtype == HK_U8 || frames->dtype == HK_I16, "%s: frames has dtype %s, expected u8 or i16", op,
             dtype_name(frames->dtype));
  HK_REQUIRE(frames->dtype == HK_U8 || (o.lo < o.hi && o.lo >= -32768 && o.hi <= 32767),
             "%s: window has (%d, %d), expected -32768 <= lo < hi <= 32767", op, o.lo, o.hi);
  HK_RETURN_IF_ERROR(check_dense(op, "frames", frames, 2));
  const int64_t T = frames->shape[0], H = frames->shape[1], W = frames->shape[2], C = frames->shape[3];
  const int64_t side = static_cast<int64_t>(o.patch_size) * o.merge_size;
  HK_REQUIRE(H % side == 0 && W % side == 0,
             "%s: frames has H=%lld, W=%lld, expected multiples of patch_size * merge_size = %lld", op, (long long)H,
             (long long)W, (long long)side);
  HK_REQUIRE(C == 1 || C == o.channels, "%s: frames has C=%lld, expected 1 or channels=%d", op, (long long)C,
             o.channels);
  HK_REQUIRE(side * C <= 65536, "%s: frames has cells of %lld values a row, expected at most 65536", op,
             (long long)(side * C));
  const int64_t size = dtype_size(frames->dtype);
  if (previous != nullptr) {
    HK_RETURN_IF_ERROR(check_tensor(op, "previous", previous, 3));
    HK_REQUIRE(previous->dtype == frames->dtype, "%s: previous has dtype %s, expected %s as frames", op,
               dtype_name(previous->dtype), dtype_name(frames->dtype));
    for (int d = 0; d < 3; ++d) {
      HK_RETURN_IF_ERROR(check_shape(op, "previous", previous, d, frames->shape[d + 1],
                                     d == 0   ? "H"
                                     : d == 1 ? "W"
                                              : "C"));
      HK_REQUIRE(previous->stride[d] == frames->stride[d + 1],
                 "%s: previous has stride %lld in dimension %d, expected %lld as frames", op,
                 (long long)previous->stride[d], d, (long long)frames->stride[d + 1]);
    }
    const int64_t distance = static_cast<const char*>(previous->data) - static_cast<const char*>(frames->data);
    HK_REQUIRE(distance % size == 0, "%s: previous has address %lld bytes from frames, expected whole elements", op,
               (long long)distance);
    args.previous = distance / size;
    args.has_previous = 1;
  }
  HK_RETURN_IF_ERROR(check_tensor(op, "patches", patches, 2));
  HK_RETURN_IF_ERROR(check_float(op, "patches", patches));
  HK_RETURN_IF_ERROR(check_shape(op, "patches", patches, 0, T * (H / o.patch_size) * (W / o.patch_size), "N"));
  HK_RETURN_IF_ERROR(check_shape(op, "patches", patches, 1,
                                 static_cast<int64_t>(o.channels) * o.patch_size * o.patch_size, "channels*P*P"));
  HK_RETURN_IF_ERROR(check_dense(op, "patches", patches, 1));
  if (scores != nullptr) {
    HK_RETURN_IF_ERROR(check_tensor(op, "scores", scores, 1));
    HK_REQUIRE(scores->dtype == HK_F32, "%s: scores has dtype %s, expected f32", op, dtype_name(scores->dtype));
    HK_RETURN_IF_ERROR(check_shape(op, "scores", scores, 0, T * (H / side) * (W / side), "cells"));
    HK_RETURN_IF_ERROR(check_dense(op, "scores", scores, 1));
  }
  if (T * H * W * C == 0) return HK_OK;

  args.frames = frames->data;
  args.dtype = frames->dtype;
  args.T = T;
  args.H = H;
  args.W = W;
  args.C = C;
  args.stride_t = frames->stride[0];
  args.stride_y = frames->stride[1];
  args.P = o.patch_size;
  args.M = o.merge_size;
  args.patches = patches->data;
  args.out_dtype = patches->dtype;
  args.patch_stride = patches->stride[0];
  args.scores = scores == nullptr ? nullptr : static_cast<float*>(scores->data);
  args.score.view = frame_cells(*frames, side);
  args.score.n_windows = 1;
  args.score.windows[0] = frames->dtype == HK_U8 ? u8_window(args.score.view) : i16_window(args.score.view, o.lo, o.hi);
  args.num_threads = threads_for(exec, patches->shape[0] * patches->shape[1] * dtype_size(patches->dtype));
  return HK_DISPATCH(patch_embed_cut, args);
}
