"""token_compact on the CPU, through the C ABI."""

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
    count = torch.empty(1, dtype=torch.int64)
    if bound is None:
        bound = int(torch.count_nonzero(keep)) if keep.dtype == torch.bool else keep.shape[0]
        n_kept = bound
    else:
        n_kept = -1
    index = torch.empty(bound, dtype=torch.int64)
    position_ids = torch.empty(bound, dtype=torch.int64)
    if cu_seqlens is None:
        cu_seqlens_out = torch.empty(2, dtype=torch.int32)
    else:
        cu_seqlens = cu_seqlens.contiguous()
        cu_seqlens_out = torch.empty(cu_seqlens.shape, dtype=torch.int32)
    target = native_target(keep)
    _C.token_compact_index(*target, keep, cu_seqlens, index, position_ids, cu_seqlens_out, count, n_rows)
    outputs = []
    if n_kept < 0:
        n_kept = min(int(count), bound)
    for x, value in zip(tensors, fill, strict=True):
        x = rows_dense(x, x.dim() - 1)
        out = torch.empty((bound, *x.shape[1:]), dtype=x.dtype)
        _C.token_compact_rows(*target, x, index, out)
        if n_kept < bound:
            out[n_kept:] = value
        outputs.append(out)
    return outputs, index, position_ids, cu_seqlens_out, count


def token_compact_backward(grad: torch.Tensor, index: torch.Tensor, n_rows: int) -> torch.Tensor:
    grad = rows_dense(grad, grad.dim() - 1)
    out = torch.empty((n_rows, *grad.shape[1:]), dtype=grad.dtype)
    _C.token_compact_rows_backward(*native_target(grad), grad, index.contiguous(), out)
    return out
