"""rope_attention in Triton: rotary in the load of q, one pass over the keys with exp2 and fp32 sums.

Keys are rotated once, into rows that the kernels load with 16-byte accesses and no mask (triton_rotary.py),
and not again by every tile of queries: 36 pairs of sine and cosine cost a key about 1400 operations, the
softmax of 128 queries about 640, so rotating in the loop would triple the work beside the tensor units
(33 us at 4x1024, A 16, D 72 on 132 SMs), while the pass over k moves 2.1 x k (19 MB, 6 us at 3 TB/s, or less
from L2). Only from one tile of queries a sequence downwards would both cost the same.

Values are read where they are, as 2**floor(log2(D)) columns and the rest: 72 = 64 + 8, with no padding. Tensor
work at D = 72 is thus 80 columns for q k and 72 for p v: (80 + 72) / 144 = 1.056 of what the op needs, where a
power of two would take 1.78. On sm_100 an instruction of 128 rows takes columns by 16: 80 + 80, 1.11.

A tile finds its sequence by bisection of cu_seqlens; the grid follows from shapes, so no count comes to the
host. Whole tiles of keys need no mask; the last of a sequence is a second copy of the loop's body.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hulukern.ops.common import check_cu_seqlens
from hulukern.ops.rope_attention.triton_rotary import (
    angles,
    launch_rotate,
    packed,
    pairs_of,
    rotated,
    rotated_rows,
)
from hulukern.ops.triton_common import architecture, rounded, sequence_of_tile, taken_strides, unit_of
from hulukern.tuning import row

# fp32 products as three of tf32: fp32's precision on tensor units. FFMA (ieee) spills at every tile size.
PRECISION = "tf32x3"
LOG2_E = math.log2(math.e)


def split_of(D: int, arch: int) -> dict[str, int]:
    """Columns of values as two powers of two: MAIN, and TAIL_REAL held as TAIL."""
    main = 2 ** int(math.log2(D))
    tail = D - main
    # tcgen05.mma with 128 rows takes N by 16; Triton emits it with 8 too, and ptxas cannot see that.
    return {"MAIN": main, "TAIL": max(tail, 16) if tail and 100 <= arch < 120 else tail, "TAIL_REAL": tail}


@triton.jit
def _rotated_columns(
    p_x,  # the tile's first rotated row
    m_row,  # [B]
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns FIRST to FIRST + WIDTH of BLOCK rotated rows, zeros past the last."""
    p = p_x + tl.arange(0, BLOCK)[:, None] * ROW + FIRST + tl.arange(0, WIDTH)[None, :]
    return tl.load(p, mask=m_row[:, None], other=0) if MASKED else tl.load(p)


@triton.jit
def rotated_tile(p_x, m_row, W: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK rotated rows of queries or keys as the operands of ``logits``; the third says nothing without P."""
    ROW: tl.constexpr = 2 * W + 2 * P
    x_a = _rotated_columns(p_x, m_row, 0, W, ROW, BLOCK, MASKED)
    x_b = _rotated_columns(p_x, m_row, W, W, ROW, BLOCK, MASKED)
    x_t = _rotated_columns(p_x, m_row, 2 * W, 2 * P, ROW, BLOCK, MASKED) if P else x_a
    return x_a, x_b, x_t


@triton.jit
def columns(
    p_x,  # the tile's first row of one head
    m_row,  # [B]
    stride,  # in elements
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns FIRST to FIRST + REAL of BLOCK plain rows, WIDTH wide; zeros elsewhere."""
    b_col = tl.arange(0, WIDTH)[None, :]
    p = p_x + tl.arange(0, BLOCK)[:, None] * stride + FIRST + b_col
    m = m_row[:, None] if MASKED else tl.full([1, 1], True, tl.int1)
    if REAL < WIDTH:
        return tl.load(p, mask=m & (b_col < REAL), other=0)
    return tl.load(p, mask=m, other=0) if MASKED else tl.load(p)


@triton.jit
def logits(q_a, q_b, q_t, k_a, k_b, k_t, P: tl.constexpr, PRECISION: tl.constexpr):
    """[Q, K] or its transpose, by the order of the operands."""
    s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION)
    if P:
        s = tl.dot(q_t, tl.trans(k_t), s, input_precision=PRECISION)
    return s


@triton.jit
def _attend(
    acc,  # [Q, MAIN]
    acc_tail,  # [Q, TAIL]
    b_max,  # [Q], of logits in units of log2
    b_sum,  # [Q]
    q_a,
    q_b,
    q_t,
    p_k,
    p_v,
    n_keys,  # from the tile's first on
    stride_v,
    scale_log2,
    W: tl.constexpr,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_REAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys."""
    m_key = tl.arange(0, BLOCK_K) < n_keys
    k_a, k_b, k_t = rotated_tile(p_k, m_key, W, P, BLOCK_K, MASKED)
    s = logits(q_a, q_b, q_t, k_a, k_b, k_t, P, PRECISION)
    if MASKED:
        s = tl.where(m_key[None, :], s, -float("inf"))
    new_max = tl.maximum(b_max, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_max[:, None])
    shrink = tl.exp2(b_max - new_max)
    b_sum = b_sum * shrink + tl.sum(p, 1)
    v = columns(p_v, m_key, stride_v, 0, MAIN, MAIN, BLOCK_K, MASKED)
    p = rounded(p, v.dtype)
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
    if TAIL:
        v_tail = columns(p_v, m_key, stride_v, MAIN, TAIL, TAIL_REAL, BLOCK_K, MASKED)
        acc_tail = tl.dot(p, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION)
    return acc, acc_tail, new_max, b_sum


@triton.jit(do_not_specialize=["Nq", "Nk", "A", "n_sequences"])
def rope_attention_kernel(
    q,  # [Nq, A, D] at the strides below
    k,  # [A, Nk, 2 W + 2 P] rotated
    v,  # [Nk, A, D]
    positions_q,  # [Nq, axes] i32
    cu_seqlens_q,  # [S+1] i32
    cu_seqlens_k,  # [S+1] i32
    out,  # [Nq, A, D]
    lse,  # [A, Nq] f32
    Nq,
    Nk,
    A,
    n_sequences,
    stride_q,  # of rows; strides are in units of UNIT elements
    stride_q_head,
    stride_v,
    stride_v_head,
    log2_theta,
    scale_log2,
    UNIT_Q: tl.constexpr,
    UNIT_V: tl.constexpr,
    SECTIONS: tl.constexpr,
    HALF: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_REAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grid (tiles of queries, A): neighbours share a head's keys and values in L2."""
    i_head = tl.program_id(1).to(tl.int64)
    i_seq, row_begin = sequence_of_tile(tl.program_id(0), cu_seqlens_q, n_sequences, BLOCK_Q)
    row_end = tl.load(cu_seqlens_q + i_seq + 1)
    if row_begin >= row_end:
        return
    key_begin = tl.load(cu_seqlens_k + i_seq).to(tl.int64)
    n_keys = (tl.load(cu_seqlens_k + i_seq + 1) - key_begin).to(tl.int32)

    b_row = row_begin.to(tl.int64) + tl.arange(0, BLOCK_Q)
    m_row = b_row < row_end
    p_q = q + (b_row[:, None] * stride_q + i_head * stride_q_head) * UNIT_Q
    sine, cosine = angles(positions_q, b_row, m_row, log2_theta, 0, W, SECTIONS)
    b_a, b_b = rotated(p_q, m_row[:, None], sine, cosine, 0, W, W, HALF)
    q_a = rounded(b_a, q.dtype.element_ty)
    q_b = rounded(b_b, q.dtype.element_ty)
    q_t = q_a
    if P:
        sine, cosine = angles(positions_q, b_row, m_row, log2_theta, W, P, SECTIONS)
        b_a, b_b = rotated(p_q, m_row[:, None], sine, cosine, W, P, REST, HALF)
        q_t = rounded(packed(b_a, b_b), q.dtype.element_ty)

    p_k = k + (i_head * Nk + key_begin) * (2 * W + 2 * P)
    p_v = v + (key_begin * stride_v + i_head * stride_v_head) * UNIT_V
    acc = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_Q, max(TAIL, 1)], tl.float32)
    b_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    n_whole = n_keys // BLOCK_K
    for _ in range(n_whole):
        acc, acc_tail, b_max, b_sum = _attend(
            acc, acc_tail, b_max, b_sum, q_a, q_b, q_t, p_k, p_v, BLOCK_K, stride_v * UNIT_V, scale_log2,
            W, P, MAIN, TAIL, TAIL_REAL, BLOCK_K, PRECISION, False,
        )  # fmt: skip
        p_k += BLOCK_K * (2 * W + 2 * P)
        p_v += BLOCK_K * stride_v * UNIT_V
    n_rest = n_keys - n_whole * BLOCK_K
    if n_rest > 0:
        acc, acc_tail, b_max, b_sum = _attend(
            acc, acc_tail, b_max, b_sum, q_a, q_b, q_t, p_k, p_v, n_rest, stride_v * UNIT_V, scale_log2,
            W, P, MAIN, TAIL, TAIL_REAL, BLOCK_K, PRECISION, True,
        )  # fmt: skip

    inverse = tl.where(b_sum > 0, 1.0 / b_sum, 0.0)[:, None]
    p_out = out + (b_row[:, None] * A + i_head) * (2 * HALF)
    m_row = m_row[:, None]
    tl.store(p_out + tl.arange(0, MAIN)[None, :], rounded(acc * inverse, out.dtype.element_ty), mask=m_row)
    if TAIL:
        b_col = tl.arange(0, TAIL)[None, :]
        b_tail = rounded(acc_tail * inverse, out.dtype.element_ty)
        tl.store(p_out + MAIN + b_col, b_tail, mask=m_row & (b_col < TAIL_REAL))
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    tl.store(lse + i_head * Nq + b_row, b_lse, mask=b_row < row_end)


def tuned_as(kernel: str, x: torch.Tensor) -> str:
    """The tuning table's name for it: fp32 and wide heads have rows of their own."""
    if x.dtype == torch.float32:
        return f"{kernel}.fp32"
    return f"{kernel}.d128" if x.shape[2] == 128 else kernel


def inner_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope_attention(
    q: torch.Tensor,  # [Nq, A, D]
    k: torch.Tensor,  # [Nk, A, D]
    v: torch.Tensor,  # [Nk, A, D]
    positions_q: torch.Tensor,  # [Nq, axes] i32
    positions_k: torch.Tensor,  # [Nk, axes] i32
    cu_seqlens_q: torch.Tensor,  # [S+1] i32
    cu_seqlens_k: torch.Tensor,  # [S+1] i32
    sections: list[int],
    theta: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # out [Nq, A, D], log-sum-exp [A, Nq] f32
    Nq, A, D = q.shape
    check_cu_seqlens("rope_attention", "cu_seqlens_q", cu_seqlens_q, Nq)
    check_cu_seqlens("rope_attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    q, k, v = (inner_dense(x) for x in (q, k, v))
    out = torch.empty((Nq, A, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((A, Nq), dtype=torch.float32, device=q.device)
    n_sequences = cu_seqlens_q.shape[0] - 1
    if q.numel() == 0 or n_sequences == 0:
        return out, lse
    k_rotated = rotated_rows(k, positions_k.contiguous(), sections, theta)
    strides_q, strides_v = taken_strides(q, (0, 1)), taken_strides(v, (0, 1))
    unit_q, unit_v = unit_of(q, *strides_q), unit_of(v, *strides_v)
    arch = architecture(q.device)
    chosen = row(tuned_as("rope_attention", q), arch)
    with torch.cuda.device_of(q):
        rope_attention_kernel[(Nq // chosen.blocks["BLOCK_Q"] + n_sequences, A)](
            q,
            k_rotated,
            v,
            positions_q.contiguous(),
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            out,
            lse,
            Nq,
            k.shape[0],
            A,
            n_sequences,
            *(stride // unit_q for stride in strides_q),
            *(stride // unit_v for stride in strides_v),
            math.log2(theta),
            scale * LOG2_E,
            UNIT_Q=unit_q,
            UNIT_V=unit_v,
            SECTIONS=tuple(sections),
            **pairs_of(D),
            **split_of(D, arch),
            PRECISION=PRECISION,
            **chosen.options,
        )
    return out, lse


def rope_attention_rotate(
    x: torch.Tensor,  # [N, A, D]
    positions: torch.Tensor,  # [N, axes] i32
    sections: list[int],
    theta: float,
    inverse: bool,
) -> torch.Tensor:  # [N, A, D]
    x = inner_dense(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_rotate(x, out, positions.contiguous(), sections, theta, -1.0 if inverse else 1.0, False)
    return out
