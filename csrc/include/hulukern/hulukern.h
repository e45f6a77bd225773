/* hulukern C ABI: plain tensor views, sizes and a stream; no framework, no Python, C99.
 *
 * Every launcher takes an hk_exec first, inputs, then outputs, then sizes and options, and returns
 * an hk_status. On failure nothing has been launched and hk_last_error() names the op, the argument,
 * what was expected and what came (thread-local, valid until the next failing call on that thread).
 *
 * Letters: N packed patches, S sequences, G grids, T H W frame sizes, C channels, P patch side, M merge
 * side, E width, A heads, D head dim, K kept rows, B row bound or row stretches. A cell is M x M patches,
 * i.e. one visual token. Strides count elements. "float" below is f32, bf16 or f16.
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
/* "baseline", "avx2", "avx512", "avx512_bf16" or "amx": what this process runs (HULUKERN_CPU_LEVEL may lower it).
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

/* patch_embed_resize: Pillow's bicubic (antialiased, 8-bit fixed point), across and then down. CPU only.
 *   frames [T, H, W, C] u8, C 1 or 3, inner two strides C and 1; out [T, h, w, C] u8, dense */
HK_API int hk_patch_embed_resize(const hk_exec* exec, const hk_tensor* frames, const hk_tensor* out);

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
 *   On CUDA the values of keep (rows) and cu_seqlens are the caller's word.
 * _rows: out[b] = x[index[b]]; elements of rows with index -1 become *fill on CUDA, and are left alone on the
 *   CPU or if fill (host memory) is NULL.
 * _rows_backward: grad_x = 0, then grad_x[index[b]] = grad_out[b]. */
HK_API int hk_token_compact_index(const hk_exec* exec, const hk_tensor* keep, const hk_tensor* cu_seqlens,
                                  const hk_tensor* index, const hk_tensor* position_ids,
                                  const hk_tensor* cu_seqlens_out, const hk_tensor* count, int64_t n_rows);
HK_API int hk_token_compact_rows(const hk_exec* exec, const hk_tensor* x, const hk_tensor* index, const hk_tensor* out,
                                 const int64_t* fill);
HK_API int hk_token_compact_rows_backward(const hk_exec* exec, const hk_tensor* grad_out, const hk_tensor* index,
                                          const hk_tensor* grad_x);

/* rope_attention: rotate q and k by their coordinates, softmax attention without a mask within each
 * sequence. Angles, softmax and sums are fp32.
 *   q, out, grad, grad_q          [Nq, A, D] float, inner stride 1, any row and head strides
 *   k, v, grad_k, grad_v          [Nk, A, D] of q's dtype, likewise
 *   positions_q, positions_k      [Nq, axes], [Nk, axes] i32, rows contiguous
 *   cu_seqlens_q, cu_seqlens_k    [S+1] i32: rows of sequence s are cu_seqlens[s] .. cu_seqlens[s+1].
 *                                 Checked on the CPU, on CUDA the caller's word
 *   lse                           [A, Nq] f32, natural log; -inf where a sequence has no keys (out is 0)
 *   delta                         [A, Nq] f32 scratch of the backward: sum of grad * out
 *   q_rotated, k_rotated          like q and k, dense: scratch of CUDA calls, NULL on the CPU
 * Pair i of the n of an axis turns by position / theta^(i/n) and joins dimensions j and j + D/2, j the
 * pair's number over all axes. D <= 256 and even.
 * _rotate: out = x [N, A, D] turned by positions [N, axes], or back if inverse. */
typedef struct hk_rope {
  const int32_t* sections; /* [axes] host memory: pairs per axis, they add up to D/2 */
  int32_t axes;
  double theta;
} hk_rope;
HK_API int hk_rope_attention(const hk_exec* exec, const hk_tensor* q, const hk_tensor* k, const hk_tensor* v,
                             const hk_tensor* positions_q, const hk_tensor* positions_k, const hk_tensor* cu_seqlens_q,
                             const hk_tensor* cu_seqlens_k, const hk_tensor* out, const hk_tensor* lse,
                             const hk_tensor* k_rotated, const hk_rope* rope, double scale);
HK_API int hk_rope_attention_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* q,
                                      const hk_tensor* k, const hk_tensor* v, const hk_tensor* out,
                                      const hk_tensor* lse, const hk_tensor* positions_q, const hk_tensor* positions_k,
                                      const hk_tensor* cu_seqlens_q, const hk_tensor* cu_seqlens_k,
                                      const hk_tensor* grad_q, const hk_tensor* grad_k, const hk_tensor* grad_v,
                                      const hk_tensor* delta, const hk_tensor* q_rotated, const hk_tensor* k_rotated,
                                      const hk_rope* rope, double scale);
HK_API int hk_rope_attention_rotate(const hk_exec* exec, const hk_tensor* x, const hk_tensor* positions,
                                    const hk_tensor* out, const hk_rope* rope, int32_t inverse);

/* layer_norm: s = x + residual, rounded to x's dtype; y = (s - mean) * rstd * weight + bias.
 *   x, residual, y, summed [N, E] float, one dtype, rows contiguous; residual and summed both or neither NULL
 *   weight, bias [E] float of one dtype, x's or another; mean, rstd [N] f32
 * _backward: grad_x is the gradient of s, which x and residual share.
 *   grad, grad_summed, summed, grad_x [N, E] of one dtype; grad_summed may be NULL; summed is s
 *   grad_weight, grad_bias [E] of weight's dtype
 *   partial [B, 2, E] f32 scratch: rows go in B stretches of ceil(N / B), whose sums are added in order, so
 *   that the result depends on B and not on how many threads there are */
HK_API int hk_layer_norm(const hk_exec* exec, const hk_tensor* x, const hk_tensor* residual, const hk_tensor* weight,
                         const hk_tensor* bias, const hk_tensor* y, const hk_tensor* summed, const hk_tensor* mean,
                         const hk_tensor* rstd, double eps);
HK_API int hk_layer_norm_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* grad_summed,
                                  const hk_tensor* summed, const hk_tensor* weight, const hk_tensor* mean,
                                  const hk_tensor* rstd, const hk_tensor* grad_x, const hk_tensor* grad_weight,
                                  const hk_tensor* grad_bias, const hk_tensor* partial);

/* bias_gelu: out = gelu(x + bias).
 *   x, out, grad, grad_x [N, E] float, one dtype, rows contiguous
 *   bias, grad_bias [E] of x's dtype, both NULL without a bias; partial [B, E] f32 scratch, NULL without a bias */
typedef enum hk_gelu { HK_GELU_TANH = 0, HK_GELU_ERF = 1 } hk_gelu;
HK_API int hk_bias_gelu(const hk_exec* exec, const hk_tensor* x, const hk_tensor* bias, const hk_tensor* out,
                        int32_t gelu);
HK_API int hk_bias_gelu_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* x, const hk_tensor* bias,
                                 const hk_tensor* grad_x, const hk_tensor* grad_bias, const hk_tensor* partial,
                                 int32_t gelu);

/* spatial_merge: mean over the M*M adjacent rows of a cell, after a LayerNorm of every row if weight is given.
 *   x, grad_x [N, E] float, rows contiguous; out, grad [K, E] of x's dtype, K = N / M^2 without keep
 *   weight, bias [E] float of one dtype, both or neither NULL; mean, rstd [K, M*M] f32, NULL without weight
 *   keep [K] i64 strictly increasing cells, or NULL; checked on the CPU, on CUDA the caller's word
 * _backward: grad_x of cells left out is 0. grad_weight, grad_bias [E] of weight's dtype and partial
 *   [B, 2, E] f32 scratch are NULL without weight. */
HK_API int hk_spatial_merge(const hk_exec* exec, const hk_tensor* x, const hk_tensor* weight, const hk_tensor* bias,
                            const hk_tensor* keep, const hk_tensor* out, const hk_tensor* mean, const hk_tensor* rstd,
                            int32_t merge_size, double eps);
HK_API int hk_spatial_merge_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* x,
                                     const hk_tensor* weight, const hk_tensor* keep, const hk_tensor* mean,
                                     const hk_tensor* rstd, const hk_tensor* grad_x, const hk_tensor* grad_weight,
                                     const hk_tensor* grad_bias, const hk_tensor* partial, int32_t merge_size);

#ifdef __cplusplus
}
#endif
#endif /* HULUKERN_H_ */
