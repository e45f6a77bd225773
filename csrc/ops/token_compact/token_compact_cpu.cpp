// token_compact on the CPU. The index pass is serial: it reads one byte per token, 30 us for 65,536
// tokens, less than waking the threads for two passes. The rows are what costs, and go in threads.
#include <stdint.h>
#include <string.h>

#include "hulukern/hulukern.h"
#include "ops/token_compact/token_compact.h"

namespace hk::HK_CPU_LEVEL {

int token_compact_index(const TokenCompactIndexArgs& a) {
  int64_t k = 0, row = 0, i = 0;
  a.cu_seqlens_out[0] = 0;
  for (int64_t s = 0; s < a.n_sequences; ++s) {
    const int64_t first = k, end = a.cu_seqlens[s + 1];
    if (a.mask != nullptr) {
      for (; row < end; ++row) {
        if (a.mask[row] == 0) continue;
        if (k < a.bound) {
          a.index[k] = row;
          a.position_ids[k] = k - first;
        }
        ++k;
      }
    } else {
      for (; i < a.n_kept && a.rows[i] < end; ++i, ++k) {
        if (k >= a.bound) continue;
        a.index[k] = a.rows[i];
        a.position_ids[k] = k - first;
      }
    }
    a.cu_seqlens_out[s + 1] = static_cast<int32_t>(k < a.bound ? k : a.bound);
  }
  *a.count = k;
  for (int64_t b = k; b < a.bound; ++b) {
    a.index[b] = -1;
    a.position_ids[b] = 0;
  }
  return HK_OK;
}

int token_compact_rows(const TokenCompactRowsArgs& a) {
  if (!a.gather) {
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
    for (int64_t n = 0; n < a.n_to; ++n) memset(a.to + n * a.to_stride, 0, static_cast<size_t>(a.row_bytes));
  }
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t b = 0; b < a.bound; ++b) {
    const int64_t n = a.index[b];
    if (n < 0) continue;
    const char* from = a.from + (a.gather ? n : b) * a.from_stride;
    char* to = a.to + (a.gather ? b : n) * a.to_stride;
    if (a.row_bytes == 8)
      memcpy(to, from, 8);
    else
      memcpy(to, from, static_cast<size_t>(a.row_bytes));
  }
  return HK_OK;
}

}  // namespace hk::HK_CPU_LEVEL
