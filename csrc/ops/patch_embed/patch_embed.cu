// patch_embed on CUDA: cutting and normalising, four values a store where rows allow it. Scores are token_score's
// launch right after: the frames that were just cut are read again from L2 as far as they fit.
#include "device/launch.cuh"
#include "ops/patch_embed/patch_embed.cuh"

namespace hk {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 8;  // of 256 threads: all that fit; the table is made once a block

int blocks_for(const char* op, int64_t rows, int64_t* blocks) {
  int sms = 0;
  HK_RETURN_IF_ERROR(multiprocessors(op, &sms));
  *blocks = rows < kBlocksPerMultiprocessor * sms ? rows : kBlocksPerMultiprocessor * sms;
  return HK_OK;
}

// function(dtype, values a pack)
template <class Function>
void with_values(int32_t dtype, const void* out, int64_t out_row, int64_t length, const Function& function) {
  const int64_t pack = 4 * dtype_size(dtype);
  const bool packs = length % 4 == 0 && (reinterpret_cast<uintptr_t>(out) | static_cast<uint64_t>(out_row)) % pack == 0;
  const auto with = [&](auto of) { packs ? function(of, Constant<4>{}) : function(of, Constant<1>{}); };
  if (dtype == HK_F32) return with(Constant<HK_F32>{});
  if (dtype == HK_BF16) return with(Constant<HK_BF16>{});
  with(Constant<HK_F16>{});
}

}  // namespace

int patch_embed_normalize_cuda(const PatchEmbedNormalizeArgs& args, void* stream_handle) {
  const char* op = "patch_embed";
  const int64_t size = dtype_size(args.out_dtype), length = args.plane * args.norm.channels;
  HK_REQUIRE(length <= INT32_MAX, "%s: patches has L=%lld, expected below 2^31", op, static_cast<long long>(length));
  if (args.N * length == 0) return HK_OK;
  const NormalizeWalk walk = {args.patches,
                              static_cast<unsigned char*>(args.out),
                              args.patch_stride,
                              args.out_stride * size,
                              args.N,
                              static_cast<int32_t>(args.plane),
                              static_cast<int32_t>(length),
                              args.norm};
  int64_t blocks = 0;
  HK_RETURN_IF_ERROR(blocks_for(op, args.N, &blocks));
  with_values(args.out_dtype, args.out, walk.out_row, length, [&](auto dtype, auto values) {
    launch<patch_embed_normalize_rows<decltype(dtype)::value, decltype(values)::value>>(
        grid_of(blocks), kPatchThreads, 0, static_cast<cudaStream_t>(stream_handle), walk);
  });
  return launch_status(op);
}

int patch_embed_cut_cuda(const PatchEmbedCutArgs& args, void* stream_handle) {
  const char* op = "patch_embed_cut";
  const int64_t size = dtype_size(args.out_dtype);
  const int64_t length = static_cast<int64_t>(args.norm.channels) * args.P * args.P;
  HK_REQUIRE(length <= INT32_MAX, "%s: a patch has %lld values, expected below 2^31", op,
             static_cast<long long>(length));
  const CutWalk walk = {args.frames,
                        static_cast<unsigned char*>(args.patches),
                        args.stride_t,
                        args.stride_y,
                        args.patch_stride * size,
                        args.T * (args.H / args.P) * (args.W / args.P),
                        static_cast<int32_t>(args.C),
                        args.P,
                        args.M,
                        static_cast<int32_t>(args.H / args.P),
                        static_cast<int32_t>(args.W / (args.P * args.M)),
                        static_cast<int32_t>(length),
                        args.norm};
  int64_t blocks = 0;
  HK_RETURN_IF_ERROR(blocks_for(op, walk.N, &blocks));
  with_values(args.out_dtype, args.patches, walk.out_row, length, [&](auto dtype, auto values) {
    constexpr int kDtype = decltype(dtype)::value, kN = decltype(values)::value;
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
    if (args.dtype == HK_U8)
      launch<patch_embed_cut_patches<uint8_t, kDtype, kN>>(grid_of(blocks), kPatchThreads, 0, stream, walk);
    else
      launch<patch_embed_cut_patches<int16_t, kDtype, kN>>(grid_of(blocks), kPatchThreads, 0, stream, walk);
  });
  HK_RETURN_IF_ERROR(launch_status(op));
  if (args.scores == nullptr) return HK_OK;
  TokenScoreArgs score = args.score;
  score.scores = args.scores;
  score.previous = args.previous;
  score.has_previous = args.has_previous;
  return token_score_cuda(score, stream_handle);
}

}  // namespace hk
