// rope_attention on CUDA, forward and rotary: checks what kernels ask for beyond the C ABI, and launches.
#include "ops/rope_attention/attention_f32.cuh"
#include "ops/rope_attention/launch.cuh"
#include "ops/rope_attention/rope_attention.cuh"

namespace hk {
namespace {

template <int kDtype, int kD>
void launch_forward(const RopeAttentionArgs& args, cudaStream_t stream) {
  const AttentionWalk walk = {in_bytes(args.q, 2),
                              in_bytes(dense_heads(args.k_rotated, args.A, args.D), 2),
                              in_bytes(args.v, 2),
                              static_cast<unsigned char*>(args.out.data),
                              args.out.row * 2,
                              args.out.head * 2,
                              args.lse,
                              args.positions_q,
                              args.cu_seqlens_q,
                              args.cu_seqlens_k,
                              args.Nq,
                              static_cast<int32_t>(args.S),
                              args.scale,
                              args.rope};
  launch<attention_forward<kDtype, kD>>(grid_of(args.Nq / kQueryRows<kD> + args.S, args.A), kAttentionThreads,
                                        kAttentionSharedBytes<kD>, stream, walk);
}

template <int kDtype>
void launch_forward_of(const RopeAttentionArgs& args, cudaStream_t stream) {
  if (args.D == 64) return launch_forward<kDtype, 64>(args, stream);
  if (args.D == 72) return launch_forward<kDtype, 72>(args, stream);
  if (args.D == 80) return launch_forward<kDtype, 80>(args, stream);
  if (args.D == 96) return launch_forward<kDtype, 96>(args, stream);
  launch_forward<kDtype, 128>(args, stream);
}

void launch_forward_f32(const RopeAttentionArgs& args, cudaStream_t stream) {
  const AttentionF32Walk walk = {in_bytes(args.q, 4),
                                 in_bytes(dense_heads(args.k_rotated, args.A, args.D), 4),
                                 in_bytes(args.v, 4),
                                 static_cast<float*>(args.out.data),
                                 args.out.row,
                                 args.out.head,
                                 args.lse,
                                 args.positions_q,
                                 args.cu_seqlens_q,
                                 args.cu_seqlens_k,
                                 args.Nq,
                                 static_cast<int32_t>(args.S),
                                 args.D,
                                 args.scale,
                                 args.rope};
  launch<attention_forward_f32>(grid_of(args.Nq / kAttentionWarps + args.S, args.A), kAttentionThreads, 0, stream,
                                walk);
}

}  // namespace

int rope_attention_cuda(const RopeAttentionArgs& args, void* stream_handle) {
  const char* op = "rope_attention";
  HK_RETURN_IF_ERROR(check_head_dim(op, args.D));
  HK_RETURN_IF_ERROR(check_packed(op, "q", args.q, args.Nq, args.A, args.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "k", args.k, args.Nk, args.A, args.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "v", args.v, args.Nk, args.A, args.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "out", args.out, args.Nq, args.A, args.dtype));
  if (args.Nq * args.A == 0) return HK_OK;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  launch_rotate(args.k, dense_heads(args.k_rotated, args.A, args.D), args.positions_k, args.rope, args.Nk, args.A,
                args.dtype, false, stream);
  if (args.dtype == HK_F32)
    launch_forward_f32(args, stream);
  else if (args.dtype == HK_BF16)
    launch_forward_of<HK_BF16>(args, stream);
  else
    launch_forward_of<HK_F16>(args, stream);
  return launch_status(op);
}

int rope_attention_rotate_cuda(const RopeAttentionRotateArgs& args, void* stream) {
  const char* op = "rope_attention_rotate";
  HK_RETURN_IF_ERROR(check_head_dim(op, args.D));
  HK_RETURN_IF_ERROR(check_packed(op, "x", args.x, args.N, args.A, args.dtype));
  HK_RETURN_IF_ERROR(check_packed(op, "out", args.out, args.N, args.A, args.dtype));
  launch_rotate(args.x, args.out, args.positions, args.rope, args.N, args.A, args.dtype, args.inverse != 0,
                static_cast<cudaStream_t>(stream));
  return launch_status(op);
}

}  // namespace hk
