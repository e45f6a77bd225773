"""layer_norm: LayerNorm of a residual sum, with the sum."""

from __future__ import annotations

from typing import Any, overload

import torch

from hulukern.ops.common import as_rows
from hulukern.ops.layer_norm.spec import LAYER_NORM, LAYER_NORM_BACKWARD
from hulukern.registry import register


def _fake(x: torch.Tensor, residual: Any, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[Any, ...]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    summed = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), summed, statistics, torch.empty_like(statistics)


def _fake_backward(
    grad: torch.Tensor, grad_summed: Any, summed: torch.Tensor, weight: torch.Tensor, mean: Any, rstd: Any
) -> tuple[Any, ...]:
    return summed.new_empty(summed.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


_backward_op = register(LAYER_NORM_BACKWARD, __name__, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, _bias, _eps, ctx.backend = inputs
    _, summed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual = residual is not None
    if not ctx.has_residual:
        ctx.mark_non_differentiable(summed)
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, mean, rstd)


def _backward(ctx: Any, grad: torch.Tensor, grad_summed: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    summed, weight, mean, rstd = ctx.saved_tensors
    other = grad_summed if ctx.has_residual else None
    grad_x, grad_weight, grad_bias = _backward_op(grad, other, summed, weight, mean, rstd, ctx.backend)
    return grad_x, grad_x if ctx.has_residual else None, grad_weight, grad_bias, None, None


_op = register(LAYER_NORM, __name__, _fake, _backward, _setup)


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = ..., backend: str | None = ...
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, residual: torch.Tensor, eps: float = ...,
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension, of ``x`` or of ``x + residual``.

    Args:
        x: ``[..., E]`` float32, bfloat16 or float16.
        weight, bias: ``[E]`` of one dtype, x's or another.
        residual: ``[..., E]``, x's dtype.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        ``[..., E]`` in x's dtype; with ``residual`` (that, ``x + residual``). The sum is rounded to x's
        dtype first and normalised as it then is. Statistics and arithmetic are fp32. Differentiable in all
        four tensors, and through both results.

    Raises:
        TypeError: wrong type or dtype. ValueError: shapes, eps below 0. BackendUnavailable: the backend
        cannot run here.

    Source: Hulu-Med's encoder blocks, where every LayerNorm but the first follows a residual add.
    """
    rows = as_rows("layer_norm", "x", x)
    added = None if residual is None else as_rows("layer_norm", "residual", residual)
    y, summed, _, _ = _op(rows, added, weight, bias, eps, backend or "")
    return y.view(x.shape) if residual is None else (y.view(x.shape), summed.view(x.shape))
