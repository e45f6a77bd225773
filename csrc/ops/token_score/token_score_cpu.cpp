// token_score on the CPU. previous: every (t, cell) is independent, threads take rows of cells.
// kept: a cell's versions are a chain, threads take cells. Each pixel is read from memory once as `a`;
// `b` is one frame back and comes from the cache as long as two frames fit.
#include "ops/token_score/cell_diff.h"

namespace hk::HK_CPU_LEVEL {

int token_score(const TokenScoreArgs& args) {
  const CellView& v = args.view;
  const int64_t cells = v.cells_y * v.cells_x;
  if (args.kept) {
#pragma omp parallel for schedule(static) num_threads(args.num_threads)
    for (int64_t cell = 0; cell < cells; ++cell) {
      const int64_t base = cell / v.cells_x * v.stride_y + cell % v.cells_x * v.stride_x;
      int64_t kept = 0;
      args.scores[cell] = __builtin_inff();
      for (int64_t t = 1; t < v.T; ++t) {
        const float score = cell_score(args, base + t * v.stride_t, base + kept * v.stride_t);
        args.scores[t * cells + cell] = score;
        if (!(score <= args.threshold)) kept = t;
      }
    }
    return HK_OK;
  }
  // Few rows of many cells (cut patches: one per frame) would leave threads idle, hence stretches of 64.
  const int64_t stretches = (cells + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(args.num_threads)
  for (int64_t task = 0; task < v.T * stretches; ++task) {
    const int64_t t = task / stretches, first = task % stretches * 64;
    const int64_t last = first + 64 < cells ? first + 64 : cells;
    for (int64_t cell = first; cell < last; ++cell) {
      const int64_t at = t * v.stride_t + cell / v.cells_x * v.stride_y + cell % v.cells_x * v.stride_x;
      args.scores[t * cells + cell] = t == 0 ? __builtin_inff() : cell_score(args, at, at - v.stride_t);
    }
  }
  return HK_OK;
}

}  // namespace hk::HK_CPU_LEVEL
