/* hulukern C ABI: plain tensor views, sizes and a stream; no framework, no Python, C99.
 *
 * Every launcher takes an hk_exec first, inputs, then outputs, then sizes and options, and returns
 * an hk_status. On failure nothing has been launched and hk_last_error() names the op, the argument,
 * what was expected and what came (thread-local, valid until the next failing call on that thread).
 *
 * Letters: N packed patches, G grids, T H W frame sizes, C channels, P patch side, M merge side,
 * K kept rows, B row bound. A cell is M x M patches, i.e. one visual token. Strides count elements.
 */
#ifndef HULUKERN_H_
#define HULUKERN_H_

#include <stdint.h>

#if defined(__GNUC__)
#define HK_API __attribute__((visibility("default")))
#else
#define HK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define HK_MAX_DIMS 5
#define HK_ABI_VERSION 1

typedef enum hk_status {
  HK_OK = 0,
  HK_INVALID_ARGUMENT = 1,
  HK_UNSUPPORTED = 2,  /* valid, but not built or not written for this device or dtype */
  HK_DEVICE_ERROR = 3, /* the CUDA runtime refused; hk_last_error() holds its text */
  HK_OUT_OF_MEMORY = 4
} hk_status;

typedef enum hk_dtype {
  HK_U8 = 0, /* also bool: 0 or 1 */
  HK_I16 = 1,
  HK_I32 = 2,
  HK_I64 = 3,
  HK_F16 = 4,
  HK_BF16 = 5,
  HK_F32 = 6,
  HK_F64 = 7
} hk_dtype;

typedef enum hk_device { HK_CPU = 0, HK_CUDA = 1 } hk_device;

typedef struct hk_tensor {
  void* data;
  int32_t dtype; /* hk_dtype */
  int32_t ndim;
  int64_t shape[HK_MAX_DIMS];
  int64_t stride[HK_MAX_DIMS]; /* elements */
} hk_tensor;

typedef struct hk_exec {
  int32_t device;      /* hk_device: where every tensor of the call lives */
  int32_t num_threads; /* CPU only; >= 1 */
  void* stream;        /* CUDA only; a cudaStream_t of the current device, NULL is the default stream */
} hk_exec;

HK_API const char* hk_version(void);
HK_API int hk_abi_version(void);
HK_API const char* hk_last_error(void);
/* "baseline", "avx2" or "avx512": what this process runs (HULUKERN_CPU_LEVEL may lower it).
 * NULL with HK_INVALID_ARGUMENT text in hk_last_error() when that variable names no usable level. */
HK_API const char* hk_cpu_level(void);
/* 1 if CPU kernels were built with OpenMP, else 0 (num_threads is then ignored). */
HK_API int hk_openmp(void);
/* "" when CUDA kernels were left out of this build, else their architectures, "80;90a;..."; "simulated"
 * when this is the test library that runs them on the host. */
HK_API const char* hk_cuda_archs(void);
/* Why the build has no CUDA kernels; "" when it has them. */
HK_API const char* hk_cuda_absent_reason(void);

/* What a cell is compared with, see token_score. */
typedef enum hk_score_reference { HK_PREVIOUS = 0, HK_KEPT = 1 } hk_score_reference;

/* patch_embed: frames -> normalised patches in merge-block order, and the temporal scores of the
 * same pass. The product with the embedding weight is a GEMM and left to the caller's BLAS.
 *   frames   [T, H, W, C] u8 or i16; inner two strides must be C and 1
 *   previous [H, W, C] like one frame: the frame before frames[0], or NULL (then its scores are +inf)
 *   patches  [T*(H/P)*(W/P), channels*P*P] f32, bf16 or f16, rows contiguous
 *   scores   [T*(H/(P*M))*(W/(P*M))] f32 in u8 steps (i16: window mapped to 0..255), or NULL
 * C is `channels`, or 1 and repeated. value = u8/255, or clamp((i16 - lo)/(hi - lo), 0, 1); then
 * (value - mean[c]) / std[c]. mean == NULL keeps raw values 0..255 (i16: the window times 255). */
typedef struct hk_cut_options {
  int32_t patch_size, merge_size, channels;
  int32_t lo, hi;              /* i16 only: window, lo < hi */
  const float *mean, *std_dev; /* [channels] host memory, or both NULL */
} hk_cut_options;
HK_API int hk_patch_embed_cut(const hk_exec* exec, const hk_tensor* frames, const hk_tensor* previous,
                              const hk_tensor* patches, const hk_tensor* scores, const hk_cut_options* options);

/* patch_embed of patches that are cut already: normalises them by the same rules.
 *   patches [N, channels*P*P] u8, out [N, channels*P*P] f32, bf16 or f16; rows contiguous.
 * options: channels, mean and std_dev count. */
HK_API int hk_patch_embed_normalize(const hk_exec* exec, const hk_tensor* patches, const hk_tensor* out,
                                    const hk_cut_options* options);

/* token_score: mean |difference| per cell against the previous or the last kept version of the cell.
 *   scores [cells] f32, grid after grid, (t, cell) order; the first frame of a grid scores +inf.
 * u8: in u8 steps, float(sum) / float(count), exact. i16: per window (lo, hi), |clamp - clamp| scaled
 * so that the window spans 255; the largest over the windows. Floats: in the input's own unit.
 * HK_KEPT: a version is kept unless score <= threshold (NaN is kept), and later ones compare with it.
 *   patches [N, L] u8, f32, bf16, f16, merge-block order, rows contiguous; grid_thw [G][3] host memory
 *   frames  [T, H, W, C] u8 or i16, inner two strides C and 1; windows [n_windows][2] host memory */
HK_API int hk_token_score(const hk_exec* exec, const hk_tensor* patches, const hk_tensor* scores,
                          const int64_t* grid_thw, int64_t n_grids, int32_t merge_size, int32_t reference,
                          float threshold);
HK_API int hk_token_score_frames(const hk_exec* exec, const hk_tensor* frames, const hk_tensor* scores,
                                 int32_t patch_size, int32_t merge_size, const int32_t* windows, int32_t n_windows,
                                 int32_t reference, float threshold);

/* token_compact: stable compaction, in two steps so that the caller can size the outputs.
 * _index: keep [N] u8 (0 or 1), or i64 [K] strictly increasing row numbers ->
 *   index        [B] i64  kept row numbers, then -1
 *   position_ids [B] i64  place within its sequence, then 0
 *   cu_seqlens_out [S+1] i32 and count [1] i64 (the true K, also when K > B)
 *   cu_seqlens   [S+1] i32: rows of sequence s are cu_seqlens[s] .. cu_seqlens[s+1]; NULL is one sequence
 * _rows: out[b] = x[index[b]]; out rows with index -1 are left alone.
 * _rows_backward: grad_x = 0, then grad_x[index[b]] = grad_out[b]. */
HK_API int hk_token_compact_index(const hk_exec* exec, const hk_tensor* keep, const hk_tensor* cu_seqlens,
                                  const hk_tensor* index, const hk_tensor* position_ids,
                                  const hk_tensor* cu_seqlens_out, const hk_tensor* count, int64_t n_rows);
HK_API int hk_token_compact_rows(const hk_exec* exec, const hk_tensor* x, const hk_tensor* index, const hk_tensor* out);
HK_API int hk_token_compact_rows_backward(const hk_exec* exec, const hk_tensor* grad_out, const hk_tensor* index,
                                          const hk_tensor* grad_x);

#ifdef __cplusplus
}
#endif
#endif /* HULUKERN_H_ */
