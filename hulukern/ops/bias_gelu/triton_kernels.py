"""bias_gelu in Triton: a program owns columns, holds their bias, and takes turns at the rows.

The tanh form is u * sigmoid(2 z), z = sqrt(2/pi) (u + 0.044715 u**3): one exponential.

Bytes, of N rows of E values of b bytes: forward 2 N E b + E b, what the spec counts. Backward 3 N E b + E b,
and the G groups of rows write E sums of 4 bytes and read them again: at N = 8192, E = 4304, b = 2, G = 118
another 4.1 MB to 211 MB, 1.02 of the spec's count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hulukern.ops.common import rows_dense
from hulukern.ops.triton_common import architecture, rounded, sum_columns, taken_strides, unit_of
from hulukern.tuning import Row, row

# Columns of a tile: 1 KiB of a row in 16 bit.
_BLOCK_E = 512


@triton.jit
def _sigmoid_of_tanh_form(u):
    """0.5 (1 + tanh z)."""
    z2 = 1.5957691216057308 * (u + 0.044715 * u * u * u)
    return 1.0 / (1.0 + tl.exp(-z2))


@triton.jit
def _normal_cdf(u):
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit(do_not_specialize=["N"])
def bias_gelu_kernel(
    x,  # [N, E] at stride_x
    bias,  # [E]
    y,  # [N, E]
    N,
    stride_x,  # in units of UNIT elements
    E: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid (tiles of E, groups of rows)"""
    b_col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    m_col = b_col < E
    b_bias = tl.load(bias + b_col, mask=m_col, other=0).to(tl.float32) if BIAS else 0.0
    for i_tile in range(tl.program_id(1).to(tl.int64), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        b_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        m = (b_row < N) & m_col
        u = tl.load(x + b_row * stride_x * UNIT + b_col, mask=m, other=0).to(tl.float32) + b_bias
        b_y = u * (_sigmoid_of_tanh_form(u) if TANH else _normal_cdf(u))
        tl.store(y + b_row * E + b_col, rounded(b_y, y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N"])
def bias_gelu_backward_kernel(
    grad,  # [N, E] at stride_grad
    x,  # [N, E] at stride_x
    bias,  # [E]
    grad_x,  # [N, E]
    partials,  # [groups, E] f32, of the bias
    N,
    stride_grad,  # in units of UNIT elements
    stride_x,
    E: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid (tiles of E, groups of rows)"""
    b_col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    m_col = b_col < E
    b_bias = tl.load(bias + b_col, mask=m_col, other=0).to(tl.float32) if BIAS else 0.0
    of_bias = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for i_tile in range(tl.program_id(1).to(tl.int64), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        b_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        m = (b_row < N) & m_col
        b_grad = tl.load(grad + b_row * stride_grad * UNIT + b_col, mask=m, other=0).to(tl.float32)
        u = tl.load(x + b_row * stride_x * UNIT + b_col, mask=m, other=0).to(tl.float32) + b_bias
        if TANH:
            # Beyond 40 the slope is 1 or 0, while powers of u overflow. NaN stays.
            u = tl.where(u < -40.0, -40.0, tl.where(u > 40.0, 40.0, u))
            s = _sigmoid_of_tanh_form(u)
            slope = s + u * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * u * u))
        else:
            slope = _normal_cdf(u) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        b_out = b_grad * slope
        tl.store(grad_x + b_row * E + b_col, rounded(b_out, grad_x.dtype.element_ty), mask=m)
        if BIAS:
            of_bias += b_out
    if BIAS:
        b_col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
        tl.store(partials + tl.program_id(1).to(tl.int64) * E + b_col, tl.sum(of_bias, 0), mask=b_col < E)


def _grid_and_tile(chosen: Row, N: int, E: int) -> tuple[tuple[int, int], dict[str, Any]]:
    block_e = min(_BLOCK_E, triton.next_power_of_2(E))
    block_n = max(1, chosen.blocks["TILE"] // block_e)
    columns, rows = triton.cdiv(E, block_e), triton.cdiv(N, block_n)
    grid = columns, min(rows, triton.cdiv(chosen.blocks["PROGRAMS"], columns))
    return grid, {"BLOCK_N": block_n, "BLOCK_E": block_e, "num_warps": chosen.warps}


def bias_gelu(
    x: torch.Tensor,  # [N, E]
    bias: torch.Tensor | None,  # [E]
    approximate: str,
) -> torch.Tensor:  # [N, E]
    N, E = x.shape
    x = rows_dense(x, 1)
    y = torch.empty((N, E), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    grid, tile = _grid_and_tile(row("bias_gelu", architecture(x.device)), N, E)
    (stride,) = taken_strides(x, (0,))
    unit = unit_of(x, stride)
    with torch.cuda.device_of(x):
        bias_gelu_kernel[grid](
            x,
            x if bias is None else bias.contiguous(),
            y,
            N,
            stride // unit,
            E=E,
            UNIT=unit,
            BIAS=bias is not None,
            TANH=approximate == "tanh",
            **tile,
        )
    return y


def bias_gelu_backward(
    grad: torch.Tensor,  # [N, E]
    x: torch.Tensor,  # [N, E]
    bias: torch.Tensor | None,  # [E]
    approximate: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # of x [N, E], of bias [E] or [0]
    N, E = x.shape
    grad, x = rows_dense(grad, 1), rows_dense(x, 1)
    grad_x = torch.empty((N, E), dtype=x.dtype, device=x.device)
    grad_bias = torch.empty(0 if bias is None else E, dtype=x.dtype, device=x.device)
    if E == 0:
        return grad_x, grad_bias
    grid, tile = _grid_and_tile(row("bias_gelu_backward", architecture(x.device)), N, E)
    partials = torch.empty((1, grid[1], 0 if bias is None else E), dtype=torch.float32, device=x.device)
    strides = (*taken_strides(grad, (0,)), *taken_strides(x, (0,)))
    unit = unit_of(x, *strides)
    if N:
        with torch.cuda.device_of(x):
            bias_gelu_backward_kernel[grid](
                grad,
                x,
                x if bias is None else bias.contiguous(),
                grad_x,
                partials,
                N,
                *(stride // unit for stride in strides),
                E=E,
                UNIT=unit,
                BIAS=bias is not None,
                TANH=approximate == "tanh",
                **tile,
            )
    if bias is not None:
        sum_columns(partials, grad_bias)
    return grad_x, grad_bias
