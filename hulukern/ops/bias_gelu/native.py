"""bias_gelu through the C ABI, on the CPU and on CUDA alike."""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, row_stretches, rows_dense

_GELU = {"tanh": 0, "none": 1}


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    x = rows_dense(x, 1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _C.bias_gelu(*native_target(x), x, None if bias is None else bias.contiguous(), out, _GELU[approximate])
    return out


def bias_gelu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, approximate: str
) -> tuple[torch.Tensor, torch.Tensor]:
    x = rows_dense(x, 1)
    target = native_target(x)
    N, E = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_bias = torch.empty(0 if bias is None else E, dtype=x.dtype, device=x.device)
    partial = (
        None if bias is None else torch.empty((row_stretches(N, target[0]), E), dtype=torch.float32, device=x.device)
    )
    _C.bias_gelu_backward(
        *target, rows_dense(grad, 1), x, None if bias is None else bias.contiguous(), grad_x,
        None if bias is None else grad_bias, partial, _GELU[approximate],
    )  # fmt: skip
    return grad_x, grad_bias
