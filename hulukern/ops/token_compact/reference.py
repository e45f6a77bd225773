"""token_compact in plain torch: what every backend must equal."""

from __future__ import annotations

import torch

from hulukern.ops.common import check_cu_seqlens
from hulukern.validation import fail

Outputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def token_compact(
    keep: torch.Tensor,  # [N] bool, or [K] i64 strictly increasing
    tensors: list[torch.Tensor],  # each [N, ...]
    cu_seqlens: torch.Tensor | None,  # [S+1] i32
    n_rows: int,
    bound: int | None,
    fill: list[int],
) -> Outputs:  # rows [B, ...], index [B] i64, position_ids [B] i64, cu_seqlens [S+1] i32, count [1] i64
    check_values(keep, cu_seqlens, n_rows)
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
    check_index(index, n_rows)
    out = grad.new_zeros((n_rows, *grad.shape[1:]))
    kept = index >= 0
    out[index[kept]] = grad[kept]
    return out


def check_values(keep: torch.Tensor, cu_seqlens: torch.Tensor | None, n_rows: int) -> None:
    """Rows strictly increasing and below N, ends from 0 to N and never falling; where looking does not stall a
    device."""
    if cu_seqlens is not None:
        check_cu_seqlens("token_compact", "cu_seqlens", cu_seqlens, n_rows)
    if keep.dtype == torch.bool or keep.device.type != "cpu" or not keep.numel():
        return
    wrong = torch.ones_like(keep, dtype=torch.bool)
    wrong[1:] = keep[1:] <= keep[:-1]
    wrong[0] = keep[0] < 0
    wrong |= keep >= n_rows
    if wrong.any():
        at = int(wrong.nonzero()[0])
        came = f"row {int(keep[at])} at {at}"
        fail("token_compact", "keep", came, f"strictly increasing rows below N={n_rows}")


def check_index(index: torch.Tensor, n_rows: int) -> None:
    """-1 or below N, where looking does not stall a device."""
    if index.device.type != "cpu":
        return
    outside = index[(index < -1) | (index >= n_rows)]
    if outside.numel():
        fail("token_compact_backward", "index", f"value {int(outside[0])}", f"-1 or below N={n_rows}")
