"""token_compact in Triton: count, rank, gather. Nothing comes to the host when a bound is given.

    counts     kept rows of every tile of the mask (not launched for a single tile)
    ranks      a tile adds up the counts before it and writes its rows' numbers in order; one program more for
               every end of a sequence
    positions  slots of the output: place within the sequence by bisection of the new ends, -1 and 0 past the count
    rows       one launch a tensor: slot j copies row index[j], or is filled

The counts of all tiles before are at most N / 4096 integers from L2, so that no tile waits for another, as it
would in a scan of one launch with look-back: two launches, each deterministic, and safe in a CUDA graph.

Bytes: the mask twice (10 KB of 23 MB at 10368 rows of 2352 bytes), index written and read, positions written
(24 a kept row), every kept row read once and written once: 1.001 of the spec's count.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hulukern.ops.common import rows_dense
from hulukern.ops.token_compact.reference import Outputs, check_index, check_values
from hulukern.ops.triton_common import architecture
from hulukern.tuning import row as tuned

# Mask bytes of a program, and slots.
_TILE = 4096
_SLOTS = 1024
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def first_at_least(values, n, b_x, PADDED: tl.constexpr):
    """How many of n rising ``values`` are below each x; with PADDED negative ones end the list."""
    lo = b_x * 0
    hi = lo + n
    steps = 0
    while (n >> steps) > 0:
        middle = (lo + hi) // 2
        open_ = lo < hi
        b_value = tl.load(values + middle, mask=open_, other=0)
        below = open_ & (b_value < b_x)
        if PADDED:
            below = below & (b_value >= 0)
        lo = tl.where(below, middle + 1, lo)
        hi = tl.where(below, hi, middle)
        steps += 1
    return lo


@triton.jit(do_not_specialize=["N"])
def token_compact_counts_kernel(
    keep,  # [N] u8
    counts,  # [tiles] i32
    N,
    BLOCK: tl.constexpr,
):
    """grid (tiles)"""
    b_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_keep = tl.load(keep + b_row, mask=b_row < N, other=0).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(b_keep, 0))


@triton.jit
def _kept_before(
    counts,
    i_tile,
    BLOCK_T: tl.constexpr,
):
    """Sum of the counts of all tiles before."""
    total = i_tile * 0
    for i in range(0, i_tile, BLOCK_T):
        b_tile = i + tl.arange(0, BLOCK_T)
        total += tl.sum(tl.load(counts + b_tile, mask=b_tile < i_tile, other=0), 0)
    return total


@triton.jit(do_not_specialize=["N", "n_tiles", "n_ends", "bound"])
def token_compact_ranks_kernel(
    keep,  # [N] u8
    counts,  # [tiles] i32
    ends,  # [S+1] i32
    index,  # [bound] i64
    ends_out,  # [S+1] i32
    count,  # [1] i64
    N,
    n_tiles,
    n_ends,
    bound,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """grid (tiles + ends)"""
    i_program = tl.program_id(0)
    if i_program < n_tiles:
        before = _kept_before(counts, i_program, BLOCK_T)
        b_row = i_program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_keep = tl.load(keep + b_row, mask=b_row < N, other=0).to(tl.int32)
        b_rank = before + tl.cumsum(b_keep, 0) - 1
        tl.store(index + b_rank, b_row, mask=(b_keep > 0) & (b_rank < bound))
        if i_program == n_tiles - 1:
            tl.store(count, (before + tl.sum(b_keep, 0)).to(tl.int64))
    else:
        i_end = i_program - n_tiles
        if ENDS:
            end = tl.load(ends + i_end)
        else:
            end = i_end * N
        i_tile = end // BLOCK
        b_row = i_tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_keep = tl.load(keep + b_row, mask=b_row < end, other=0).to(tl.int32)
        total = _kept_before(counts, i_tile, BLOCK_T) + tl.sum(b_keep, 0)
        tl.store(ends_out + i_end, tl.minimum(total, bound))


@triton.jit(do_not_specialize=["N", "K", "bound"])
def token_compact_ends_kernel(
    keep,  # [K] i64
    ends,  # [S+1] i32
    ends_out,  # [S+1] i32
    count,  # [1] i64
    N,
    K,
    bound,
    ENDS: tl.constexpr,
):
    """grid (ends): the same of row numbers, which are the index already."""
    i_end = tl.program_id(0).to(tl.int64)
    if ENDS:
        end = tl.load(ends + i_end).to(tl.int64)
    else:
        end = i_end * N
    tl.store(ends_out + i_end, first_at_least(keep, tl.minimum(K, bound), end, False).to(tl.int32))
    if i_end == 0:
        tl.store(count, i_end + K)


@triton.jit(do_not_specialize=["n_ends", "bound"])
def token_compact_positions_kernel(
    keep,  # [K] i64 where rows came as numbers
    ends,  # [S+1] i32, new
    count,  # [1] i64
    index,  # [bound] i64
    position_ids,  # [bound] i64
    n_ends,
    bound,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grid (tiles of slots)"""
    b_slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = b_slot < tl.load(count)
    m = b_slot < bound
    # The last of the ends that is not above the slot: sequences without rows are passed over.
    i_seq = first_at_least(ends, n_ends, b_slot + 1, False) - 1
    b_begin = tl.load(ends + tl.maximum(i_seq, 0), mask=m & kept, other=0)
    tl.store(position_ids + b_slot, tl.where(kept, b_slot - b_begin, 0), mask=m)
    if NUMBERS:
        tl.store(index + b_slot, tl.load(keep + b_slot, mask=m & kept, other=-1), mask=m)
    else:
        tl.store(index + b_slot, b_slot * 0 - 1, mask=m & (b_slot >= tl.load(count)))


@triton.jit(do_not_specialize=["n_slots", "fill"])
def token_compact_rows_kernel(
    x,  # [N, units * UNIT] at stride_x
    index,  # [n_slots] i64
    out,  # [n_slots, units * UNIT]
    n_slots,
    units,  # this and the stride: in units of UNIT elements
    stride_x,
    fill,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid (tiles of slots, tiles of columns)"""
    b_slot = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    b_col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    b_row = tl.load(index + b_slot, mask=b_slot < n_slots, other=-1)
    m_col = b_col < units * UNIT
    b_x = tl.load(x + b_row * stride_x * UNIT + b_col, mask=(b_row >= 0) & m_col, other=0)
    b_x = tl.where(b_row >= 0, b_x, fill.to(b_x.dtype))
    tl.store(out + b_slot * units * UNIT + b_col, b_x, mask=(b_slot < n_slots) & m_col)


@triton.jit(do_not_specialize=["N", "n_slots"])
def token_compact_backward_kernel(
    grad,  # [n_slots, units * UNIT] at stride_grad
    index,  # [n_slots] i64, rising, then -1
    out,  # [N, units * UNIT]
    N,
    n_slots,
    units,  # this and the stride: in units of UNIT elements
    stride_grad,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid (tiles of rows, tiles of columns): a row looks for its slot, so that zeros need no pass of their own."""
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    b_col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    b_slot = first_at_least(index, n_slots, b_row, True)
    found = tl.load(index + b_slot, mask=b_slot < n_slots, other=-1) == b_row
    m_col = b_col < units * UNIT
    b_x = tl.load(grad + b_slot * stride_grad * UNIT + b_col, mask=found & m_col, other=0)
    tl.store(out + b_row * units * UNIT + b_col, b_x, mask=(b_row < N) & m_col)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[N, ...] as [N, E] integers of the same width, its rows dense."""
    x = rows_dense(x, x.dim() - 1)
    E = math.prod(x.shape[1:])
    rows = x.as_strided((x.shape[0], E), (x.stride(0) if x.dim() else 1, 1))
    return rows.view(_AS_INTEGER[x.element_size()])


def _tiles(x: torch.Tensor, n_rows: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, unit and tile of a pass over n_rows rows like those of ``x``."""
    E, stride = x.shape[1], x.stride(0) if x.shape[0] > 1 else 0
    unit = math.gcd(16 // x.element_size(), E, stride)
    chosen = tuned("token_compact_rows", architecture(x.device))
    tile = chosen.blocks["TILE_BYTES"] // x.element_size()
    block_e = min(triton.next_power_of_2(max(E, 1)), tile)
    block_r = max(1, min(tile // block_e, triton.next_power_of_2(n_rows)))
    grid = triton.cdiv(n_rows, block_r), triton.cdiv(E, block_e)
    return grid, unit, {"BLOCK_R": block_r, "BLOCK_E": block_e, "num_warps": chosen.warps}


def _find(
    keep: torch.Tensor, cu_seqlens: torch.Tensor | None, n_rows: int, bound: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # index, position_ids, new ends, count
    device = keep.device
    keep = keep.contiguous()
    n_ends = 2 if cu_seqlens is None else cu_seqlens.shape[0]
    index = torch.empty(bound, dtype=torch.int64, device=device)
    position_ids = torch.empty(bound, dtype=torch.int64, device=device)
    ends = torch.empty(n_ends, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int64, device=device)
    given = ends if cu_seqlens is None else cu_seqlens.contiguous()
    with torch.cuda.device_of(keep):
        if keep.dtype == torch.bool:
            mask = keep.view(torch.uint8)
            n_tiles = max(1, triton.cdiv(n_rows, _TILE))
            counts = torch.empty(n_tiles, dtype=torch.int32, device=device)
            if n_tiles > 1:
                token_compact_counts_kernel[(n_tiles,)](mask, counts, n_rows, BLOCK=_TILE, num_warps=4)
            token_compact_ranks_kernel[(n_tiles + n_ends,)](
                mask, counts, given, index, ends, count, n_rows, n_tiles, n_ends, bound,
                ENDS=cu_seqlens is not None, BLOCK=_TILE, BLOCK_T=256, num_warps=8,
            )  # fmt: skip
        else:
            token_compact_ends_kernel[(n_ends,)](
                keep, given, ends, count, n_rows, keep.shape[0], bound, ENDS=cu_seqlens is not None, num_warps=1
            )
        if bound:
            token_compact_positions_kernel[(triton.cdiv(bound, _SLOTS),)](
                keep, ends, count, index, position_ids, n_ends, bound,
                NUMBERS=keep.dtype != torch.bool, BLOCK=_SLOTS, num_warps=4,
            )  # fmt: skip
    return index, position_ids, ends, count


def token_compact(
    keep: torch.Tensor,  # [N] bool, or [K] i64 strictly increasing
    tensors: list[torch.Tensor],  # each [N, ...]
    cu_seqlens: torch.Tensor | None,  # [S+1] i32
    n_rows: int,
    bound: int | None,
    fill: list[int],
) -> Outputs:  # rows [B, ...], index [B] i64, position_ids [B] i64, cu_seqlens [S+1] i32, count [1] i64
    check_values(keep, cu_seqlens, n_rows)
    if bound is None:  # the one wait that an output of unknown size costs
        bound = int(torch.count_nonzero(keep)) if keep.dtype == torch.bool else keep.shape[0]
    index, position_ids, ends, count = _find(keep, cu_seqlens, n_rows, bound)
    outputs = []
    for x, value in zip(tensors, fill, strict=True):
        out = torch.empty((bound, *x.shape[1:]), dtype=x.dtype, device=x.device)
        outputs.append(out)
        if out.numel() == 0:
            continue
        rows = _as_rows(x)
        grid, unit, tile = _tiles(rows, bound)
        bits = int(torch.tensor(value).to(x.dtype).view(rows.dtype))
        with torch.cuda.device_of(x):
            token_compact_rows_kernel[grid](
                rows, index, _as_rows(out), bound, rows.shape[1] // unit,
                (rows.stride(0) if rows.shape[0] > 1 else 0) // unit, bits, UNIT=unit, **tile,
            )  # fmt: skip
    return outputs, index, position_ids, ends, count


def token_compact_backward(grad: torch.Tensor, index: torch.Tensor, n_rows: int) -> torch.Tensor:
    check_index(index, n_rows)
    """``[B, ...]`` and ``[B]`` -> ``[n_rows, ...]``: what was not kept gets zero."""
    out = torch.empty((n_rows, *grad.shape[1:]), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    rows = _as_rows(grad)
    grid, unit, tile = _tiles(rows, n_rows)
    with torch.cuda.device_of(grad):
        token_compact_backward_kernel[grid](
            rows, index.contiguous(), _as_rows(out), n_rows, rows.shape[0], rows.shape[1] // unit,
            (rows.stride(0) if rows.shape[0] > 1 else 0) // unit, UNIT=unit, **tile,
        )  # fmt: skip
    return out
