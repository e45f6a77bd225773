// token_compact, shared by the CPU and CUDA sides: the arguments of a call.
#pragma once

#include <stdint.h>

#include "cpu/level.h"

namespace hk {

struct TokenCompactIndexArgs {
  const uint8_t* mask;  // [n_rows], or NULL
  const int64_t* rows;  // [n_kept] strictly increasing, used when mask is NULL
  int64_t n_rows, n_kept;
  const int32_t* cu_seqlens;  // [S+1]; CUDA: NULL is one sequence
  int64_t n_sequences;
  int64_t* index;         // [bound]
  int64_t* position_ids;  // [bound]
  int64_t bound;
  int32_t* cu_seqlens_out;  // [S+1]
  int64_t* count;
  int32_t is_mask;  // also when there are no rows, and mask is NULL
};

// Copies rows of `row_bytes`; strides in bytes. gather: out[b] = x[index[b]]; otherwise scatter.
struct TokenCompactRowsArgs {
  const char* from;
  char* to;
  const int64_t* index;  // [bound], -1 marks a row beyond the count
  int64_t bound, row_bytes, from_stride, to_stride;
  int64_t n_to;  // scatter only: rows of `to`, zeroed first
  int32_t gather;
  int32_t num_threads;
  const int64_t* fill;  // CUDA, gather: what rows with index -1 become, or NULL
  int32_t dtype;
};

}  // namespace hk

HK_DECLARE_CPU(token_compact_index, hk::TokenCompactIndexArgs)
HK_DECLARE_CPU(token_compact_rows, hk::TokenCompactRowsArgs)
HK_DECLARE_CUDA(token_compact_index, hk::TokenCompactIndexArgs)
HK_DECLARE_CUDA(token_compact_rows, hk::TokenCompactRowsArgs)
