"""layer_norm through the C ABI, on the CPU and on CUDA alike."""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, row_stretches, rows_dense


def layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = rows_dense(x, 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    _C.layer_norm(
        *native_target(x), x, None if residual is None else rows_dense(residual, 1), weight.contiguous(),
        bias.contiguous(), y, None if residual is None else summed, mean, rstd, eps,
    )  # fmt: skip
    return y, summed, mean, rstd


def layer_norm_backward(
    grad: torch.Tensor,
    grad_summed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    summed, weight = rows_dense(summed, 1), weight.contiguous()
    target = native_target(summed)
    N, E = summed.shape
    grad_x = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    grad_weight = torch.empty(E, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(E, dtype=weight.dtype, device=weight.device)
    partial = torch.empty((row_stretches(N, target[0]), 2, E), dtype=torch.float32, device=summed.device)
    _C.layer_norm_backward(
        *target, rows_dense(grad, 1), None if grad_summed is None else rows_dense(grad_summed, 1),
        summed, weight, mean.contiguous(), rstd.contiguous(), grad_x, grad_weight, grad_bias, partial,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias
