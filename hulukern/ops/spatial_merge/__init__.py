"""spatial_merge: M x M patches to one token, for the cells that are kept."""

from __future__ import annotations

from typing import Any

import torch

from hulukern.ops.spatial_merge.spec import SPATIAL_MERGE, SPATIAL_MERGE_BACKWARD
from hulukern.registry import register


def _fake(x: torch.Tensor, weight: Any, bias: Any, keep: Any, merge_size: int, eps: float) -> tuple[Any, ...]:
    area = merge_size**2
    K = x.shape[0] // area if keep is None else keep.shape[0]
    mean = x.new_empty((0, 0) if weight is None else (K, area), dtype=torch.float32)
    return x.new_empty((K, x.shape[1])), mean, torch.empty_like(mean)


def _fake_backward(
    grad: Any, x: torch.Tensor, weight: Any, keep: Any, mean: Any, rstd: Any, merge_size: int
) -> tuple[Any, ...]:
    of_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), of_weight, torch.empty_like(of_weight)


_backward_op = register(SPATIAL_MERGE_BACKWARD, __name__, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _bias, keep, ctx.merge_size, _eps, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, keep, mean, rstd)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, keep, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _backward_op(grad, x, weight, keep, mean, rstd, ctx.merge_size, ctx.backend)
    of_norm = (None, None) if weight is None else (grad_weight, grad_bias)
    return grad_x, *of_norm, None, None, None, None


_op = register(SPATIAL_MERGE, __name__, _fake, _backward, _setup)


def spatial_merge(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    merge_size: int = 2,
    keep: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean over the M x M patches of each cell; with ``weight`` and ``bias`` after a LayerNorm of every patch.

    Args:
        x: ``[N, E]`` float32, bfloat16 or float16, patch rows in merge-block order, so that the M² rows of a
            cell are adjacent. N divisible by M².
        weight, bias: ``[E]`` of the LayerNorm, one dtype, both or neither.
        merge_size: M.
        keep: ``[K]`` int64, strictly increasing: merge these cells only. On a CUDA device the values are
            not checked, since reading them would stall the stream.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        ``[K, E]`` in x's dtype, fp32 inside, rounded once. Differentiable in x, weight and bias.

    Raises:
        TypeError: wrong type or dtype. ValueError: shapes, ``keep`` not increasing or not below N / M².
        BackendUnavailable: the backend cannot run here.

    Source: Hulu-Med's ``post_layernorm`` and bilinear resize by 1 / M, which for M = 2 is this mean.
    """
    return _op(x, weight, bias, keep, merge_size, eps, backend or "")[0]
