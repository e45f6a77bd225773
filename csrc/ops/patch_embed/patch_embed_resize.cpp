// patch_embed_resize: the C ABI. Checks, and Pillow's bicubic weights in its own arithmetic.
#include <cmath>
#include <vector>

#include "cpu/status.h"
#include "ops/patch_embed/patch_embed.h"

namespace hk {

static double bicubic(double x) {
  const double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

struct TapsOwner {
  std::vector<int32_t> weights, first, count;
  Taps taps;

  TapsOwner(int64_t in, int64_t out) : first(out), count(out) {
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    const double filter_scale = scale < 1.0 ? 1.0 : scale, support = 2.0 * filter_scale;
    const int32_t size = static_cast<int32_t>(std::ceil(support)) * 2 + 1;
    weights.assign(out * size, 0);
    std::vector<double> w(size);
    for (int64_t x = 0; x < out; ++x) {
      const double center = (static_cast<double>(x) + 0.5) * scale, step = 1.0 / filter_scale;
      int32_t low = static_cast<int32_t>(center - support + 0.5), high = static_cast<int32_t>(center + support + 0.5);
      low = low < 0 ? 0 : low;
      high = high > in ? static_cast<int32_t>(in) : high;
      double sum = 0;
      for (int32_t k = 0; k < high - low; ++k) sum += w[k] = bicubic((k + low - center + 0.5) * step);
      for (int32_t k = 0; k < high - low; ++k) {
        const double scaled = (sum != 0.0 ? w[k] / sum : w[k]) * (1 << 22);
        weights[x * size + k] = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      }
      first[x] = low;
      count[x] = high - low;
    }
    taps = {weights.data(), first.data(), count.data(), size};
  }
};

}  // namespace hk

using namespace hk;

extern "C" int hk_patch_embed_resize(const hk_exec* exec, const hk_tensor* frames, const hk_tensor* out) {
  const char* op = "patch_embed_resize";
  HK_RETURN_IF_ERROR(check_cpu(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "frames", frames, 4));
  HK_RETURN_IF_ERROR(check_dtype(op, "frames", frames, HK_U8));
  HK_RETURN_IF_ERROR(check_dense(op, "frames", frames, 2));
  HK_RETURN_IF_ERROR(check_tensor(op, "out", out, 4));
  const int64_t T = frames->shape[0], C = frames->shape[3];
  HK_REQUIRE(C == 1 || C == 3, "%s: frames has C=%lld, expected 1 or 3", op, (long long)C);
  const int64_t shape[] = {T, out->shape[1], out->shape[2], C};
  HK_RETURN_IF_ERROR(check_like(op, "out", out, HK_U8, 4, shape, "ThwC", 4));
  if (T == 0) return HK_OK;
  for (int d = 1; d < 3; ++d)
    HK_REQUIRE(frames->shape[d] >= 1 && frames->shape[d] < 1 << 20 && shape[d] >= 1 && shape[d] < 1 << 20,
               "%s: frames and out have sizes %lld and %lld in dimension %d, expected 1 to 2^20", op,
               (long long)frames->shape[d], (long long)shape[d], d);
  const TapsOwner across(frames->shape[2], shape[2]), down(frames->shape[1], shape[1]);
  PatchEmbedResizeArgs args = {};
  args.frames = static_cast<const uint8_t*>(frames->data);
  args.out = static_cast<uint8_t*>(out->data);
  args.T = T;
  args.H = frames->shape[1];
  args.W = frames->shape[2];
  args.C = C;
  args.h = shape[1];
  args.w = shape[2];
  args.stride_t = frames->stride[0];
  args.stride_y = frames->stride[1];
  args.across = across.taps;
  args.down = down.taps;
  args.num_threads = threads_for(exec, T * args.H * args.W * C);
  return HK_DISPATCH_CPU(patch_embed_resize, args);
}
