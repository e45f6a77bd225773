"""Gradients of rope_attention in Triton: no atomics, so the same bits at every run.

    p = exp(scale q k - lse), dp = grad v, ds = p (dp - delta), delta = sum(grad out)
    dq = scale ds k, dk = scale ds^T q, dv = p^T grad; q and k rotated, so dq and dk are turned back on store

Three launches: the keys are rotated once (as forward); a kernel per tile of queries sums dq over the keys, and
on its way leaves delta and the rotated queries; a kernel per tile of keys then sums dk and dv over the queries
and has no angle to compute in its loop. Sums stay in the layout of triton_rotary.py, where turning back is
elementwise. s and dp are computed in both: 7 products of D columns, each 80 wide at D = 72 (x 1.11).

In fp32 s and dp are summed from 16 columns at a time, read where they are needed: FFMA takes whole rows of its
operands into a thread's registers, and the 2 D values that stay through the loop are 256 at D = 128.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hulukern.ops.common import check_cu_seqlens
from hulukern.ops.rope_attention.triton_kernels import (
    LOG2_E,
    columns,
    inner_dense,
    logits,
    rotated_tile,
    tuned_as,
)
from hulukern.ops.rope_attention.triton_rotary import (
    angles,
    packed,
    pairs_of,
    rotated,
    rotated_rows,
    rotated_width,
    store_pairs,
    unpacked,
)
from hulukern.ops.triton_common import architecture, rounded, sequence_of_tile, taken_strides, unit_of
from hulukern.tuning import row

# fp32 on FFMA: with three tf32 products, two halves of every operand, all tiles tried for dq spill on sm_80 at some D.
PRECISION = "ieee"


@triton.jit
def _store_turned_back(
    p_out,  # the tile's rows of one head, [B, 1]
    positions,
    b_row,
    m_row,
    d_a,
    d_b,
    d_t,
    log2_theta,
    SECTIONS: tl.constexpr,
    HALF: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    P: tl.constexpr,
):
    sine, cosine = angles(positions, b_row, m_row, log2_theta, 0, W, SECTIONS)
    store_pairs(p_out, m_row[:, None], d_a * cosine + d_b * sine, d_b * cosine - d_a * sine, 0, W, HALF)
    if P:
        sine, cosine = angles(positions, b_row, m_row, log2_theta, W, P, SECTIONS)
        t_a, t_b = unpacked(d_t)
        store_pairs(p_out, m_row[:, None], t_a * cosine + t_b * sine, t_b * cosine - t_a * sine, W, REST, HALF)


@triton.jit
def _streamed_product(
    p_x,  # the tile's first row
    m_x,  # [X]
    stride_x,  # in elements
    p_y,
    m_y,  # [Y]
    stride_y,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T over WIDTH columns, [X, Y], with 16 of them in registers."""
    product = tl.zeros([m_x.shape[0], m_y.shape[0]], tl.float32)
    p_x += tl.arange(0, m_x.shape[0])[:, None] * stride_x
    p_y += tl.arange(0, m_y.shape[0])[:, None] * stride_y
    for first in range(0, WIDTH, 16):
        b_col = first + tl.arange(0, 16)[None, :]
        m_col = b_col < WIDTH if WIDTH % 16 else tl.full([1, 1], True, tl.int1)
        x = tl.load(p_x + b_col, mask=m_x[:, None] & m_col, other=0)
        y = tl.load(p_y + b_col, mask=m_y[:, None] & m_col, other=0)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
    return product


@triton.jit
def _dq_step(
    d_a,
    d_b,
    d_t,
    q_a,
    q_b,
    q_t,
    g,  # [Q, MAIN]
    g_tail,  # [Q, TAIL]
    b_lse2,
    b_delta,
    p_q,  # rotated; the tile's first row, as p_grad
    p_grad,
    m_row,
    stride_grad,
    p_k,
    p_v,
    n_keys,
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
    ROW: tl.constexpr = 2 * W + 2 * P
    STREAMED: tl.constexpr = p_k.dtype.element_ty == tl.float32
    m_key = tl.arange(0, BLOCK_K) < n_keys
    if STREAMED:
        s = _streamed_product(p_q, m_row, ROW, p_k, m_key, ROW, ROW, PRECISION)
        dp = _streamed_product(p_grad, m_row, stride_grad, p_v, m_key, stride_v, MAIN + TAIL_REAL, PRECISION)
    k_a, k_b, k_t = rotated_tile(p_k, m_key, W, P, BLOCK_K, MASKED)
    if not STREAMED:
        s = logits(q_a, q_b, q_t, k_a, k_b, k_t, P, PRECISION)
    p = tl.exp2(s * scale_log2 - b_lse2[:, None])
    if MASKED:
        p = tl.where(m_key[None, :], p, 0.0)
    if not STREAMED:
        v = columns(p_v, m_key, stride_v, 0, MAIN, MAIN, BLOCK_K, MASKED)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if TAIL:
            v_tail = columns(p_v, m_key, stride_v, MAIN, TAIL, TAIL_REAL, BLOCK_K, MASKED)
            dp = tl.dot(g_tail, tl.trans(v_tail), dp, input_precision=PRECISION)
    ds = rounded(p * (dp - b_delta[:, None]), k_a.dtype)
    d_a = tl.dot(ds, k_a, d_a, input_precision=PRECISION)
    d_b = tl.dot(ds, k_b, d_b, input_precision=PRECISION)
    if P:
        d_t = tl.dot(ds, k_t, d_t, input_precision=PRECISION)
    return d_a, d_b, d_t


@triton.jit(do_not_specialize=["Nq", "Nk", "A", "n_sequences"])
def rope_attention_dq_kernel(
    grad,  # [Nq, A, D] at the strides below
    q,  # [Nq, A, D]
    k,  # [A, Nk, 2 W + 2 P] rotated
    v,  # [Nk, A, D]
    out,  # [Nq, A, D]
    lse,  # [A, Nq] f32
    positions_q,  # [Nq, axes] i32
    cu_seqlens_q,  # [S+1] i32
    cu_seqlens_k,  # [S+1] i32
    grad_q,  # [Nq, A, D]
    delta,  # [A, Nq] f32
    q_rotated,  # [A, Nq, 2 W + 2 P]
    Nq,
    Nk,
    A,
    n_sequences,
    stride_grad,  # of rows; strides are in units of UNIT elements
    stride_grad_head,
    stride_q,
    stride_q_head,
    stride_v,
    stride_v_head,
    stride_out,
    stride_out_head,
    log2_theta,
    scale,
    scale_log2,
    UNIT: tl.constexpr,
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
    """grid (tiles of queries, A)"""
    ROW: tl.constexpr = 2 * W + 2 * P
    i_head = tl.program_id(1).to(tl.int64)
    i_seq, row_begin = sequence_of_tile(tl.program_id(0), cu_seqlens_q, n_sequences, BLOCK_Q)
    row_end = tl.load(cu_seqlens_q + i_seq + 1)
    if row_begin >= row_end:
        return
    key_begin = tl.load(cu_seqlens_k + i_seq).to(tl.int64)
    n_keys = (tl.load(cu_seqlens_k + i_seq + 1) - key_begin).to(tl.int32)
    b_row = row_begin.to(tl.int64) + tl.arange(0, BLOCK_Q)
    m_row = b_row < row_end

    p_q = q + (b_row[:, None] * stride_q + i_head * stride_q_head) * UNIT
    p_rotated = q_rotated + (i_head * Nq + b_row[:, None]) * ROW
    sine, cosine = angles(positions_q, b_row, m_row, log2_theta, 0, W, SECTIONS)
    b_a, b_b = rotated(p_q, m_row[:, None], sine, cosine, 0, W, W, HALF)
    q_a = rounded(b_a, q.dtype.element_ty)
    q_b = rounded(b_b, q.dtype.element_ty)
    tl.store(p_rotated + tl.arange(0, W)[None, :], q_a, mask=m_row[:, None])
    tl.store(p_rotated + W + tl.arange(0, W)[None, :], q_b, mask=m_row[:, None])
    q_t = q_a
    if P:
        sine, cosine = angles(positions_q, b_row, m_row, log2_theta, W, P, SECTIONS)
        b_a, b_b = rotated(p_q, m_row[:, None], sine, cosine, W, P, REST, HALF)
        q_t = rounded(packed(b_a, b_b), q.dtype.element_ty)
        tl.store(p_rotated + 2 * W + tl.arange(0, 2 * P)[None, :], q_t, mask=m_row[:, None])

    first = row_begin.to(tl.int64)
    p_grad = grad + (first * stride_grad + i_head * stride_grad_head) * UNIT
    p_o = out + (first * stride_out + i_head * stride_out_head) * UNIT
    g = columns(p_grad, m_row, stride_grad * UNIT, 0, MAIN, MAIN, BLOCK_Q, True)
    b_out = columns(p_o, m_row, stride_out * UNIT, 0, MAIN, MAIN, BLOCK_Q, True)
    b_delta = tl.sum(g.to(tl.float32) * b_out.to(tl.float32), 1)
    g_tail = g
    if TAIL:
        g_tail = columns(p_grad, m_row, stride_grad * UNIT, MAIN, TAIL, TAIL_REAL, BLOCK_Q, True)
        b_out = columns(p_o, m_row, stride_out * UNIT, MAIN, TAIL, TAIL_REAL, BLOCK_Q, True)
        b_delta += tl.sum(g_tail.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta + i_head * Nq + b_row, b_delta, mask=m_row)
    b_lse2 = tl.load(lse + i_head * Nq + b_row, mask=m_row, other=0) * 1.4426950408889634

    p_rotated = q_rotated + (i_head * Nq + first) * ROW
    if q.dtype.element_ty == tl.float32:
        tl.debug_barrier()  # the loop reads rotated queries that other threads stored
    p_k = k + (i_head * Nk + key_begin) * ROW
    p_v = v + (key_begin * stride_v + i_head * stride_v_head) * UNIT
    d_a = tl.zeros([BLOCK_Q, W], tl.float32)
    d_b = tl.zeros([BLOCK_Q, W], tl.float32)
    d_t = tl.zeros([BLOCK_Q, max(2 * P, 1)], tl.float32)
    n_whole = n_keys // BLOCK_K
    for _ in range(n_whole):
        d_a, d_b, d_t = _dq_step(
            d_a, d_b, d_t, q_a, q_b, q_t, g, g_tail, b_lse2, b_delta, p_rotated, p_grad, m_row, stride_grad * UNIT,
            p_k, p_v, BLOCK_K, stride_v * UNIT, scale_log2, W, P, MAIN, TAIL, TAIL_REAL, BLOCK_K, PRECISION, False,
        )  # fmt: skip
        p_k += BLOCK_K * ROW
        p_v += BLOCK_K * stride_v * UNIT
    n_rest = n_keys - n_whole * BLOCK_K
    if n_rest > 0:
        d_a, d_b, d_t = _dq_step(
            d_a, d_b, d_t, q_a, q_b, q_t, g, g_tail, b_lse2, b_delta, p_rotated, p_grad, m_row, stride_grad * UNIT,
            p_k, p_v, n_rest, stride_v * UNIT, scale_log2, W, P, MAIN, TAIL, TAIL_REAL, BLOCK_K, PRECISION, True,
        )  # fmt: skip
    p_out = grad_q + (b_row[:, None] * A + i_head) * (2 * HALF)
    _store_turned_back(
        p_out, positions_q, b_row, m_row, d_a * scale, d_b * scale, d_t * scale, log2_theta, SECTIONS, HALF, W, REST, P
    )


@triton.jit
def _dkv_step(
    dk_a,
    dk_b,
    dk_t,
    dv,
    dv_tail,
    k_a,
    k_b,
    k_t,
    b_v,
    v_tail,
    p_k,  # the tile's first row, as p_v
    p_v,
    m_key,
    stride_v,
    p_q,
    p_grad,
    p_lse,
    p_delta,
    n_rows,
    stride_grad,
    scale_log2,
    W: tl.constexpr,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_REAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of queries; everything is transposed, [K, Q]."""
    ROW: tl.constexpr = 2 * W + 2 * P
    STREAMED: tl.constexpr = p_q.dtype.element_ty == tl.float32
    b_at = tl.arange(0, BLOCK_Q)
    m_row = b_at < n_rows
    if STREAMED:
        s = _streamed_product(p_k, m_key, ROW, p_q, m_row, ROW, ROW, PRECISION)
        dp = _streamed_product(p_v, m_key, stride_v, p_grad, m_row, stride_grad, MAIN + TAIL_REAL, PRECISION)
    else:
        q_a, q_b, q_t = rotated_tile(p_q, m_row, W, P, BLOCK_Q, MASKED)
    # A row past the end gets an infinite log-sum-exp, hence p = 0.
    b_lse2 = tl.load(p_lse + b_at, mask=m_row, other=float("inf")) * 1.4426950408889634
    b_delta = tl.load(p_delta + b_at, mask=m_row, other=0.0)
    if not STREAMED:
        s = logits(k_a, k_b, k_t, q_a, q_b, q_t, P, PRECISION)
    p = tl.exp2(s * scale_log2 - b_lse2[None, :])
    g = columns(p_grad, m_row, stride_grad, 0, MAIN, MAIN, BLOCK_Q, MASKED)
    b_p = rounded(p, g.dtype)
    dv = tl.dot(b_p, g, dv, input_precision=PRECISION)
    if not STREAMED:
        dp = tl.dot(b_v, tl.trans(g), input_precision=PRECISION)
    if TAIL:
        g_tail = columns(p_grad, m_row, stride_grad, MAIN, TAIL, TAIL_REAL, BLOCK_Q, MASKED)
        dv_tail = tl.dot(b_p, g_tail, dv_tail, input_precision=PRECISION)
        if not STREAMED:
            dp = tl.dot(v_tail, tl.trans(g_tail), dp, input_precision=PRECISION)
    ds = rounded(p * (dp - b_delta[None, :]), g.dtype)
    if STREAMED:
        q_a, q_b, q_t = rotated_tile(p_q, m_row, W, P, BLOCK_Q, MASKED)
    dk_a = tl.dot(ds, q_a, dk_a, input_precision=PRECISION)
    dk_b = tl.dot(ds, q_b, dk_b, input_precision=PRECISION)
    if P:
        dk_t = tl.dot(ds, q_t, dk_t, input_precision=PRECISION)
    return dk_a, dk_b, dk_t, dv, dv_tail


@triton.jit(do_not_specialize=["Nq", "Nk", "A", "n_sequences"])
def rope_attention_dkdv_kernel(
    grad,  # [Nq, A, D] at the strides below
    q,  # [A, Nq, 2 W + 2 P] rotated
    k,  # [A, Nk, 2 W + 2 P] rotated
    v,  # [Nk, A, D]
    lse,  # [A, Nq] f32
    delta,  # [A, Nq] f32
    positions_k,  # [Nk, axes] i32
    cu_seqlens_q,  # [S+1] i32
    cu_seqlens_k,  # [S+1] i32
    grad_k,  # [Nk, A, D]
    grad_v,  # [Nk, A, D]
    Nq,
    Nk,
    A,
    n_sequences,
    stride_grad,  # of rows; strides are in units of UNIT elements
    stride_grad_head,
    stride_v,
    stride_v_head,
    log2_theta,
    scale,
    scale_log2,
    UNIT: tl.constexpr,
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
    """grid (tiles of keys, A)"""
    ROW: tl.constexpr = 2 * W + 2 * P
    i_head = tl.program_id(1).to(tl.int64)
    i_seq, key_begin = sequence_of_tile(tl.program_id(0), cu_seqlens_k, n_sequences, BLOCK_K)
    key_end = tl.load(cu_seqlens_k + i_seq + 1)
    if key_begin >= key_end:
        return
    row_begin = tl.load(cu_seqlens_q + i_seq).to(tl.int64)
    n_rows = (tl.load(cu_seqlens_q + i_seq + 1) - row_begin).to(tl.int32)
    first = key_begin.to(tl.int64)
    b_key = first + tl.arange(0, BLOCK_K)
    m_key = b_key < key_end

    p_k = k + (i_head * Nk + first) * ROW
    k_a, k_b, k_t = rotated_tile(p_k, m_key, W, P, BLOCK_K, True)
    p_v = v + (first * stride_v + i_head * stride_v_head) * UNIT
    b_v = columns(p_v, m_key, stride_v * UNIT, 0, MAIN, MAIN, BLOCK_K, True)
    v_tail = columns(p_v, m_key, stride_v * UNIT, MAIN, TAIL, TAIL_REAL, BLOCK_K, True) if TAIL else b_v

    p_q = q + (i_head * Nq + row_begin) * ROW
    p_grad = grad + (row_begin * stride_grad + i_head * stride_grad_head) * UNIT
    p_lse = lse + i_head * Nq + row_begin
    p_delta = delta + i_head * Nq + row_begin
    dk_a = tl.zeros([BLOCK_K, W], tl.float32)
    dk_b = tl.zeros([BLOCK_K, W], tl.float32)
    dk_t = tl.zeros([BLOCK_K, max(2 * P, 1)], tl.float32)
    dv = tl.zeros([BLOCK_K, MAIN], tl.float32)
    dv_tail = tl.zeros([BLOCK_K, max(TAIL, 1)], tl.float32)
    n_whole = n_rows // BLOCK_Q
    for _ in range(n_whole):
        dk_a, dk_b, dk_t, dv, dv_tail = _dkv_step(
            dk_a, dk_b, dk_t, dv, dv_tail, k_a, k_b, k_t, b_v, v_tail, p_k, p_v, m_key, stride_v * UNIT, p_q, p_grad,
            p_lse, p_delta, BLOCK_Q, stride_grad * UNIT, scale_log2, W, P, MAIN, TAIL, TAIL_REAL, BLOCK_Q, PRECISION,
            False,
        )  # fmt: skip
        p_q += BLOCK_Q * ROW
        p_grad += BLOCK_Q * stride_grad * UNIT
        p_lse += BLOCK_Q
        p_delta += BLOCK_Q
    n_rest = n_rows - n_whole * BLOCK_Q
    if n_rest > 0:
        dk_a, dk_b, dk_t, dv, dv_tail = _dkv_step(
            dk_a, dk_b, dk_t, dv, dv_tail, k_a, k_b, k_t, b_v, v_tail, p_k, p_v, m_key, stride_v * UNIT, p_q, p_grad,
            p_lse, p_delta, n_rest, stride_grad * UNIT, scale_log2, W, P, MAIN, TAIL, TAIL_REAL, BLOCK_Q, PRECISION,
            True,
        )  # fmt: skip

    o_out = (b_key[:, None] * A + i_head) * (2 * HALF)
    b_col = tl.arange(0, MAIN)[None, :]
    tl.store(grad_v + o_out + b_col, rounded(dv, grad_v.dtype.element_ty), mask=m_key[:, None])
    if TAIL:
        b_col = tl.arange(0, TAIL)[None, :]
        m = m_key[:, None] & (b_col < TAIL_REAL)
        tl.store(grad_v + o_out + MAIN + b_col, rounded(dv_tail, grad_v.dtype.element_ty), mask=m)
    _store_turned_back(
        grad_k + o_out, positions_k, b_key, m_key, dk_a * scale, dk_b * scale, dk_t * scale, log2_theta, SECTIONS,
        HALF, W, REST, P,
    )  # fmt: skip


def rope_attention_backward(
    grad: torch.Tensor,  # [Nq, A, D]
    q: torch.Tensor,  # [Nq, A, D]
    k: torch.Tensor,  # [Nk, A, D]
    v: torch.Tensor,  # [Nk, A, D]
    out: torch.Tensor,  # [Nq, A, D]
    lse: torch.Tensor,  # [A, Nq] f32
    positions_q: torch.Tensor,  # [Nq, axes] i32
    positions_k: torch.Tensor,  # [Nk, axes] i32
    cu_seqlens_q: torch.Tensor,  # [S+1] i32
    cu_seqlens_k: torch.Tensor,  # [S+1] i32
    sections: list[int],
    theta: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # of q, k, v
    op = "rope_attention_backward"
    (Nq, A, D), Nk = q.shape, k.shape[0]
    check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, Nq)
    check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, Nk)
    grad, q, k, v, out = (inner_dense(x) for x in (grad, q, k, v, out))
    lse, positions_q, positions_k = lse.contiguous(), positions_q.contiguous(), positions_k.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    grad_q = torch.empty((Nq, A, D), dtype=q.dtype, device=q.device)
    grad_k = torch.empty((Nk, A, D), dtype=q.dtype, device=q.device)
    grad_v = torch.empty((Nk, A, D), dtype=q.dtype, device=q.device)
    n_sequences = cu_seqlens_q.shape[0] - 1
    if A == 0 or n_sequences == 0:
        return grad_q, grad_k, grad_v
    k_rotated = rotated_rows(k, positions_k, sections, theta)
    q_rotated = torch.empty((A, Nq, rotated_width(D)), dtype=q.dtype, device=q.device)
    delta = torch.empty((A, Nq), dtype=torch.float32, device=q.device)
    strides = {name: taken_strides(x, (0, 1)) for name, x in (("grad", grad), ("q", q), ("v", v), ("out", out))}
    unit = unit_of(q, *(stride for pair in strides.values() for stride in pair))
    of = {name: tuple(stride // unit for stride in pair) for name, pair in strides.items()}
    main = 2 ** int(math.log2(D))
    constants = {
        "UNIT": unit, "SECTIONS": tuple(sections), **pairs_of(D), "PRECISION": PRECISION,
        # A sum over columns takes them by 16.
        "MAIN": main, "TAIL": max(D - main, 16) if main < D else 0, "TAIL_REAL": D - main,
    }  # fmt: skip
    scalars = (math.log2(theta), scale, scale * LOG2_E)
    arch = architecture(q.device)
    with torch.cuda.device_of(q):
        chosen = row(tuned_as("rope_attention_dq", q), arch)
        rope_attention_dq_kernel[(Nq // chosen.blocks["BLOCK_Q"] + n_sequences, A)](
            grad, q, k_rotated, v, out, lse, positions_q, cu_seqlens_q, cu_seqlens_k, grad_q, delta, q_rotated,
            Nq, Nk, A, n_sequences, *of["grad"], *of["q"], *of["v"], *of["out"], *scalars,
            **constants, **chosen.options,
        )  # fmt: skip
        chosen = row(tuned_as("rope_attention_dkdv", q), arch)
        rope_attention_dkdv_kernel[(Nk // chosen.blocks["BLOCK_K"] + n_sequences, A)](
            grad, q_rotated, k_rotated, v, lse, delta, positions_k, cu_seqlens_q, cu_seqlens_k, grad_k, grad_v,
            Nq, Nk, A, n_sequences, *of["grad"], *of["v"], *scalars,
            **constants, **chosen.options,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
