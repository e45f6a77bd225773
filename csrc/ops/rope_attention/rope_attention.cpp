// rope_attention: the C ABI. Checks, frequencies in double precision, then the CPU kernels.
#include "ops/rope_attention/rope_attention.h"

#include <cmath>

#include "cpu/status.h"

namespace hk {

static int read_rope(const char* op, const hk_rope* from, int64_t D, Rope* rope) {
  HK_REQUIRE(from != nullptr && from->sections != nullptr, "%s: rope is NULL, expected sections and theta", op);
  HK_REQUIRE(D >= 2 && D % 2 == 0 && D <= kMaxHeadDim, "%s: q has D=%lld, expected an even one from 2 to %d", op,
             (long long)D, kMaxHeadDim);
  HK_REQUIRE(from->theta > 0, "%s: theta has value %g, expected above 0", op, from->theta);
  rope->pairs = static_cast<int32_t>(D / 2);
  rope->axes = from->axes;
  int32_t pair = 0;
  for (int32_t axis = 0; axis < from->axes; ++axis) {
    const int32_t n = from->sections[axis];
    HK_REQUIRE(n >= 1 && n <= rope->pairs - pair, "%s: sections has %d pairs of axis %d, expected D/2 = %d in all", op,
               n, axis, rope->pairs);
    for (int32_t i = 0; i < n; ++i, ++pair) {
      rope->frequency[pair] = static_cast<float>(1.0 / std::pow(from->theta, static_cast<double>(i) / n));
      rope->axis[pair] = static_cast<uint8_t>(axis);
    }
  }
  HK_REQUIRE(pair == rope->pairs, "%s: sections has %d pairs, expected D/2 = %d in all", op, pair, rope->pairs);
  return HK_OK;
}

static int check_heads(const char* op, const char* name, const hk_tensor* t, int32_t dtype, const int64_t* shape,
                       const char* letters, Heads* heads) {
  HK_RETURN_IF_ERROR(check_like(op, name, t, dtype, 3, shape, letters, 1));
  *heads = {t->data, t->stride[0], t->stride[1]};
  return HK_OK;
}

// Dense scratch like `of`; not looked at on the CPU.
static int check_rotated(const char* op, const char* name, const hk_exec* exec, const hk_tensor* t, const hk_tensor* of,
                         void** data) {
  if (exec->device == HK_CPU) return HK_OK;
  HK_RETURN_IF_ERROR(check_like(op, name, t, of->dtype, 3, of->shape, "NAD", 3));
  *data = t->data;
  return HK_OK;
}

static int check_positions(const char* op, const char* name, const hk_tensor* t, int64_t rows, int32_t axes) {
  const int64_t shape[] = {rows, axes};
  return check_like(op, name, t, HK_I32, 2, shape, "Na", 2);
}

static int check_ends(const char* op, const char* name, const hk_exec* exec, const hk_tensor* t, int64_t rows) {
  HK_RETURN_IF_ERROR(check_tensor(op, name, t, 1));
  HK_RETURN_IF_ERROR(check_dtype(op, name, t, HK_I32));
  HK_RETURN_IF_ERROR(check_dense(op, name, t, 1));
  const int64_t S = t->shape[0] - 1;
  HK_REQUIRE(S >= 0, "%s: %s has 0 entries, expected S+1", op, name);
  if (!values_on_host(exec)) return HK_OK;
  const int32_t* ends = static_cast<const int32_t*>(t->data);
  HK_REQUIRE(ends[0] == 0 && ends[S] == rows, "%s: %s has ends %d .. %d, expected 0 .. N=%lld", op, name, ends[0],
             ends[S], (long long)rows);
  for (int64_t s = 0; s < S; ++s)
    HK_REQUIRE(ends[s] <= ends[s + 1], "%s: %s has %d before %d, expected it never to fall", op, name, ends[s],
               ends[s + 1]);
  return HK_OK;
}

// What forward and backward have in common.
static int read_attention(const char* op, const hk_exec* exec, const hk_tensor* q, const hk_tensor* k,
                          const hk_tensor* v, const hk_tensor* positions_q, const hk_tensor* positions_k,
                          const hk_tensor* cu_seqlens_q, const hk_tensor* cu_seqlens_k, const hk_tensor* out,
                          const hk_tensor* lse, const hk_rope* rope, double scale, RopeAttentionArgs* args) {
  HK_RETURN_IF_ERROR(check_tensor(op, "q", q, 3));
  HK_RETURN_IF_ERROR(check_float(op, "q", q));
  HK_RETURN_IF_ERROR(check_tensor(op, "k", k, 3));
  const int64_t A = q->shape[1], D = q->shape[2];
  const int64_t keys[] = {k->shape[0], A, D}, statistics[] = {A, q->shape[0]};
  HK_RETURN_IF_ERROR(read_rope(op, rope, D, &args->rope));
  HK_REQUIRE(scale > 0, "%s: scale has value %g, expected above 0", op, scale);
  HK_RETURN_IF_ERROR(check_heads(op, "q", q, q->dtype, q->shape, "NAD", &args->q));
  HK_RETURN_IF_ERROR(check_heads(op, "k", k, q->dtype, keys, "NAD", &args->k));
  HK_RETURN_IF_ERROR(check_heads(op, "v", v, q->dtype, keys, "NAD", &args->v));
  HK_RETURN_IF_ERROR(check_heads(op, "out", out, q->dtype, q->shape, "NAD", &args->out));
  HK_RETURN_IF_ERROR(check_positions(op, "positions_q", positions_q, q->shape[0], rope->axes));
  HK_RETURN_IF_ERROR(check_positions(op, "positions_k", positions_k, k->shape[0], rope->axes));
  HK_RETURN_IF_ERROR(check_ends(op, "cu_seqlens_q", exec, cu_seqlens_q, q->shape[0]));
  HK_RETURN_IF_ERROR(check_ends(op, "cu_seqlens_k", exec, cu_seqlens_k, k->shape[0]));
  HK_RETURN_IF_ERROR(check_shape(op, "cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q->shape[0], "S+1"));
  HK_RETURN_IF_ERROR(check_like(op, "lse", lse, HK_F32, 2, statistics, "AN", 2));
  args->positions_q = static_cast<const int32_t*>(positions_q->data);
  args->positions_k = static_cast<const int32_t*>(positions_k->data);
  args->cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q->data);
  args->cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k->data);
  args->lse = static_cast<float*>(lse->data);
  args->dtype = q->dtype;
  args->D = static_cast<int32_t>(D);
  args->Nq = q->shape[0];
  args->Nk = k->shape[0];
  args->A = A;
  args->S = cu_seqlens_q->shape[0] - 1;
  args->scale = static_cast<float>(scale);
  // Work grows with the square of a sequence's length, so threads pay off for fewer bytes; the 8 is a guess.
  args->num_threads = threads_for(exec, 8 * q->shape[0] * A * D * dtype_size(q->dtype));
  return HK_OK;
}

}  // namespace hk

using namespace hk;

extern "C" int hk_rope_attention(const hk_exec* exec, const hk_tensor* q, const hk_tensor* k, const hk_tensor* v,
                                 const hk_tensor* positions_q, const hk_tensor* positions_k,
                                 const hk_tensor* cu_seqlens_q, const hk_tensor* cu_seqlens_k, const hk_tensor* out,
                                 const hk_tensor* lse, const hk_tensor* k_rotated, const hk_rope* rope, double scale) {
  const char* op = "rope_attention";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  RopeAttentionArgs args = {};
  HK_RETURN_IF_ERROR(read_attention(op, exec, q, k, v, positions_q, positions_k, cu_seqlens_q, cu_seqlens_k, out, lse,
                                    rope, scale, &args));
  HK_RETURN_IF_ERROR(check_rotated(op, "k_rotated", exec, k_rotated, k, &args.k_rotated));
  return HK_DISPATCH_PRODUCTS(rope_attention, args);
}

extern "C" int hk_rope_attention_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* q,
                                          const hk_tensor* k, const hk_tensor* v, const hk_tensor* out,
                                          const hk_tensor* lse, const hk_tensor* positions_q,
                                          const hk_tensor* positions_k, const hk_tensor* cu_seqlens_q,
                                          const hk_tensor* cu_seqlens_k, const hk_tensor* grad_q,
                                          const hk_tensor* grad_k, const hk_tensor* grad_v, const hk_tensor* delta,
                                          const hk_tensor* q_rotated, const hk_tensor* k_rotated, const hk_rope* rope,
                                          double scale) {
  const char* op = "rope_attention_backward";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  RopeAttentionBackwardArgs args = {};
  HK_RETURN_IF_ERROR(read_attention(op, exec, q, k, v, positions_q, positions_k, cu_seqlens_q, cu_seqlens_k, out, lse,
                                    rope, scale, &args.forward));
  HK_RETURN_IF_ERROR(check_rotated(op, "q_rotated", exec, q_rotated, q, &args.q_rotated));
  HK_RETURN_IF_ERROR(check_rotated(op, "k_rotated", exec, k_rotated, k, &args.forward.k_rotated));
  HK_RETURN_IF_ERROR(check_heads(op, "grad", grad, q->dtype, q->shape, "NAD", &args.grad));
  HK_RETURN_IF_ERROR(check_heads(op, "grad_q", grad_q, q->dtype, q->shape, "NAD", &args.grad_q));
  HK_RETURN_IF_ERROR(check_heads(op, "grad_k", grad_k, q->dtype, k->shape, "NAD", &args.grad_k));
  HK_RETURN_IF_ERROR(check_heads(op, "grad_v", grad_v, q->dtype, k->shape, "NAD", &args.grad_v));
  HK_RETURN_IF_ERROR(check_like(op, "delta", delta, HK_F32, 2, lse->shape, "AN", 2));
  args.delta = static_cast<float*>(delta->data);
  return HK_DISPATCH_PRODUCTS(rope_attention_backward, args);
}

extern "C" int hk_rope_attention_rotate(const hk_exec* exec, const hk_tensor* x, const hk_tensor* positions,
                                        const hk_tensor* out, const hk_rope* rope, int32_t inverse) {
  const char* op = "rope_attention_rotate";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "x", x, 3));
  HK_RETURN_IF_ERROR(check_float(op, "x", x));
  RopeAttentionRotateArgs args = {};
  HK_RETURN_IF_ERROR(read_rope(op, rope, x->shape[2], &args.rope));
  HK_RETURN_IF_ERROR(check_heads(op, "x", x, x->dtype, x->shape, "NAD", &args.x));
  HK_RETURN_IF_ERROR(check_heads(op, "out", out, x->dtype, x->shape, "NAD", &args.out));
  HK_RETURN_IF_ERROR(check_positions(op, "positions", positions, x->shape[0], rope->axes));
  args.positions = static_cast<const int32_t*>(positions->data);
  args.dtype = x->dtype;
  args.D = static_cast<int32_t>(x->shape[2]);
  args.inverse = inverse;
  args.N = x->shape[0];
  args.A = x->shape[1];
  args.num_threads = threads_for(exec, 2 * args.N * args.A * args.D * dtype_size(x->dtype));
  return HK_DISPATCH(rope_attention_rotate, args);
}
