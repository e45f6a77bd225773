"""token_compact through the C ABI, on the CPU and on CUDA alike. With a bound nothing waits for the device."""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, rows_dense
from hulukern.ops.token_compact.reference import Outputs


def token_compact(
    keep: torch.Tensor,
    tensors: list[torch.Tensor],
    cu_seqlens: torch.Tensor | None,
    n_rows: int,
    bound: int | None,
    fill: list[int],
) -> Outputs:
    keep = keep.contiguous()
    device = keep.device
    target = native_target(keep)
    count = torch.empty(1, dtype=torch.int64, device=device)
    padded = bound is not None
    if bound is None:
        bound = int(torch.count_nonzero(keep)) if keep.dtype == torch.bool else keep.shape[0]
    index = torch.empty(bound, dtype=torch.int64, device=device)
    position_ids = torch.empty(bound, dtype=torch.int64, device=device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    ends = 2 if cu_seqlens is None else cu_seqlens.shape[0]
    cu_seqlens_out = torch.empty(ends, dtype=torch.int32, device=device)
    _C.token_compact_index(*target, keep, cu_seqlens, index, position_ids, cu_seqlens_out, count, n_rows)
    outputs = []
    for x, value in zip(tensors, fill, strict=True):
        x = rows_dense(x, x.dim() - 1)
        out = torch.empty((bound, *x.shape[1:]), dtype=x.dtype, device=device)
        _C.token_compact_rows(*target, x, index, out, int(bool(value)) if x.dtype == torch.bool else value)
        if padded and not target[0]:
            out[min(int(count), bound) :] = value
        outputs.append(out)
    return outputs, index, position_ids, cu_seqlens_out, count


def token_compact_backward(grad: torch.Tensor, index: torch.Tensor, n_rows: int) -> torch.Tensor:
    grad = rows_dense(grad, grad.dim() - 1)
    out = torch.empty((n_rows, *grad.shape[1:]), dtype=grad.dtype, device=grad.device)
    _C.token_compact_rows_backward(*native_target(grad), grad, index.contiguous(), out)
    return out
