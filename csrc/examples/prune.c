/* Pruning a clip with nothing but the header and the library: which cells of 8 frames changed, and which rows
 * stay. Two calls on the CPU; on CUDA the same with HK_CUDA, device pointers and a stream.
 *
 *   cc -std=c99 prune.c -I<prefix>/include -L<prefix>/lib -lhulukern -Wl,-rpath,<prefix>/lib && ./a.out
 */
#include <hulukern/hulukern.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { T = 8, SIDE = 112, PATCH = 14, MERGE = 2, CELLS = SIDE / (PATCH * MERGE), ROWS = T * CELLS * CELLS };

/* A dense tensor of `ndim` sizes. */
static hk_tensor dense(void *data, hk_dtype dtype, int32_t ndim, const int64_t *shape) {
  hk_tensor t = {data, dtype, ndim, {0}, {0}};
  int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    t.shape[d] = shape[d];
    t.stride[d] = stride;
    stride *= shape[d];
  }
  return t;
}

static int done(int status) {
  if (status != HK_OK) fprintf(stderr, "%s\n", hk_last_error());
  return status == HK_OK;
}

int main(void) {
  static uint8_t frames[T][SIDE][SIDE], keep[ROWS];
  static float scores[ROWS];
  static int64_t index[ROWS], position_ids[ROWS];
  int32_t ends[2];
  int64_t count = 0;

  /* A bright square that moves by one cell per frame over a dark ground. */
  memset(frames, 20, sizeof frames);
  for (int t = 0; t < T; ++t)
    for (int y = 0; y < PATCH * MERGE; ++y) memset(&frames[t][y][t % CELLS * PATCH * MERGE], 200, PATCH * MERGE);

  const hk_exec exec = {HK_CPU, 2, NULL};
  const hk_tensor f = dense(frames, HK_U8, 4, (int64_t[]){T, SIDE, SIDE, 1});
  const hk_tensor s = dense(scores, HK_F32, 1, (int64_t[]){ROWS});
  if (!done(hk_token_score_frames(&exec, &f, &s, PATCH, MERGE, NULL, 0, HK_PREVIOUS, 0.0f))) return 1;

  for (int i = 0; i < ROWS; ++i) keep[i] = scores[i] > 25.5f; /* a tenth of the range, in u8 steps */
  const hk_tensor k = dense(keep, HK_U8, 1, (int64_t[]){ROWS});
  const hk_tensor i = dense(index, HK_I64, 1, (int64_t[]){ROWS});
  const hk_tensor p = dense(position_ids, HK_I64, 1, (int64_t[]){ROWS});
  const hk_tensor e = dense(ends, HK_I32, 1, (int64_t[]){2});
  const hk_tensor n = dense(&count, HK_I64, 1, (int64_t[]){1});
  if (!done(hk_token_compact_index(&exec, &k, NULL, &i, &p, &e, &n, ROWS))) return 1;

  printf("hulukern %s on %s: %d of %d tokens stay\n", hk_version(), hk_cpu_level(), (int)count, ROWS);
  return 0;
}
