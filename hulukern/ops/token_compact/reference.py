"""token_compact in plain torch: what every backend must equal."""

from __future__ import annotations

import torch

Outputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def token_compact(
    keep: torch.Tensor,  # [N] bool, or [K] i64 strictly increasing
    tensors: list[torch.Tensor],  # each [N, ...]
    cu_seqlens: torch.Tensor | None,  # [S+1] i32
    n_rows: int,
    bound: int | None,
    fill: list[int],
) -> Outputs:  # rows [B, ...], index [B] i64, position_ids [B] i64, cu_seqlens [S+1] i32, count [1] i64
    rows = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
    count = rows.numel()
    size = count if bound is None else bound
    rows = rows[:size]
    device = keep.device
    ends = torch.tensor([0, n_rows], device=device) if cu_seqlens is None else cu_seqlens.long()
    new_ends = torch.searchsorted(rows.contiguous(), ends)
    sequence = torch.searchsorted(new_ends[1:].contiguous(), torch.arange(rows.numel(), device=device), right=True)
    index = torch.full((size,), -1, dtype=torch.int64, device=device)
    index[: rows.numel()] = rows
    position_ids = torch.zeros(size, dtype=torch.int64, device=device)
    position_ids[: rows.numel()] = torch.arange(rows.numel(), device=device) - new_ends[sequence]
    outputs = []
    for x, value in zip(tensors, fill, strict=True):
        out = x.new_full((size, *x.shape[1:]), value)
        out[: rows.numel()] = x[rows]
        outputs.append(out)
    return outputs, index, position_ids, new_ends.int(), torch.tensor([count], device=device)


def token_compact_backward(grad: torch.Tensor, index: torch.Tensor, n_rows: int) -> torch.Tensor:
    """``[B, ...]`` and ``[B]`` -> ``[n_rows, ...]``: what was not kept gets zero."""
    out = grad.new_zeros((n_rows, *grad.shape[1:]))
    kept = index >= 0
    out[index[kept]] = grad[kept]
    return out
