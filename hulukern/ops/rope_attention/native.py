"""rope_attention through the C ABI, on the CPU and on CUDA alike."""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, packed_rows


def _scratch(on_cuda: bool, x: torch.Tensor) -> torch.Tensor | None:
    """Where a CUDA call keeps x rotated; the CPU has its own."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if on_cuda else None


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions_q: torch.Tensor,
    positions_k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    sections: list[int],
    theta: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (packed_rows(x, 1) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    where = (positions_q, positions_k, cu_seqlens_q, cu_seqlens_k)
    target = native_target(q)
    _C.rope_attention(
        *target, q, k, v, *(x.contiguous() for x in where), out, lse, _scratch(target[0], k), sections, theta, scale
    )  # fmt: skip
    return out, lse


def rope_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    positions_q: torch.Tensor,
    positions_k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    sections: list[int],
    theta: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q, k, v, out = (packed_rows(x, 1) for x in (grad, q, k, v, out))
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    where = (lse, positions_q, positions_k, cu_seqlens_q, cu_seqlens_k)
    target = native_target(q)
    _C.rope_attention_backward(
        *target, grad, q, k, v, out, *(x.contiguous() for x in where), grad_q, grad_k, grad_v, delta,
        _scratch(target[0], q), _scratch(target[0], k), sections, theta, scale,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def rope_attention_rotate(
    x: torch.Tensor, positions: torch.Tensor, sections: list[int], theta: float, inverse: bool
) -> torch.Tensor:
    x = packed_rows(x, 1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _C.rope_attention_rotate(*native_target(x), x, positions.contiguous(), out, sections, theta, inverse)
    return out
