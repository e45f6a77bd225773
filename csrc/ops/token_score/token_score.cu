// token_score on CUDA: picks the widest aligned load, threads per cell and chunks of T, and launches.
// No allocation, no sync; what a call costs is at the head of token_score.cuh.
#include "device/launch.cuh"
#include "ops/token_score/token_score.cuh"

namespace hk {
namespace {

// Blocks per multiprocessor that hide the latency of one another's barriers and loads.
constexpr int64_t kBlocksPerMultiprocessor = 8;
// A chunk reads the version before it again: at least this many make that at most an eighth.
constexpr int64_t kMinChunk = 8;

// `view` in bytes; runs that follow each other in memory become one.
ScoreWalk make_walk(const TokenScoreArgs& args) {
  const CellView& v = args.view;
  const int64_t size = dtype_size(v.dtype);
  const bool one_run = v.runs == 1 || v.stride_run == v.run;
  ScoreWalk walk = {};
  walk.data = static_cast<const unsigned char*>(v.data);
  walk.stride_t = v.stride_t * size;
  walk.stride_y = v.stride_y * size;
  walk.stride_x = v.stride_x * size;
  walk.stride_run = one_run ? 0 : v.stride_run * size;
  walk.previous = args.previous * size;
  walk.has_previous = args.has_previous;
  walk.T = v.T;
  walk.cells = v.cells_y * v.cells_x;
  walk.cells_x = v.cells_x;
  walk.packs = static_cast<int32_t>(v.runs * v.run * size);  // of one byte, so far
  walk.packs_per_run = one_run ? walk.packs : static_cast<int32_t>(v.run * size);
  for (int w = 0; w < args.n_windows; ++w) walk.windows[w] = args.windows[w];
  walk.n_windows = args.n_windows;
  walk.threshold = args.threshold;
  walk.scores = args.scores;
  return walk;
}

// The widest load, at most 16 bytes, to which every run of every cell is aligned.
int load_bytes(const ScoreWalk& walk, int64_t cells_y) {
  uint64_t offsets =
      reinterpret_cast<uintptr_t>(walk.data) | static_cast<uint64_t>(walk.packs_per_run | walk.stride_run);
  if (walk.T > 1) offsets |= static_cast<uint64_t>(walk.stride_t);
  if (walk.has_previous) offsets |= static_cast<uint64_t>(walk.previous);
  if (walk.cells_x > 1) offsets |= static_cast<uint64_t>(walk.stride_x);
  if (cells_y > 1) offsets |= static_cast<uint64_t>(walk.stride_y);
  int bytes = 16;
  while (offsets % bytes != 0) bytes /= 2;
  return bytes;
}

// Versions per chunk so that cells * chunks fill the device; all of them when each depends on the last.
int64_t chunk_length(const ScoreWalk& walk, bool kept, int multiprocessors) {
  if (kept) return walk.T;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors, walk.cells);
  const int64_t length = ceil_div(walk.T, wanted < kMaxGridY ? wanted : kMaxGridY);
  return length > kMinChunk ? length : kMinChunk < walk.T ? kMinChunk : walk.T;
}

template <int kDtype, int kBytes>
void launch_cells(ScoreWalk walk, bool kept, cudaStream_t stream) {
  walk.packs /= kBytes;
  walk.packs_per_run = walk.packs_per_run > kBytes ? walk.packs_per_run / kBytes : 1;
  const dim3 grid = grid_of(walk.cells < kMaxGridX ? walk.cells : kMaxGridX, ceil_div(walk.T, walk.chunk));
  const int64_t warps = ceil_div(walk.packs > 0 ? walk.packs : 1, kThreadPacks<kBytes> * kWarpSize);
  const int64_t runs = walk.packs > 0 ? walk.packs / walk.packs_per_run : 1;
  if (warps * kWarpSize > kMaxScoreThreads || runs * walk.stride_run > INT32_MAX) {
    launch<score_large_cells<kDtype, kBytes>>(grid, kMaxScoreThreads, 0, stream, walk, kept);
  } else if (kept) {
    launch<score_cells<kDtype, kBytes, true>>(grid, warps * kWarpSize, 0, stream, walk);
  } else {
    launch<score_cells<kDtype, kBytes, false>>(grid, warps * kWarpSize, 0, stream, walk);
  }
}

template <int kDtype, int kElementBytes>
void launch_widest(const ScoreWalk& walk, int bytes, bool kept, cudaStream_t stream) {
  if (bytes == 16) return launch_cells<kDtype, 16>(walk, kept, stream);
  if (bytes == 8) return launch_cells<kDtype, 8>(walk, kept, stream);
  if (bytes == 4) return launch_cells<kDtype, 4>(walk, kept, stream);
  if constexpr (kElementBytes < 4)
    if (bytes == 2) return launch_cells<kDtype, 2>(walk, kept, stream);
  if constexpr (kElementBytes < 2) launch_cells<kDtype, 1>(walk, kept, stream);
}

}  // namespace

int token_score_cuda(const TokenScoreArgs& args, void* stream_handle) {
  const char* op = "token_score";
  int sms = 0;
  HK_RETURN_IF_ERROR(multiprocessors(op, &sms));
  const int64_t size = dtype_size(args.view.dtype),
                cell_bytes = static_cast<int64_t>(args.view.runs) * args.view.run * size;
  HK_REQUIRE(cell_bytes <= INT32_MAX, "%s: a cell has %lld bytes, expected less than 2 GiB", op,
             static_cast<long long>(cell_bytes));
  ScoreWalk walk = make_walk(args);
  const int bytes = load_bytes(walk, args.view.cells_y);
  HK_REQUIRE(bytes >= size, "%s: the pixels have an address not divisible by their size, expected %lld", op,
             static_cast<long long>(size));
  const bool kept = args.kept != 0;
  walk.chunk = chunk_length(walk, kept, sms);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  switch (args.view.dtype) {
    case HK_U8:
      launch_widest<HK_U8, 1>(walk, bytes, kept, stream);
      break;
    case HK_I16:
      launch_widest<HK_I16, 2>(walk, bytes, kept, stream);
      break;
    case HK_F32:
      launch_widest<HK_F32, 4>(walk, bytes, kept, stream);
      break;
    case HK_BF16:
      launch_widest<HK_BF16, 2>(walk, bytes, kept, stream);
      break;
    case HK_F16:
      launch_widest<HK_F16, 2>(walk, bytes, kept, stream);
      break;
    default:
      return fail(HK_UNSUPPORTED, "%s: the pixels have dtype %s, expected u8, i16, f32, bf16 or f16", op,
                  dtype_name(args.view.dtype));
  }
  return launch_status(op);
}

}  // namespace hk
