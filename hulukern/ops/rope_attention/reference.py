"""rope_attention in plain torch: what every backend must equal."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hulukern.ops.common import check_cu_seqlens


def angles(positions: torch.Tensor, sections: list[int], theta: float, dtype: torch.dtype) -> torch.Tensor:
    """[N, axes] -> [N, D/2]: axis a turns ``sections[a]`` pairs, pair i of n by position / theta**(i/n)."""
    parts = []
    for axis, n in enumerate(sections):
        i = torch.arange(n, dtype=dtype, device=positions.device)
        parts.append(positions[:, axis, None].to(dtype) * (1 / theta ** (i / n)))
    return torch.cat(parts, 1)


def rope_attention_rotate(
    x: torch.Tensor,  # [N, A, D]
    positions: torch.Tensor,  # [N, axes] i32
    sections: list[int],
    theta: float,
    inverse: bool,
) -> torch.Tensor:  # [N, A, D]
    wide = torch.promote_types(x.dtype, torch.float32)
    return _rotate(x.to(wide), positions, sections, theta, inverse).to(x.dtype)


def _rotate(x: torch.Tensor, positions: torch.Tensor, sections: list[int], theta: float, inverse: bool) -> torch.Tensor:
    """Pairs (i, i + D/2) of every head, as rotate-half does."""
    a = angles(positions, sections, theta, x.dtype)[:, None]
    cos, sin = a.cos(), -a.sin() if inverse else a.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


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
    check_cu_seqlens("rope_attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    check_cu_seqlens("rope_attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    q_rotated = _rotate(q.to(wide), positions_q, sections, theta, False).transpose(0, 1)  # [A, Nq, D]
    k_rotated = _rotate(k.to(wide), positions_k, sections, theta, False).transpose(0, 1)
    values = v.to(wide).transpose(0, 1)
    outs, lses = [q_rotated[:, :0]], [q_rotated[:, :0, 0]]
    for in_q, in_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        logits = q_rotated[:, in_q] @ k_rotated[:, in_k].transpose(1, 2) * scale
        outs.append(logits.softmax(-1) @ values[:, in_k])
        lses.append(logits.detach().logsumexp(-1))
    return torch.cat(outs, 1).transpose(0, 1).to(q.dtype).contiguous(), torch.cat(lses, 1)


def rope_attention_backward(
    grad: torch.Tensor,  # [Nq, A, D]
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,  # [A, Nq]
    positions_q: torch.Tensor,
    positions_k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    sections: list[int],
    theta: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # of q, k, v
    check_cu_seqlens("rope_attention_backward", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    check_cu_seqlens("rope_attention_backward", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    q_rotated = _rotate(q.to(wide), positions_q, sections, theta, False).transpose(0, 1)
    k_rotated = _rotate(k.to(wide), positions_k, sections, theta, False).transpose(0, 1)
    values, g = v.to(wide).transpose(0, 1), grad.to(wide).transpose(0, 1)
    # Softmax's own term, sum_j p_ij dp_ij, is grad . out.
    delta = (g * out.to(wide).transpose(0, 1)).sum(-1)  # [A, Nq]
    grad_q, grad_k, grad_v = torch.zeros_like(q_rotated), torch.zeros_like(k_rotated), torch.zeros_like(values)
    for in_q, in_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        logits = q_rotated[:, in_q] @ k_rotated[:, in_k].transpose(1, 2) * scale
        p = torch.exp(logits - lse[:, in_q, None].to(wide))
        dp = g[:, in_q] @ values[:, in_k].transpose(1, 2)
        ds = p * (dp - delta[:, in_q, None]) * scale
        grad_q[:, in_q] = ds @ k_rotated[:, in_k]
        grad_k[:, in_k] = ds.transpose(1, 2) @ q_rotated[:, in_q]
        grad_v[:, in_k] = p.transpose(1, 2) @ g[:, in_q]
    back_q = _rotate(grad_q.transpose(0, 1), positions_q, sections, theta, True)
    back_k = _rotate(grad_k.transpose(0, 1), positions_k, sections, theta, True)
    return back_q.to(q.dtype), back_k.to(k.dtype), grad_v.transpose(0, 1).to(v.dtype).contiguous()


def _sequences(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(ends_q) - 1):
        yield slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
