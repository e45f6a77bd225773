"""bias_gelu in plain torch: what every backend must equal."""

from __future__ import annotations

import math

import torch

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def bias_gelu(
    x: torch.Tensor,  # [N, E]
    bias: torch.Tensor | None,  # [E]
    approximate: str,
) -> torch.Tensor:  # [N, E]
    u = _biased(x, bias)
    if approximate == "tanh":
        y = 0.5 * u * (1 + torch.tanh(SQRT_2_OVER_PI * (u + CUBIC * u**3)))
    else:
        y = 0.5 * u * (1 + torch.erf(u * math.sqrt(0.5)))
    return y.to(x.dtype)


def bias_gelu_backward(
    grad: torch.Tensor,  # [N, E]
    x: torch.Tensor,  # [N, E]
    bias: torch.Tensor | None,  # [E]
    approximate: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # of x [N, E], of bias [E] or [0]
    u = _biased(x, bias)
    if approximate == "tanh":
        t = torch.tanh(SQRT_2_OVER_PI * (u + CUBIC * u**3))
        slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * u * u)
    else:
        slope = 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    grad_x = grad.to(u.dtype) * slope
    grad_bias = x.new_empty(0) if bias is None else grad_x.sum(0).to(bias.dtype)
    return grad_x.to(x.dtype), grad_bias


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    return u if bias is None else u + bias.to(u.dtype)
