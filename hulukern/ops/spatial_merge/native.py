"""spatial_merge through the C ABI, on the CPU and on CUDA alike."""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, row_stretches, rows_dense


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def spatial_merge(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    merge_size: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = rows_dense(x, 1)
    area = merge_size**2
    K = x.shape[0] // area if keep is None else keep.shape[0]
    out = torch.empty((K, x.shape[1]), dtype=x.dtype, device=x.device)
    rows = (0, 0) if weight is None else (K, area)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    statistics = (None, None) if weight is None else (mean, rstd)
    _C.spatial_merge(
        *native_target(x), x, _dense(weight), _dense(bias), _dense(keep), out, *statistics, merge_size, eps
    )  # fmt: skip
    return out, mean, rstd


def spatial_merge_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    keep: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    merge_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = rows_dense(x, 1)
    target = native_target(x)
    E = x.shape[1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    like = x if weight is None else weight
    size = 0 if weight is None else E
    grad_weight = torch.empty(size, dtype=like.dtype, device=x.device)
    grad_bias = torch.empty(size, dtype=like.dtype, device=x.device)
    of_norm: tuple[torch.Tensor | None, ...] = (None,) * 5
    if weight is not None:
        partial = torch.empty((row_stretches(grad.shape[0], target[0]), 2, E), dtype=torch.float32, device=x.device)
        of_norm = (mean.contiguous(), rstd.contiguous(), grad_weight, grad_bias, partial)
    _C.spatial_merge_backward(
        *target, rows_dense(grad, 1), x, _dense(weight), _dense(keep), *of_norm[:2], grad_x,
        *of_norm[2:], merge_size,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias
