"""layer_norm in plain torch: what every backend must equal."""

from __future__ import annotations

import torch

from hulukern.ops.common import rstd_of

Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def layer_norm(
    x: torch.Tensor,  # [N, E]
    residual: torch.Tensor | None,  # [N, E]
    weight: torch.Tensor,  # [E]
    bias: torch.Tensor,  # [E]
    eps: float,
) -> Forward:  # y [N, E], summed [N, E] or [0], mean [N], rstd [N] f32
    wide = torch.promote_types(x.dtype, torch.float32)
    # The sum is rounded before it is normalised: what is normalised is what the next layer adds to.
    summed = x if residual is None else (x.to(wide) + residual.to(wide)).to(x.dtype)
    rows = summed.to(wide)
    mean = rows.mean(-1, keepdim=True)
    rstd = rstd_of(rows, eps)[:, None]
    y = ((rows - mean) * rstd * weight.to(wide) + bias.to(wide)).to(x.dtype)
    out = x.new_empty(0) if residual is None else summed
    return y, out, mean.flatten().detach(), rstd.flatten().detach()


def layer_norm_backward(
    grad: torch.Tensor,  # [N, E]
    grad_summed: torch.Tensor | None,  # [N, E]
    summed: torch.Tensor,  # [N, E], x where there was no residual
    weight: torch.Tensor,  # [E]
    mean: torch.Tensor,  # [N]
    rstd: torch.Tensor,  # [N]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # of x and residual [N, E], weight [E], bias [E]
    wide = torch.promote_types(summed.dtype, torch.float32)
    g = grad.to(wide)
    normed = (summed.to(wide) - mean[:, None]) * rstd[:, None]
    gw = g * weight.to(wide)
    grad_x = rstd[:, None] * (gw - gw.mean(-1, keepdim=True) - normed * (gw * normed).mean(-1, keepdim=True))
    if grad_summed is not None:
        grad_x = grad_x + grad_summed.to(wide)
    return grad_x.to(summed.dtype), (g * normed).sum(0).to(weight.dtype), g.sum(0).to(weight.dtype)
