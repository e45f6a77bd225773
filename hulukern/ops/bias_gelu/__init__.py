"""bias_gelu: what stands between the two linear layers of an MLP."""

from __future__ import annotations

from typing import Any

import torch

from hulukern.ops.bias_gelu.spec import BIAS_GELU, BIAS_GELU_BACKWARD
from hulukern.ops.common import as_rows
from hulukern.registry import register


def _fake(x: torch.Tensor, bias: Any, approximate: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Any, x: torch.Tensor, bias: Any, approximate: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else bias.shape)


_backward_op = register(BIAS_GELU_BACKWARD, __name__, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _backward_op(grad, x, bias, *ctx.options)
    return grad_x, None if bias is None else grad_bias, None, None


_op = register(BIAS_GELU, __name__, _fake, _backward, _setup)


def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "tanh", backend: str | None = None
) -> torch.Tensor:
    """GELU of ``x + bias``, in fp32 inside.

    Args:
        x: ``[..., E]`` float32, bfloat16 or float16: a linear layer's product, its bias not yet added.
        bias: ``[E]``, x's dtype.
        approximate: ``"tanh"`` (Hulu-Med's encoder) or ``"none"``, the erf form (its projector).
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        ``[..., E]`` in x's dtype. Differentiable in both; only x is kept for the backward.

    Raises:
        TypeError: wrong type or dtype. ValueError: shapes, another ``approximate``. BackendUnavailable.
    """
    return _op(as_rows("bias_gelu", "x", x), bias, approximate, backend or "").view(x.shape)
