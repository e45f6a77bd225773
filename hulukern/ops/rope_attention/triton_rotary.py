"""The rotary in Triton: what the attention kernels load, and the rotary alone.

Layout. Rotate-half joins columns i and i + D/2, which stand in different places of a row. A product q.k does
not care about the order of the columns, as long as q and k share it, so rotated rows are held as tiles in
which partners meet at one place:

    a [., W]  the first columns of pairs 0 .. W-1, columns 0 .. W-1 of the head
    b [., W]  their partners, columns D/2 .. D/2+W-1
    t [., 2P] the other pairs, first and partner in turns, P pairs with those past D/2 zero

W = 2**floor(log2(D)) / 2 and P = max(D/2 - W, 8), as tensor instructions sum 16 columns at least:

    D    64       72              80          96          128
    a,b  32 + 32  32 + 32         32 + 32     32 + 32     64 + 64
    t    none     8 of 16         16          32          none
    sum  64       80 (x 1.11)     80          96          128

Rotation is then elementwise in registers, a' = a cos - b sin and b' = b cos + a sin, and so is the inverse.

Angles are fp32 from int32 coordinates, pair i of n turns by position * theta**(-i/n); no table is in memory.

Bytes of the rotary alone: x read once, written once, and the coordinates of a tile's rows once per head
group: what the spec counts, since a program takes all heads of its rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hulukern.ops.triton_common import PROGRAMS, architecture, rounded, sincos, taken_strides, unit_of
from hulukern.tuning import row


def pairs_of(D: int) -> dict[str, int]:
    """W, P and the pairs that t really has, as the kernels' constexprs."""
    W = 2 ** int(math.log2(D)) // 2
    rest = D // 2 - W
    return {"HALF": D // 2, "W": W, "REST": rest, "P": max(rest, 8) if rest else 0}


def rotated_width(D: int) -> int:
    """Columns of a rotated row: a, b and t."""
    sizes = pairs_of(D)
    return 2 * (sizes["W"] + sizes["P"])


@triton.jit
def angles(
    positions,  # [N, axes] i32
    b_row,  # [B]
    m_row,  # [B]
    log2_theta,
    FIRST: tl.constexpr,  # pair of column 0
    WIDTH: tl.constexpr,
    SECTIONS: tl.constexpr,
):
    """Sine and cosine of every row's turn of pairs FIRST to FIRST + WIDTH, [B, WIDTH]."""
    b_pair = FIRST + tl.arange(0, WIDTH)
    angle = tl.zeros([b_row.shape[0], WIDTH], tl.float32)
    begin = 0
    for axis in tl.static_range(len(SECTIONS)):
        inside = (b_pair >= begin) & (b_pair < begin + SECTIONS[axis])
        exponent = (begin - b_pair).to(tl.float32) * (log2_theta * (1.0 / SECTIONS[axis]))
        frequency = tl.where(inside, tl.exp2(exponent), 0.0)
        b_position = tl.load(positions + b_row * len(SECTIONS) + axis, mask=m_row, other=0).to(tl.float32)
        angle += b_position[:, None] * frequency[None, :]
        begin = begin + SECTIONS[axis]
    return sincos(angle)


@triton.jit
def rotated(
    p_x,  # the tile's rows of one head, [B, 1]
    m_row,  # [B, 1]
    sine,
    cosine,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    REAL: tl.constexpr,  # pairs that exist, the rest is zero
    HALF: tl.constexpr,
):
    """Pairs FIRST to FIRST + WIDTH of the rows after the turn: first and partner columns, fp32."""
    b_col = tl.arange(0, WIDTH)[None, :]
    m = m_row & (b_col < REAL) if REAL < WIDTH else m_row
    b_a = tl.load(p_x + FIRST + b_col, mask=m, other=0).to(tl.float32)
    b_b = tl.load(p_x + HALF + FIRST + b_col, mask=m, other=0).to(tl.float32)
    return b_a * cosine - b_b * sine, b_b * cosine + b_a * sine


@triton.jit
def packed(b_a, b_b):
    """Tile t of two halves: first and partner in turns."""
    return tl.reshape(tl.join(b_a, b_b), [b_a.shape[0], 2 * b_a.shape[1]])


@triton.jit
def unpacked(b_t):
    return tl.split(tl.reshape(b_t, [b_t.shape[0], b_t.shape[1] // 2, 2]))


@triton.jit
def store_pairs(
    p_out,  # the tile's rows of one head, [B, 1]
    m_row,  # [B, 1]
    b_a,
    b_b,
    FIRST: tl.constexpr,
    REAL: tl.constexpr,
    HALF: tl.constexpr,
):
    """First and partner columns to their places in a plain row."""
    b_col = tl.arange(0, b_a.shape[1])[None, :]
    m = m_row & (b_col < REAL) if b_a.shape[1] > REAL else m_row
    tl.store(p_out + FIRST + b_col, rounded(b_a, p_out.dtype.element_ty), mask=m)
    tl.store(p_out + HALF + FIRST + b_col, rounded(b_b, p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "A", "heads"])
def rope_attention_rotate_kernel(
    x,  # [N, A, D] at the strides below
    out,  # [N, A, D], or rotated rows [A, N, 2 W + 2 P]
    positions,  # [N, axes] i32
    N,
    A,
    heads,  # per program
    stride_n,  # in units of UNIT elements
    stride_a,
    log2_theta,
    sign,  # of the angles; -1 turns back
    UNIT: tl.constexpr,
    SECTIONS: tl.constexpr,
    HALF: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    P: tl.constexpr,
    ROTATED_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (tiles of N, groups of heads): a row's angles serve all its heads."""
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = b_row < N
    sine, cosine = angles(positions, b_row, m_row, log2_theta, 0, W, SECTIONS)
    if P:
        sine_t, cosine_t = angles(positions, b_row, m_row, log2_theta, W, P, SECTIONS)
    b_row = b_row[:, None]
    m_row = m_row[:, None]
    h_begin = tl.program_id(1).to(tl.int64) * heads
    for i_head in range(h_begin, tl.minimum(h_begin + heads, A)):
        p_x = x + (b_row * stride_n + i_head * stride_a) * UNIT
        b_a, b_b = rotated(p_x, m_row, sine * sign, cosine, 0, W, W, HALF)
        if ROTATED_ROWS:
            p_out = out + (i_head * N + b_row) * (2 * W + 2 * P)
            b_col = tl.arange(0, W)[None, :]
            tl.store(p_out + b_col, rounded(b_a, out.dtype.element_ty), mask=m_row)
            tl.store(p_out + W + b_col, rounded(b_b, out.dtype.element_ty), mask=m_row)
        else:
            p_out = out + (b_row * A + i_head) * (2 * HALF)
            store_pairs(p_out, m_row, b_a, b_b, 0, W, HALF)
        if P:
            b_a, b_b = rotated(p_x, m_row, sine_t * sign, cosine_t, W, P, REST, HALF)
            if ROTATED_ROWS:
                b_t = rounded(packed(b_a, b_b), out.dtype.element_ty)
                tl.store(p_out + 2 * W + tl.arange(0, 2 * P)[None, :], b_t, mask=m_row)
            else:
                store_pairs(p_out, m_row, b_a, b_b, W, REST, HALF)


def launch_rotate(
    x: torch.Tensor,  # [N, A, D]
    out: torch.Tensor,
    positions: torch.Tensor,  # [N, axes] i32
    sections: list[int],
    theta: float,
    sign: float,
    rotated_rows: bool,
) -> None:
    N, A, D = x.shape
    if x.numel() == 0:
        return
    strides = taken_strides(x, (0, 1))
    unit = unit_of(x, *strides)
    chosen = row("rope_attention_rotate", architecture(x.device))
    tiles = triton.cdiv(N, chosen.blocks["BLOCK_N"])
    heads = max(1, A // max(1, triton.cdiv(PROGRAMS, tiles)))
    with torch.cuda.device_of(x):
        rope_attention_rotate_kernel[(tiles, triton.cdiv(A, heads))](
            x,
            out,
            positions,
            N,
            A,
            heads,
            *(stride // unit for stride in strides),
            math.log2(theta),
            sign,
            UNIT=unit,
            SECTIONS=tuple(sections),
            **pairs_of(D),
            ROTATED_ROWS=rotated_rows,
            **chosen.options,
        )


def rotated_rows(x: torch.Tensor, positions: torch.Tensor, sections: list[int], theta: float) -> torch.Tensor:
    """[N, A, D] -> [A, N, rotated width]"""
    N, A, D = x.shape
    out = torch.empty((A, N, rotated_width(D)), dtype=x.dtype, device=x.device)
    launch_rotate(x, out, positions, sections, theta, 1.0, True)
    return out
