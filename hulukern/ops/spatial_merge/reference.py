"""spatial_merge in plain torch: what every backend must equal."""

from __future__ import annotations

import torch

from hulukern.ops.common import rstd_of
from hulukern.validation import fail


def spatial_merge(
    x: torch.Tensor,  # [N, E] in merge-block order
    weight: torch.Tensor | None,  # [E]
    bias: torch.Tensor | None,  # [E]
    keep: torch.Tensor | None,  # [K] i64, strictly increasing cells
    merge_size: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [K, E], mean and rstd [K, M*M] f32, or [0, 0]
    wide = torch.promote_types(x.dtype, torch.float32)
    check_keep(keep, x.shape[0] // merge_size**2)
    cells = _chosen(x, keep, merge_size).to(wide)
    if weight is None or bias is None:
        return cells.mean(1).to(x.dtype), x.new_empty((0, 0), dtype=wide), x.new_empty((0, 0), dtype=wide)
    mean = cells.mean(-1, keepdim=True)
    rstd = rstd_of(cells, eps)[..., None]
    merged = ((cells - mean) * rstd).mean(1) * weight.to(wide) + bias.to(wide)
    return merged.to(x.dtype), mean.squeeze(-1).detach(), rstd.squeeze(-1).detach()


def spatial_merge_backward(
    grad: torch.Tensor,  # [K, E]
    x: torch.Tensor,  # [N, E]
    weight: torch.Tensor | None,  # [E]
    keep: torch.Tensor | None,  # [K] i64
    mean: torch.Tensor,  # [K, M*M], or [0, 0]
    rstd: torch.Tensor,  # [K, M*M], or [0, 0]
    merge_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # of x [N, E], weight [E], bias [E] (or [0])
    area = merge_size**2
    wide = torch.promote_types(x.dtype, torch.float32)
    g = grad.to(wide)
    each = (g / area)[:, None].expand(-1, area, -1)  # [K, M*M, E]
    grad_weight = grad_bias = x.new_empty(0)
    if weight is not None:
        normed = (_chosen(x, keep, merge_size).to(wide) - mean[..., None]) * rstd[..., None]
        grad_weight, grad_bias = (each * normed).sum((0, 1)).to(weight.dtype), g.sum(0).to(weight.dtype)
        gw = each * weight.to(wide)
        centred = gw - gw.mean(-1, keepdim=True) - normed * (gw * normed).mean(-1, keepdim=True)
        each = rstd[..., None] * centred
    grad_x = x.new_zeros((x.shape[0] // area, area, x.shape[1]))
    grad_x[slice(None) if keep is None else keep] = each.to(x.dtype)
    return grad_x.view(x.shape), grad_weight, grad_bias


def _chosen(x: torch.Tensor, keep: torch.Tensor | None, merge_size: int) -> torch.Tensor:
    """[N, E] -> [K, M*M, E]"""
    cells = x.reshape(x.shape[0] // merge_size**2, merge_size**2, x.shape[1])
    return cells if keep is None else cells[keep]


def check_keep(keep: torch.Tensor | None, cells: int) -> None:
    """Strictly increasing and below ``cells``, where looking does not stall a device."""
    if keep is None or keep.numel() == 0 or keep.device.type != "cpu":
        return
    if keep.numel() > 1 and bool((keep[1:] <= keep[:-1]).any()):
        fail("spatial_merge", "keep", "cells that do not rise", "strictly increasing ones")
    first, last = int(keep[0]), int(keep[-1])
    if first < 0 or last >= cells:
        fail("spatial_merge", "keep", f"cells {first} to {last}", f"0 to below N / merge_size**2 = {cells}")
