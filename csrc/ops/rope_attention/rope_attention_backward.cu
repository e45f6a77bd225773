// rope_attention backward on CUDA: q and k rotated into scratch, delta, then grad_q and grad_k with grad_v.
#include "ops/rope_attention/attention_backward.cuh"
#include "ops/rope_attention/attention_backward_f32.cuh"
#include "ops/rope_attention/launch.cuh"

namespace hk {
namespace {

struct Sides {
  Heads q, k;  // rotated
};

// The walk of either kernel; F32 counts gradients' strides in elements, the other in bytes.
template <class Walk, class Element>
Walk make_walk(const RopeAttentionBackwardArgs& args, const Sides& rotated, bool own_keys, int64_t size,
               int64_t grad_size) {
  const RopeAttentionArgs& f = args.forward;
  const HeadRows q = in_bytes(rotated.q, size), k = in_bytes(rotated.k, size);
  const HeadRows grad = in_bytes(args.grad, size), v = in_bytes(f.v, size);
  const Heads &to_a = own_keys ? args.grad_k : args.grad_q, &to_b = args.grad_v;
  Walk walk = {};
  walk.a = own_keys ? k : q;
  walk.b = own_keys ? v : grad;
  walk.x = own_keys ? q : k;
  walk.y = own_keys ? grad : v;
  walk.grad_a = static_cast<Element*>(to_a.data);
  walk.grad_b = static_cast<Element*>(to_b.data);
  walk.grad_a_row = to_a.row * grad_size;
  walk.grad_a_head = to_a.head * grad_size;
  walk.grad_b_row = to_b.row * grad_size;
  walk.grad_b_head = to_b.head * grad_size;
  walk.lse = f.lse;
  walk.delta = args.delta;
  walk.positions = own_keys ? f.positions_k : f.positions_q;
  walk.cu_seqlens = own_keys ? f.cu_seqlens_k : f.cu_seqlens_q;
  walk.cu_seqlens_other = own_keys ? f.cu_seqlens_q : f.cu_seqlens_k;
  walk.Nq = f.Nq;
  walk.S = static_cast<int32_t>(f.S);
  walk.scale = f.scale;
  walk.rope = f.rope;
  return walk;
}

template <int kDtype, int kD>
void launch_backward(const RopeAttentionBackwardArgs& args, const Sides& rotated, cudaStream_t stream) {
  const RopeAttentionArgs& f = args.forward;
  using Walk = AttentionBackwardWalk;
  if (f.Nq > 0)
    launch<attention_backward<kDtype, kD, false>>(grid_of(f.Nq / kOwnedRows + f.S, f.A), kAttentionThreads,
                                                  kBackwardSharedBytes<kD>, stream,
                                                  make_walk<Walk, unsigned char>(args, rotated, false, 2, 2));
  if (f.Nk > 0)
    launch<attention_backward<kDtype, kD, true>>(grid_of(f.Nk / kOwnedRows + f.S, f.A), kAttentionThreads,
                                                 kBackwardSharedBytes<kD>, stream,
                                                 make_walk<Walk, unsigned char>(args, rotated, true, 2, 2));
}

template <int kDtype>
void launch_backward_of(const RopeAttentionBackwardArgs& args, const Sides& rotated, cudaStream_t stream) {
  if (args.forward.D == 64) return launch_backward<kDtype, 64>(args, rotated, stream);
  if (args.forward.D == 72) return launch_backward<kDtype, 72>(args, rotated, stream);
  if (args.forward.D == 80) return launch_backward<kDtype, 80>(args, rotated, stream);
  if (args.forward.D == 96) return launch_backward<kDtype, 96>(args, rotated, stream);
  launch_backward<kDtype, 128>(args, rotated, stream);
}

void launch_backward_f32(const RopeAttentionBackwardArgs& args, const Sides& rotated, cudaStream_t stream) {
  const RopeAttentionArgs& f = args.forward;
  using Walk = AttentionBackwardF32Walk;
  Walk queries = make_walk<Walk, float>(args, rotated, false, 4, 1);
  Walk keys = make_walk<Walk, float>(args, rotated, true, 4, 1);
  queries.D = keys.D = f.D;
  if (f.Nq > 0)
    launch<attention_backward_f32<false>>(grid_of(f.Nq / kAttentionWarps + f.S, f.A), kAttentionThreads, 0, stream,
                                          queries);
  if (f.Nk > 0)
    launch<attention_backward_f32<true>>(grid_of(f.Nk / kAttentionWarps + f.S, f.A), kAttentionThreads, 0, stream,
                                         keys);
}

void launch_delta(const RopeAttentionBackwardArgs& args, cudaStream_t stream) {
  const RopeAttentionArgs& f = args.forward;
  if (f.Nq == 0) return;
  const int64_t size = dtype_size(f.dtype);
  const DeltaWalk walk = {in_bytes(args.grad, size), in_bytes(f.out, size),    args.delta, f.Nq,
                          static_cast<int32_t>(f.A), static_cast<int32_t>(f.D)};
  const dim3 grid = grid_of(ceil_div(f.Nq * f.A, kAttentionThreads));
  if (f.dtype == HK_F32)
    launch<attention_delta<HK_F32>>(grid, kAttentionThreads, 0, stream, walk);
  else if (f.dtype == HK_BF16)
    launch<attention_delta<HK_BF16>>(grid, kAttentionThreads, 0, stream, walk);
  else
    launch<attention_delta<HK_F16>>(grid, kAttentionThreads, 0, stream, walk);
}

}  // namespace

int rope_attention_backward_cuda(const RopeAttentionBackwardArgs& args, void* stream_handle) {
  const char* op = "rope_attention_backward";
  const RopeAttentionArgs& f = args.forward;
  HK_RETURN_IF_ERROR(check_head_dim(op, f.D));
  HK_RETURN_IF_ERROR(check_packed(op, "q", f.q, f.Nq, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "k", f.k, f.Nk, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "v", f.v, f.Nk, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "out", f.out, f.Nq, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "grad", args.grad, f.Nq, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "grad_q", args.grad_q, f.Nq, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "grad_k", args.grad_k, f.Nk, f.A, f.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "grad_v", args.grad_v, f.Nk, f.A, f.dtype));
  if (f.A == 0) return HK_OK;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const Sides rotated = {dense_heads(args.q_rotated, f.A, f.D), dense_heads(f.k_rotated, f.A, f.D)};
  launch_rotate(f.q, rotated.q, f.positions_q, f.rope, f.Nq, f.A, f.dtype, false, stream);
  launch_rotate(f.k, rotated.k, f.positions_k, f.rope, f.Nk, f.A, f.dtype, false, stream);
  launch_delta(args, stream);
  if (f.dtype == HK_F32)
    launch_backward_f32(args, rotated, stream);
  else if (f.dtype == HK_BF16)
    launch_backward_of<HK_BF16>(args, rotated, stream);
  else
    launch_backward_of<HK_F16>(args, rotated, stream);
  return launch_status(op);
}

}  // namespace hk
