"""token_score in Triton: a program owns one cell and walks over its versions.

The version compared with stays in registers, so each pixel is read once; the next version is loaded
before the current one is reduced. Strides are passed in units of ``UNIT`` elements, the widest aligned
access: a stride argument that is not divisible by 16, such as the 84 of a 28-pixel row, would turn every
load into single bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hulukern.ops.common import rows_dense
from hulukern.ops.triton_common import PROGRAMS

# A tile of 16384 elements is 32 per thread of 16 warps: two versions and the differences fit in registers.
MAX_TILE = 16384
_LARGE_TILE = 4096
# A chunk of T reads the version before it again, so shorter chunks than 8 cost more than they fill.
_MIN_CHUNK = 8


@triton.jit
def _load(
    p_version,
    b_run,  # [R, 1]
    b_at,  # [1, E]
    stride_run,
    n_runs,
    run,
    UNIT: tl.constexpr,
):
    """A version's tile, zeros outside: they differ from nothing."""
    m = (b_run < n_runs) & (b_at < run * UNIT)
    return tl.load(p_version + b_run * (stride_run * UNIT) + b_at, mask=m, other=0)


@triton.jit
def window_sum(b_x, b_y, i_w: tl.constexpr, windows, N_WINDOWS: tl.constexpr):
    """Sum of |x - y|; integers exactly, in int32: at most 65535 * 16384 per tile."""
    if b_x.dtype.is_floating():
        total = tl.sum(tl.abs(b_x.to(tl.float32) - b_y.to(tl.float32)), axis=None)
    elif N_WINDOWS > 0:
        lo = windows[2 * i_w]
        hi = windows[2 * i_w + 1]
        b_a = tl.minimum(tl.maximum(b_x.to(tl.int32), lo), hi)
        b_b = tl.minimum(tl.maximum(b_y.to(tl.int32), lo), hi)
        total = tl.sum(tl.abs(b_a - b_b), axis=None)
    else:
        total = tl.sum(tl.abs(b_x.to(tl.int32) - b_y.to(tl.int32)), axis=None)
    return total


@triton.jit
def mean_of(total, count, i_w: tl.constexpr, windows, N_WINDOWS: tl.constexpr):
    """IEEE division, as everywhere: a plain ``/`` would round differently."""
    denominator = count.to(tl.float32)
    if N_WINDOWS > 0:
        width = (windows[2 * i_w + 1] - windows[2 * i_w]).to(tl.float32)
        denominator *= tl.div_rn(width, 255.0)
    return tl.div_rn(total.to(tl.float32), denominator)


@triton.jit
def _larger(score, s, i_w: tl.constexpr):
    """The largest over the windows; the first stands as it is, NaN included."""
    return s if i_w == 0 else tl.maximum(score, s)


@triton.jit(do_not_specialize=["T", "cells_x", "n_cells", "chunk", "n_runs"])
def token_score_kernel(
    pixels,  # n_cells stretches of n_runs x run at the strides below
    scores,  # [T, n_cells] f32
    T,
    n_cells,
    cells_x,
    chunk,  # versions per program
    n_runs,
    run,  # this and the strides: in units of UNIT elements
    stride_t,
    stride_y,
    stride_x,
    stride_run,
    threshold,
    windows,  # (lo, hi) after (lo, hi), i16 only
    N_WINDOWS: tl.constexpr,
    KEPT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid (n_cells, chunks of T); KEPT is a chain over all versions, hence one chunk."""
    i_cell = tl.program_id(0).to(tl.int64)
    t_begin = tl.program_id(1).to(tl.int64) * chunk
    t_end = tl.minimum(t_begin + chunk, T)
    p_cell = pixels + ((i_cell // cells_x) * stride_y + (i_cell % cells_x) * stride_x) * UNIT
    b_run = tl.arange(0, BLOCK_R).to(tl.int64)[:, None]
    b_at = tl.arange(0, BLOCK_E)[None, :]
    count = n_runs.to(tl.int64) * run * UNIT
    if t_begin == 0:
        tl.store(scores + i_cell, float("inf"))

    t_first = tl.maximum(t_begin, 1)
    # Loads run one version ahead; after the last there is none.
    n_first = tl.where(t_first < t_end, n_runs, 0)
    b_ref = _load(p_cell + (t_first - 1) * stride_t * UNIT, b_run, b_at, stride_run, n_first, run, UNIT)
    b_next = _load(p_cell + t_first * stride_t * UNIT, b_run, b_at, stride_run, n_first, run, UNIT)
    for t in range(t_first, t_end):
        b_x = b_next
        p_next = p_cell + (t + 1) * stride_t * UNIT
        n_next = tl.where(t + 1 < t_end, n_runs, 0)
        b_next = _load(p_next, b_run, b_at, stride_run, n_next, run, UNIT)
        score = 0.0
        for i_w in tl.static_range(max(N_WINDOWS, 1)):
            total = window_sum(b_x, b_ref, i_w, windows, N_WINDOWS)
            score = _larger(score, mean_of(total, count, i_w, windows, N_WINDOWS), i_w)
        tl.store(scores + t * n_cells + i_cell, score)
        if KEPT:
            b_ref = tl.where(score <= threshold, b_ref, b_x)
        else:
            b_ref = b_x


@triton.jit(do_not_specialize=["T", "cells_x", "n_cells", "chunk", "n_runs"])
def token_score_large_kernel(
    pixels,
    scores,
    T,
    n_cells,
    cells_x,
    chunk,
    n_runs,
    run,
    stride_t,
    stride_y,
    stride_x,
    stride_run,
    threshold,
    windows,
    N_WINDOWS: tl.constexpr,
    KEPT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """As token_score_kernel for cells larger than a tile: both versions are read, the older from L2."""
    i_cell = tl.program_id(0).to(tl.int64)
    t_begin = tl.program_id(1).to(tl.int64) * chunk
    t_end = tl.minimum(t_begin + chunk, T)
    p_cell = pixels + ((i_cell // cells_x) * stride_y + (i_cell % cells_x) * stride_x) * UNIT
    b_run = tl.arange(0, BLOCK_R).to(tl.int64)[:, None]
    b_at = tl.arange(0, BLOCK_E)[None, :]
    count = n_runs.to(tl.int64) * run * UNIT
    if t_begin == 0:
        tl.store(scores + i_cell, float("inf"))

    t_first = tl.maximum(t_begin, 1)
    t_ref = t_first - 1
    for t in range(t_first, t_end):
        score = 0.0
        for i_w in tl.static_range(max(N_WINDOWS, 1)):
            if pixels.dtype.element_ty.is_floating():
                total = 0.0
            else:
                total = tl.full((), 0, tl.int64)
            for i_run in range(0, n_runs, BLOCK_R):
                for i_at in range(0, run * UNIT, BLOCK_E):
                    o = (i_run + b_run, i_at + b_at)
                    b_x = _load(p_cell + t * stride_t * UNIT, o[0], o[1], stride_run, n_runs, run, UNIT)
                    b_ref = _load(p_cell + t_ref * stride_t * UNIT, o[0], o[1], stride_run, n_runs, run, UNIT)
                    total += window_sum(b_x, b_ref, i_w, windows, N_WINDOWS)
            score = _larger(score, mean_of(total, count, i_w, windows, N_WINDOWS), i_w)
        tl.store(scores + t * n_cells + i_cell, score)
        if KEPT:
            t_ref = tl.where(score <= threshold, t_ref, t)
        else:
            t_ref = t


def versions_per_program(T: int, n_cells: int) -> int:
    return min(T, max(_MIN_CHUNK, triton.cdiv(T, triton.cdiv(PROGRAMS, n_cells))))


def _launch(
    pixels: torch.Tensor,  # first element of the clip, at its storage's dtype
    scores: torch.Tensor,  # [T, cells_y, cells_x]
    n_runs: int,
    run: int,
    strides: tuple[int, int, int, int],  # t, y, x, run; elements
    windows: list[int],
    kept: bool,
    threshold: float,
) -> None:
    T, cells_y, cells_x = scores.shape
    if scores.numel() == 0:
        return
    stride_t, stride_y, stride_x, stride_run = strides
    if stride_run == run or n_runs == 1:  # runs that follow each other in memory are one
        n_runs, run, stride_run = 1, n_runs * run, 0
    n_cells = cells_y * cells_x
    # What divides every address in elements; strides that are never taken say nothing.
    taken = (stride_t * (T > 1), stride_y * (cells_y > 1), stride_x * (cells_x > 1), stride_run)
    unit = math.gcd(16 // pixels.element_size(), run, *taken)
    block_r, block_e = triton.next_power_of_2(n_runs), triton.next_power_of_2(max(run, 1))
    large = block_r * block_e > MAX_TILE
    if large:
        block_e = min(block_e, _LARGE_TILE)
        block_r = min(block_r, _LARGE_TILE // block_e)
    tile = block_r * block_e
    chunk = T if kept else versions_per_program(T, n_cells)
    kernel = token_score_large_kernel if large else token_score_kernel
    with torch.cuda.device_of(pixels):
        kernel[(n_cells, triton.cdiv(T, chunk))](
            pixels,
            scores,
            T,
            n_cells,
            cells_x,
            chunk,
            n_runs,
            run // unit,
            *(stride // unit for stride in taken),
            threshold,
            tuple(windows),
            N_WINDOWS=len(windows) // 2,
            KEPT=kept,
            UNIT=unit,
            BLOCK_R=block_r,
            BLOCK_E=block_e,
            num_warps=min(16, max(1, tile // 1024)),
        )


def token_score(
    patches: torch.Tensor,  # [N, L]
    grid_thw: list[int],  # [3 G]
    merge_size: int,
    reference: str,
    threshold: float,
) -> torch.Tensor:  # [N / merge_size**2] f32
    patches = rows_dense(patches, 1)
    per_cell, stride = merge_size * merge_size, patches.stride(0)
    scores = torch.empty(patches.shape[0] // per_cell, dtype=torch.float32, device=patches.device)
    row = 0
    for t, h, w in zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True):
        cells, n = h * w // per_cell, t * h * w
        clip = scores[row // per_cell : (row + n) // per_cell].view(t, 1, cells)
        strides = (cells * per_cell * stride, 0, per_cell * stride, stride)
        _launch(patches[row:], clip, per_cell, patches.shape[1], strides, [], reference == "kept", threshold)
        row += n
    return scores


def token_score_frames(
    frames: torch.Tensor,  # [T, H, W, C]
    patch_size: int,
    merge_size: int,
    windows: list[int],  # [2 windows]
    reference: str,
    threshold: float,
) -> torch.Tensor:  # [T * H / side * W / side] f32
    frames = rows_dense(frames, 2)
    T, H, W, C = frames.shape
    side, row = patch_size * merge_size, frames.stride(1)
    scores = torch.empty(T * (H // side) * (W // side), dtype=torch.float32, device=frames.device)
    strides = (frames.stride(0), side * row, side * C, row)
    clip = scores.view(T, H // side, W // side)
    _launch(frames, clip, side, side * C, strides, windows, reference == "kept", threshold)
    return scores
