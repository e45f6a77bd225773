"""layer_norm in Triton: rows stay in registers between the statistics and the result.

Programs take turns at the rows and hold weight and bias. The variance is taken of centred values.

Bytes, forward, of rows of E values of b bytes: x (and residual) read once, y (and the sum) written once, 8 a
row for the statistics, 2 E b for weight and bias in each program's first turn (from L2 after the first):
(2 or 4) N E b + 8 N + 2 E b, what the spec counts. Backward: grad, the sum (and grad_summed) read once, grad_x
written once, and 8 P E written and read again by the P = 132 programs: at N = 8192, E = 1152, b = 2 and a
residual 75.5 MB + 2.4 MB, 1.03 of the spec's count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hulukern.ops.common import rows_dense
from hulukern.ops.layer_norm.reference import Forward
from hulukern.ops.triton_common import architecture, rounded, row_tile, sum_columns, taken_strides, unit_of
from hulukern.tuning import row


@triton.jit(do_not_specialize=["N"])
def layer_norm_kernel(
    x,  # [N, E] at stride_x
    residual,  # [N, E] at stride_residual
    weight,  # [E]
    bias,  # [E]
    y,  # [N, E]
    summed,  # [N, E]
    mean,  # [N] f32
    rstd,  # [N] f32
    N,
    stride_x,  # in units of UNIT elements
    stride_residual,
    eps,
    E: tl.constexpr,
    UNIT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid: programs that take every so many tiles of BLOCK_N rows."""
    b_col = tl.arange(0, BLOCK_E)[None, :]
    m_col = b_col < E
    b_weight = tl.load(weight + b_col, mask=m_col, other=0).to(tl.float32)
    b_bias = tl.load(bias + b_col, mask=m_col, other=0).to(tl.float32)
    for i_tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        b_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        m_row = b_row < N
        m = m_row & m_col
        b_x = tl.load(x + b_row * stride_x * UNIT + b_col, mask=m, other=0).to(tl.float32)
        if RESIDUAL:
            b_x += tl.load(residual + b_row * stride_residual * UNIT + b_col, mask=m, other=0).to(tl.float32)
            b_sum = rounded(b_x, x.dtype.element_ty)
            tl.store(summed + b_row * E + b_col, b_sum, mask=m)
            b_x = b_sum.to(tl.float32)
        b_mean = tl.sum(b_x, 1, keep_dims=True) * (1.0 / E)
        b_x = tl.where(m_col, b_x - b_mean, 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1, keep_dims=True) * (1.0 / E) + eps)
        b_y = b_x * b_rstd * b_weight + b_bias
        tl.store(y + b_row * E + b_col, rounded(b_y, y.dtype.element_ty), mask=m)
        tl.store(mean + b_row, b_mean, mask=m_row)
        tl.store(rstd + b_row, b_rstd, mask=m_row)


@triton.jit(do_not_specialize=["N"])
def layer_norm_backward_kernel(
    grad,  # [N, E] at the strides below
    grad_summed,  # [N, E]
    summed,  # [N, E]
    weight,  # [E]
    mean,  # [N] f32
    rstd,  # [N] f32
    grad_x,  # [N, E]
    partials,  # [2, programs, E] f32, of weight and bias
    N,
    stride_grad,  # in units of UNIT elements
    stride_grad_summed,
    stride_summed,
    E: tl.constexpr,
    UNIT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid: as forward. grad_x = rstd (gw - mean(gw) - normed mean(gw normed)), gw = grad weight."""
    b_col = tl.arange(0, BLOCK_E)[None, :]
    m_col = b_col < E
    b_weight = tl.load(weight + b_col, mask=m_col, other=0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    of_bias = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for i_tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        b_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        m_row = b_row < N
        m = m_row & m_col
        b_grad = tl.load(grad + b_row * stride_grad * UNIT + b_col, mask=m, other=0).to(tl.float32)
        b_x = tl.load(summed + b_row * stride_summed * UNIT + b_col, mask=m, other=0).to(tl.float32)
        b_mean = tl.load(mean + b_row, mask=m_row, other=0)
        b_rstd = tl.load(rstd + b_row, mask=m_row, other=0)
        normed = tl.where(m_col, (b_x - b_mean) * b_rstd, 0.0)
        of_weight += b_grad * normed
        of_bias += b_grad
        gw = b_grad * b_weight
        mean_gw = tl.sum(gw, 1, keep_dims=True) * (1.0 / E)
        mean_gwn = tl.sum(gw * normed, 1, keep_dims=True) * (1.0 / E)
        b_out = b_rstd * (gw - mean_gw - normed * mean_gwn)
        if RESIDUAL:
            b_out += tl.load(grad_summed + b_row * stride_grad_summed * UNIT + b_col, mask=m, other=0).to(tl.float32)
        tl.store(grad_x + b_row * E + b_col, rounded(b_out, grad_x.dtype.element_ty), mask=m)
    p = partials + tl.program_id(0).to(tl.int64) * E + tl.arange(0, BLOCK_E)
    m_col = tl.arange(0, BLOCK_E) < E
    tl.store(p, tl.sum(of_weight, 0), mask=m_col)
    tl.store(p + tl.num_programs(0).to(tl.int64) * E, tl.sum(of_bias, 0), mask=m_col)


def layer_norm(
    x: torch.Tensor,  # [N, E]
    residual: torch.Tensor | None,  # [N, E]
    weight: torch.Tensor,  # [E]
    bias: torch.Tensor,  # [E]
    eps: float,
) -> Forward:  # y [N, E], summed [N, E] or [0], mean [N], rstd [N] f32
    N, E = x.shape
    x = rows_dense(x, 1)
    other = x if residual is None else rows_dense(residual, 1)
    y = torch.empty((N, E), dtype=x.dtype, device=x.device)
    summed = torch.empty(0 if residual is None else (N, E), dtype=x.dtype, device=x.device)
    mean = torch.empty(N, dtype=torch.float32, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    if N == 0:
        return y, summed, mean, rstd
    chosen = row("layer_norm", architecture(x.device))
    tile = row_tile("layer_norm", chosen, E)
    strides = (*taken_strides(x, (0,)), *taken_strides(other, (0,)))
    unit = unit_of(x, *strides)
    with torch.cuda.device_of(x):
        layer_norm_kernel[(min(triton.cdiv(N, tile["BLOCK_N"]), chosen.blocks["PROGRAMS"]),)](
            x,
            other,
            weight.contiguous(),
            bias.contiguous(),
            y,
            y if residual is None else summed,
            mean,
            rstd,
            N,
            *(stride // unit for stride in strides),
            eps,
            E=E,
            UNIT=unit,
            RESIDUAL=residual is not None,
            **tile,
        )
    return y, summed, mean, rstd


def layer_norm_backward(
    grad: torch.Tensor,  # [N, E]
    grad_summed: torch.Tensor | None,  # [N, E]
    summed: torch.Tensor,  # [N, E], x where there was no residual
    weight: torch.Tensor,  # [E]
    mean: torch.Tensor,  # [N]
    rstd: torch.Tensor,  # [N]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # of x and residual [N, E], weight [E], bias [E]
    N, E = summed.shape
    grad, summed = rows_dense(grad, 1), rows_dense(summed, 1)
    other = grad if grad_summed is None else rows_dense(grad_summed, 1)
    grad_x = torch.empty((N, E), dtype=summed.dtype, device=summed.device)
    grad_weight = torch.empty(E, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(E, dtype=weight.dtype, device=weight.device)
    chosen = row("layer_norm_backward", architecture(grad.device))
    tile = row_tile("layer_norm_backward", chosen, E)
    programs = min(triton.cdiv(N, tile["BLOCK_N"]), chosen.blocks["PROGRAMS"])
    partials = torch.empty((2, programs, E), dtype=torch.float32, device=grad.device)
    strides = tuple(taken_strides(t, (0,))[0] for t in (grad, other, summed))
    unit = unit_of(grad, *strides)
    if N:
        with torch.cuda.device_of(grad):
            layer_norm_backward_kernel[(programs,)](
                grad,
                other,
                summed,
                weight.contiguous(),
                mean.contiguous(),
                rstd.contiguous(),
                grad_x,
                partials,
                N,
                *(stride // unit for stride in strides),
                E=E,
                UNIT=unit,
                RESIDUAL=grad_summed is not None,
                **tile,
            )
    sum_columns(partials, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
