"""spatial_merge in Triton: a program takes a cell, its M x M rows in flight together.

Programs take turns at the kept cells and hold weight and bias; (row - mean) rstd is averaged first and scaled
once. Backwards a program owns a stretch of all cells, finds its first kept one by bisection and walks on, so
that dropped cells get their zeros in the same pass.

Bytes, of K cells of M**2 rows of E values of b bytes: forward K E b (M**2 + 1), 8 K M**2 for the statistics and
2 E b, what the spec counts; 8 K more for ``keep``. Backward K E b (M**2 + 1) read, N E b written, and 8 P E
written and read again by the P = 132 programs: at 4096 cells, 1843 kept, E = 1152, b = 2 another 2.4 MB to
59 MB, 1.04 of the spec's count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hulukern.ops.common import rows_dense
from hulukern.ops.spatial_merge.reference import check_keep
from hulukern.ops.triton_common import architecture, rounded, row_tile, sum_columns, taken_strides, unit_of
from hulukern.tuning import Row, row

# Rows of a cell that are unrolled; larger cells loop.
_UNROLLED = 16


@triton.jit
def _normed(
    p_row,
    mean,
    rstd,
    m_col,
    b_col,
):
    b_x = tl.load(p_row + b_col, mask=m_col, other=0).to(tl.float32)
    return tl.where(m_col, (b_x - mean) * rstd, 0.0)


@triton.jit(do_not_specialize=["K"])
def spatial_merge_kernel(
    x,  # [N, E] at stride_x
    weight,  # [E]
    bias,  # [E]
    keep,  # [K] i64
    y,  # [K, E]
    mean,  # [K, AREA] f32
    rstd,  # [K, AREA] f32
    K,
    stride_x,  # in units of UNIT elements
    eps,
    E: tl.constexpr,
    AREA: tl.constexpr,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid: programs that take every so many kept cells."""
    b_col = tl.arange(0, BLOCK_E)
    m_col = b_col < E
    if NORM:
        b_weight = tl.load(weight + b_col, mask=m_col, other=0).to(tl.float32)
        b_bias = tl.load(bias + b_col, mask=m_col, other=0).to(tl.float32)
    for i_kept in range(tl.program_id(0).to(tl.int64), K, tl.num_programs(0)):
        cell = tl.load(keep + i_kept) if KEEP else i_kept
        acc = tl.zeros([BLOCK_E], tl.float32)
        for j in tl.range(0, AREA, loop_unroll_factor=UNROLL):
            b_x = tl.load(x + (cell * AREA + j) * stride_x * UNIT + b_col, mask=m_col, other=0).to(tl.float32)
            if NORM:
                b_mean = tl.sum(b_x, 0) * (1.0 / E)
                b_x = tl.where(m_col, b_x - b_mean, 0.0)
                b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) * (1.0 / E) + eps)
                b_x *= b_rstd
                tl.store(mean + i_kept * AREA + j, b_mean)
                tl.store(rstd + i_kept * AREA + j, b_rstd)
            acc += b_x
        acc *= 1.0 / AREA
        if NORM:
            acc = acc * b_weight + b_bias
        tl.store(y + i_kept * E + b_col, rounded(acc, y.dtype.element_ty), mask=m_col)


@triton.jit
def _first_at_least(keep, K, cell):
    """How many of the rising ``keep`` are below ``cell``."""
    lo = cell * 0
    hi = lo + K
    while lo < hi:
        middle = (lo + hi) // 2
        below = tl.load(keep + middle) < cell
        lo = tl.where(below, middle + 1, lo)
        hi = tl.where(below, hi, middle)
    return lo


@triton.jit(do_not_specialize=["K", "n_cells", "chunk"])
def spatial_merge_backward_kernel(
    grad,  # [K, E] at stride_grad
    x,  # [N, E] at stride_x
    weight,  # [E]
    keep,  # [K] i64
    mean,  # [K, AREA] f32
    rstd,  # [K, AREA] f32
    grad_x,  # [N, E]
    partials,  # [2, programs, E] f32, of weight and bias
    K,
    n_cells,
    chunk,  # cells per program
    stride_grad,  # in units of UNIT elements
    stride_x,
    E: tl.constexpr,
    AREA: tl.constexpr,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid: stretches of all cells. A row's gradient is rstd (gw - mean(gw) - normed mean(gw normed)),
    gw = grad weight / AREA."""
    b_col = tl.arange(0, BLOCK_E)
    m_col = b_col < E
    dtype: tl.constexpr = grad_x.dtype.element_ty
    if NORM:
        b_weight = tl.load(weight + b_col, mask=m_col, other=0).to(tl.float32)
        of_weight = tl.zeros([BLOCK_E], tl.float32)
        of_bias = tl.zeros([BLOCK_E], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, n_cells)
    i_kept = _first_at_least(keep, K, begin) if KEEP else begin
    for cell in range(begin, end):
        kept = tl.load(keep + i_kept, mask=i_kept < K, other=-1) == cell if KEEP else True
        if kept:
            b_grad = tl.load(grad + i_kept * stride_grad * UNIT + b_col, mask=m_col, other=0).to(tl.float32)
            each = b_grad * (1.0 / AREA)
            if NORM:
                gw = each * b_weight
                mean_gw = tl.sum(gw, 0) * (1.0 / E)
                all_normed = tl.zeros([BLOCK_E], tl.float32)
                for j in tl.range(0, AREA, loop_unroll_factor=UNROLL):
                    p_row = x + (cell * AREA + j) * stride_x * UNIT
                    b_rstd = tl.load(rstd + i_kept * AREA + j)
                    normed = _normed(p_row, tl.load(mean + i_kept * AREA + j), b_rstd, m_col, b_col)
                    all_normed += normed
                    b_out = b_rstd * (gw - mean_gw - normed * (tl.sum(gw * normed, 0) * (1.0 / E)))
                    tl.store(grad_x + (cell * AREA + j) * E + b_col, rounded(b_out, dtype), mask=m_col)
                of_weight += each * all_normed
                of_bias += b_grad
            else:
                for j in tl.range(0, AREA, loop_unroll_factor=UNROLL):
                    tl.store(grad_x + (cell * AREA + j) * E + b_col, rounded(each, dtype), mask=m_col)
            i_kept += 1
        else:
            for j in tl.range(0, AREA, loop_unroll_factor=UNROLL):
                tl.store(grad_x + (cell * AREA + j) * E + b_col, tl.zeros([BLOCK_E], dtype), mask=m_col)
    if NORM:
        p = partials + tl.program_id(0).to(tl.int64) * E + b_col
        tl.store(p, of_weight, mask=m_col)
        tl.store(p + tl.num_programs(0).to(tl.int64) * E, of_bias, mask=m_col)


def _tile(chosen: Row, E: int) -> dict[str, int]:
    """One row; the rows of a cell follow each other in registers."""
    return {name: size for name, size in row_tile("spatial_merge", chosen, E).items() if name != "BLOCK_N"}


def spatial_merge(
    x: torch.Tensor,  # [N, E] in merge-block order
    weight: torch.Tensor | None,  # [E]
    bias: torch.Tensor | None,  # [E]
    keep: torch.Tensor | None,  # [K] i64, strictly increasing cells
    merge_size: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [K, E], mean and rstd [K, M*M] f32, or [0, 0]
    (N, E), area = x.shape, merge_size**2
    check_keep(keep, N // area)
    x = rows_dense(x, 1)
    K = N // area if keep is None else keep.shape[0]
    y = torch.empty((K, E), dtype=x.dtype, device=x.device)
    mean = torch.empty((0, 0) if weight is None else (K, area), dtype=torch.float32, device=x.device)
    rstd = torch.empty(mean.shape, dtype=torch.float32, device=x.device)
    if K == 0:
        return y, mean, rstd
    chosen = row("spatial_merge", architecture(x.device))
    (stride,) = taken_strides(x, (0,))
    unit = unit_of(x, stride)
    with torch.cuda.device_of(x):
        spatial_merge_kernel[(min(K, chosen.blocks["PROGRAMS"]),)](
            x,
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            x if keep is None else keep.contiguous(),
            y,
            mean,
            rstd,
            K,
            stride // unit,
            eps,
            E=E,
            AREA=area,
            UNIT=unit,
            NORM=weight is not None,
            KEEP=keep is not None,
            UNROLL=min(area, _UNROLLED),
            **_tile(chosen, E),
        )
    return y, mean, rstd


def spatial_merge_backward(
    grad: torch.Tensor,  # [K, E]
    x: torch.Tensor,  # [N, E]
    weight: torch.Tensor | None,  # [E]
    keep: torch.Tensor | None,  # [K] i64
    mean: torch.Tensor,  # [K, M*M], or [0, 0]
    rstd: torch.Tensor,  # [K, M*M], or [0, 0]
    merge_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # of x [N, E], weight [E], bias [E] (or [0])
    (N, E), area = x.shape, merge_size**2
    n_cells = N // area
    grad, x = rows_dense(grad, 1), rows_dense(x, 1)
    grad_x = torch.empty((N, E), dtype=x.dtype, device=x.device)
    of_norm = (0, x.dtype) if weight is None else (E, weight.dtype)
    grad_weight, grad_bias = (torch.empty(of_norm[0], dtype=of_norm[1], device=x.device) for _ in range(2))
    chosen = row("spatial_merge_backward", architecture(x.device))
    chunk = max(1, triton.cdiv(n_cells, chosen.blocks["PROGRAMS"]))
    programs = triton.cdiv(n_cells, chunk)
    partials = torch.empty((2, programs, 0 if weight is None else E), dtype=torch.float32, device=x.device)
    strides = (*taken_strides(grad, (0,)), *taken_strides(x, (0,)))
    unit = unit_of(x, *strides)
    if n_cells:
        with torch.cuda.device_of(x):
            spatial_merge_backward_kernel[(programs,)](
                grad,
                x,
                x if weight is None else weight.contiguous(),
                x if keep is None else keep.contiguous(),
                mean.contiguous(),
                rstd.contiguous(),
                grad_x,
                partials,
                grad.shape[0],
                n_cells,
                chunk,
                *(stride // unit for stride in strides),
                E=E,
                AREA=area,
                UNIT=unit,
                NORM=weight is not None,
                KEEP=keep is not None,
                UNROLL=min(area, _UNROLLED),
                **_tile(chosen, E),
            )
    if weight is not None:
        sum_columns(partials, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
