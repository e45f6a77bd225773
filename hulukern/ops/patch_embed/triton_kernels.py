"""patch_embed in Triton: a GEMM whose left operand is pixels, normalised on their way from memory.

The product runs over the columns of a patch, (channel, y, x), 588 for 14 x 14 x 3, masked where the last tile
of columns is not full: 588 = 18 x 32 + 12, 1.02 times the tensor work. A program takes a tile of patches and a
tile of the embedding's columns; from frames a patch's pixels lie in runs of 42 bytes, so it reads single
pixels, and L1 turns that into lines. Every pixel passes once per tile of columns, E / 128 = 9 times, of which
L2 serves 8: patches of uint8 are half of a bf16 operand.

Normalisation is ((u8 / 255) - mean) / std with IEEE divisions, as everywhere: 256 values a channel in all.
It costs two divisions a pixel and tile of columns; folding it into weight and bias (fold_normalization) costs
none, and is what a performance path gives.

The product's temporal scores come from token_score_frames over the same pixels, a second launch that re-reads them: a
score belongs to one cell against its predecessor, a tile of the product holds cells of one frame, so a fused form
would read the previous frame's pixels again all the same, 9 times over. The launch adds one read of the frames, 3 %
of what the product moves at E = 1152 (2 H W C of frames against 1152 b / 588 bytes written per pixel value).

Bytes of the cut: frames read once, patches and scores written once, what the spec counts. A program writes whole
patches; their pixels are gathered, 14 runs of 42 bytes each, with lines shared by neighbours through L1. With scores
a program walks over the versions of a cell, the one before in registers; a chunk of 8 or more versions reads the one
before it once more, from L2 where that still has it, in all at most 1.04 of the fewest bytes for bf16 patches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hulukern.ops.common import rows_dense
from hulukern.ops.token_score.triton_kernels import (
    MAX_TILE,
    mean_of,
    token_score_frames,
    versions_per_program,
    window_sum,
)
from hulukern.ops.triton_common import architecture, rounded, taken_strides, unit_of
from hulukern.tuning import row


@triton.jit
def _per_channel(b_channel, values):
    """values[channel] of a handful of scalars."""
    b = b_channel * 0.0 + values[0]
    for c in tl.static_range(1, len(values)):
        b = tl.where(b_channel == c, values[c], b)
    return b


@triton.jit
def _normalized(
    b_x,  # pixels, u8 or i16
    b_channel,  # broadcasts against b_x
    mean,  # per channel
    std,
    lo,
    width,  # hi - lo of the window
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """fp32: pixels as 0..1, from which mean and std are taken, or 0..255 without them."""
    if WINDOW:
        unit = tl.div_rn((tl.minimum(tl.maximum(b_x.to(tl.int32), lo), lo + width) - lo).to(tl.float32), width * 1.0)
        if not NORM:
            return unit * 255.0
    else:
        if not NORM:
            return b_x.to(tl.float32)
        unit = tl.div_rn(b_x.to(tl.float32), 255.0)
    m = _per_channel(b_channel.to(tl.float32), mean)
    s = _per_channel(b_channel.to(tl.float32), std)
    return tl.div_rn(unit - m, s + tl.zeros(unit.shape, tl.float32))


@triton.jit
def _patch_origin(
    b_patch,  # [.] i64, in merge-block order
    patches_y,
    patches_x,
    P: tl.constexpr,
    M: tl.constexpr,
):
    """Frame, and row and column of the patch's first pixel."""
    per_frame = patches_y.to(tl.int64) * patches_x
    i_frame = b_patch // per_frame
    rest = (b_patch % per_frame).to(tl.int32)
    cell = rest // (M * M)
    inside = rest % (M * M)
    cells_x = patches_x // M
    y = (cell // cells_x) * M + inside // M
    x = (cell % cells_x) * M + inside % M
    return i_frame, y * P, x * P


@triton.jit
def _pixel_offsets(
    b_col,  # [.] of a patch, (channel, y, x)
    stride_y,
    CHANNELS: tl.constexpr,
    PIXEL: tl.constexpr,  # channels of the frame, 1 for gray
    P: tl.constexpr,
):
    b_channel = b_col // (P * P)
    at = b_col % (P * P)
    return b_channel, (at // P) * stride_y + (at % P) * PIXEL + (b_channel if PIXEL == CHANNELS else b_channel * 0)


@triton.jit(do_not_specialize=["N", "patches_y", "patches_x"])
def patch_embed_cut_kernel(
    frames,  # [T, H, W, PIXEL] at the strides below
    out,  # [N, LENGTH]
    N,
    patches_y,
    patches_x,
    stride_t,
    stride_y,
    mean,
    std,
    lo,
    width,
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXEL: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """grid (tiles of patches, tiles of columns)"""
    b_patch = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    b_col = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    m = (b_patch < N) & (b_col < LENGTH)
    i_frame, y, x = _patch_origin(b_patch, patches_y, patches_x, P, M)
    b_channel, o_pixel = _pixel_offsets(b_col, stride_y, CHANNELS, PIXEL, P)
    b_x = tl.load(frames + i_frame * stride_t + y.to(tl.int64) * stride_y + x * PIXEL + o_pixel, mask=m, other=0)
    b_y = _normalized(b_x, b_channel, mean, std, lo, width, NORM, WINDOW)
    tl.store(out + b_patch * LENGTH + b_col, rounded(b_y, out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T", "cells_x", "n_cells", "chunk", "lo", "width"])
def patch_embed_cut_scores_kernel(
    frames,  # [T, H, W, PIXEL] at the strides below
    out,  # [T, n_cells, CELL]
    scores,  # [T, n_cells] f32
    T,
    cells_x,
    n_cells,  # of a frame
    chunk,  # versions per program
    stride_t,
    stride_y,
    mean,
    std,
    lo,
    width,
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXEL: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    CELL: tl.constexpr,  # values of a cell's M x M patches
    BLOCK: tl.constexpr,
):
    """grid (n_cells, chunks of T)"""
    LENGTH: tl.constexpr = CELL // (M * M)
    i_cell = tl.program_id(0).to(tl.int64)
    t_begin = tl.program_id(1).to(tl.int64) * chunk
    t_end = tl.minimum(t_begin + chunk, T)
    b_at = tl.arange(0, BLOCK)
    m = b_at < CELL
    b_patch = b_at // LENGTH
    b_channel, o_pixel = _pixel_offsets(b_at % LENGTH, stride_y, CHANNELS, PIXEL, P)
    y = (i_cell // cells_x) * (M * P)
    x = (i_cell % cells_x) * (M * P)
    o_patch = (b_patch // M) * P * stride_y + (b_patch % M) * (P * PIXEL)
    p_cell = frames + y * stride_y + x * PIXEL + o_patch + o_pixel
    count = tl.full((), M * M * P * P * PIXEL, tl.int64)
    if t_begin == 0:
        tl.store(scores + i_cell, float("inf"))
    b_ref = tl.load(p_cell + (t_begin - 1) * stride_t, mask=b_at < tl.where(t_begin > 0, CELL, 0), other=0)
    # Loads run one version ahead; after the last there is none.
    b_next = tl.load(p_cell + t_begin * stride_t, mask=m, other=0)
    for t in range(t_begin, t_end):
        b_x = b_next
        b_next = tl.load(p_cell + (t + 1) * stride_t, mask=b_at < tl.where(t + 1 < t_end, CELL, 0), other=0)
        if t > 0:
            total = window_sum(b_x, b_ref, 0, (lo, lo + width), 1 if WINDOW else 0)
            if PIXEL < CHANNELS:  # a gray pixel stands in every channel
                total = total // CHANNELS
            tl.store(scores + t * n_cells + i_cell, mean_of(total, count, 0, (lo, lo + width), 1 if WINDOW else 0))
        b_ref = b_x
        b_y = _normalized(b_x, b_channel, mean, std, lo, width, NORM, WINDOW)
        tl.store(out + (t * n_cells + i_cell) * CELL + b_at, rounded(b_y, out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N"])
def patch_embed_normalize_kernel(
    patches,  # [N, LENGTH] u8 at stride_n
    out,  # [N, LENGTH]
    N,
    stride_n,  # in units of UNIT elements
    mean,
    std,
    NORM: tl.constexpr,
    PLANE: tl.constexpr,
    LENGTH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """grid (tiles of patches, tiles of columns)"""
    b_patch = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    b_col = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    m = (b_patch < N) & (b_col < LENGTH)
    b_x = tl.load(patches + b_patch * stride_n * UNIT + b_col, mask=m, other=0)
    b_y = _normalized(b_x, b_col // PLANE, mean, std, 0, 1, NORM, False)
    tl.store(out + b_patch * LENGTH + b_col, rounded(b_y, out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "patches_y", "patches_x"])
def patch_embed_kernel(
    pixels,  # frames [T, H, W, PIXEL], or patches [N, LENGTH] at stride_t (u8 or floats)
    weight,  # [E, LENGTH] at stride_weight
    bias,  # [E]
    out,  # [N, E]
    N,
    E,
    patches_y,
    patches_x,
    stride_t,  # in units of UNIT_X elements
    stride_y,
    stride_weight,  # in units of UNIT elements
    mean,
    std,
    lo,
    width,
    FRAMES: tl.constexpr,
    FLOATS: tl.constexpr,
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXEL: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    PLANE: tl.constexpr,
    LENGTH: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """grid (tiles of patches, tiles of E)"""
    b_patch = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    b_out = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    if FRAMES:
        i_frame, y, x = _patch_origin(b_patch, patches_y, patches_x, P, M)
        p_patch = pixels + i_frame * stride_t * UNIT_X + y.to(tl.int64) * stride_y + x * PIXEL
    else:
        p_patch = pixels + b_patch * stride_t * UNIT_X
    p_weight = weight + b_out[:, None].to(tl.int64) * stride_weight * UNIT
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for i_col in range(0, LENGTH, BLOCK_L):
        b_col = i_col + tl.arange(0, BLOCK_L)[None, :]
        m_col = b_col < LENGTH
        m = (b_patch < N) & m_col
        if FRAMES:
            b_channel, o_pixel = _pixel_offsets(b_col, stride_y, CHANNELS, PIXEL, P)
            b_x = tl.load(p_patch + o_pixel, mask=m, other=0)
        else:
            b_channel = b_col // PLANE
            b_x = tl.load(p_patch + b_col, mask=m, other=0)
        if FLOATS:
            b_x = rounded(b_x.to(tl.float32), weight.dtype.element_ty)
        else:
            b_x = _normalized(b_x, b_channel, mean, std, lo, width, NORM, WINDOW)
            b_x = rounded(b_x, weight.dtype.element_ty)
        # Past the last column the weight is zero, whatever a pixel of 0 became.
        b_w = tl.load(p_weight + b_col, mask=(b_out < E)[:, None] & m_col, other=0)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + b_out, mask=b_out < E, other=0).to(tl.float32)[None, :]
    m = (b_patch < N) & (b_out < E)[None, :]
    tl.store(out + b_patch * E + b_out[None, :], rounded(acc, out.dtype.element_ty), mask=m)


def _per_channel_values(values: list[float] | None) -> tuple[float, ...]:
    return (0.0,) if values is None else tuple(values)


def patch_embed_normalize(
    patches: torch.Tensor,  # [N, L] u8
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # [N, L] dtype
    patches = rows_dense(patches, 1)
    N, L = patches.shape
    out = torch.empty((N, L), dtype=dtype, device=patches.device)
    if out.numel() == 0:
        return out
    chosen = row("patch_embed_cut", architecture(patches.device))
    (stride,) = taken_strides(patches, (0,))
    unit = unit_of(patches, stride)
    grid = triton.cdiv(N, chosen.blocks["BLOCK_N"]), triton.cdiv(L, chosen.blocks["BLOCK_L"])
    with torch.cuda.device_of(patches):
        patch_embed_normalize_kernel[grid](
            patches, out, N, stride // unit, _per_channel_values(mean), _per_channel_values(std),
            NORM=mean is not None, PLANE=max(L // channels, 1), LENGTH=L, UNIT=unit, **chosen.options,
        )  # fmt: skip
    return out


def patch_embed_cut(
    frames: torch.Tensor,  # [T, H, W, C] u8 or i16
    patch_size: int,
    merge_size: int,
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
    window: list[int],
    dtype: torch.dtype,
    with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # [N, channels P P] dtype, [cells] f32
    frames = rows_dense(frames, 2)
    T, H, W, C = frames.shape
    patches_y, patches_x, length = H // patch_size, W // patch_size, channels * patch_size**2
    N = T * patches_y * patches_x
    out = torch.empty((N, length), dtype=dtype, device=frames.device)
    lo, hi = window or (0, 255)
    cell = merge_size**2 * length
    block = triton.next_power_of_2(cell)
    if N and with_scores and block <= MAX_TILE:
        n_cells = N // (T * merge_size**2)
        scores = torch.empty(T * n_cells, dtype=torch.float32, device=frames.device)
        chunk = versions_per_program(T, n_cells)
        with torch.cuda.device_of(frames):
            patch_embed_cut_scores_kernel[(n_cells, triton.cdiv(T, chunk))](
                frames, out, scores, T, patches_x // merge_size, n_cells, chunk, *taken_strides(frames, (0, 1)),
                _per_channel_values(mean), _per_channel_values(std), lo, hi - lo,
                NORM=mean is not None, WINDOW=frames.dtype == torch.int16, CHANNELS=channels, PIXEL=C,
                P=patch_size, M=merge_size, CELL=cell, BLOCK=block, num_warps=min(16, max(1, block // 512)),
            )  # fmt: skip
        return out, scores
    if N:
        chosen = row("patch_embed_cut", architecture(frames.device))
        grid = triton.cdiv(N, chosen.blocks["BLOCK_N"]), triton.cdiv(length, chosen.blocks["BLOCK_L"])
        with torch.cuda.device_of(frames):
            patch_embed_cut_kernel[grid](
                frames, out, N, patches_y, patches_x, *taken_strides(frames, (0, 1)),
                _per_channel_values(mean), _per_channel_values(std), lo, hi - lo,
                NORM=mean is not None, WINDOW=frames.dtype == torch.int16, CHANNELS=channels, PIXEL=C,
                P=patch_size, M=merge_size, LENGTH=length, **chosen.options,
            )  # fmt: skip
    return out, _scores(frames, patch_size, merge_size, window, with_scores)


def patch_embed(
    patches: torch.Tensor,  # [N, L] u8, or normalised floats
    weight: torch.Tensor,  # [E, L]
    bias: torch.Tensor | None,  # [E]
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
) -> torch.Tensor:  # [N, E] weight.dtype
    patches = rows_dense(patches, 1)
    N, L = patches.shape
    out = torch.empty((N, weight.shape[0]), dtype=weight.dtype, device=weight.device)
    geometry = {"FRAMES": False, "WINDOW": False, "CHANNELS": channels, "PIXEL": channels, "P": 1, "M": 1}
    _project(
        patches, (0, 0, *taken_strides(patches, (0,)), 0), weight, bias, out, mean, std, (0, 255),
        {**geometry, "PLANE": max(L // channels, 1)},
    )  # fmt: skip
    return out


def patch_embed_frames(
    frames: torch.Tensor,  # [T, H, W, C] u8 or i16
    weight: torch.Tensor,  # [E, L]
    bias: torch.Tensor | None,  # [E]
    patch_size: int,
    merge_size: int,
    mean: list[float] | None,
    std: list[float] | None,
    window: list[int],
    with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # [N, E], [cells] f32
    frames = rows_dense(frames, 2)
    T, H, W, C = frames.shape
    patches_y, patches_x, area = H // patch_size, W // patch_size, patch_size**2
    out = torch.empty((T * patches_y * patches_x, weight.shape[0]), dtype=weight.dtype, device=weight.device)
    geometry = {
        "FRAMES": True, "WINDOW": frames.dtype == torch.int16, "CHANNELS": weight.shape[1] // area, "PIXEL": C,
        "P": patch_size, "M": merge_size, "PLANE": area,
    }  # fmt: skip
    where = (patches_y, patches_x, *taken_strides(frames, (0, 1)))
    _project(frames, where, weight, bias, out, mean, std, window or (0, 255), geometry)
    return out, _scores(frames, patch_size, merge_size, window, with_scores)


def _scores(frames: torch.Tensor, patch_size: int, merge_size: int, window: list[int], wanted: bool) -> torch.Tensor:
    if not wanted:
        return torch.empty(0, dtype=torch.float32, device=frames.device)
    return token_score_frames(frames, patch_size, merge_size, window, "previous", 0.0)


def _project(
    pixels: torch.Tensor,
    where: tuple[int, ...],  # patches_y, patches_x, stride_t, stride_y
    weight: torch.Tensor,  # [E, L]
    bias: torch.Tensor | None,
    out: torch.Tensor,  # [N, E]
    mean: list[float] | None,
    std: list[float] | None,
    window: list[int] | tuple[int, int],
    geometry: dict[str, int],
) -> None:
    (N, E), L = out.shape, weight.shape[1]
    if out.numel() == 0:
        return
    weight = rows_dense(weight, 1)
    (stride,) = taken_strides(weight, (0,))
    unit = unit_of(weight, stride)
    unit_x = 1 if geometry["FRAMES"] else unit_of(pixels, where[2])
    patches_y, patches_x, stride_t, stride_y = where
    wide = weight.dtype == torch.float32
    chosen = row("patch_embed.fp32" if wide else "patch_embed", architecture(weight.device))
    with torch.cuda.device_of(weight):
        patch_embed_kernel[(triton.cdiv(N, chosen.blocks["BLOCK_N"]), triton.cdiv(E, chosen.blocks["BLOCK_E"]))](
            pixels, weight, weight if bias is None else bias.contiguous(), out,
            N, E, patches_y, patches_x, stride_t // unit_x, stride_y, stride // unit,
            _per_channel_values(mean), _per_channel_values(std), window[0], window[1] - window[0],
            FLOATS=pixels.is_floating_point(), NORM=mean is not None, BIAS=bias is not None, LENGTH=L,
            UNIT=unit, UNIT_X=unit_x, PRECISION="tf32x3", **geometry, **chosen.options,
        )  # fmt: skip
