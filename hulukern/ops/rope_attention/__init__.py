"""rope_attention: vision attention with the rotary inside, over packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hulukern.ops.common import listed, whole
from hulukern.ops.rope_attention.spec import ROPE_ATTENTION, ROPE_ATTENTION_BACKWARD, ROPE_ATTENTION_ROTATE
from hulukern.registry import register
from hulukern.validation import fail, number


def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_backward(grad: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_rotate(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


_backward_op = register(ROPE_ATTENTION_BACKWARD, __name__, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx: Any, grad: torch.Tensor, _grad_lse: Any) -> tuple[Any, ...]:
    q, k, v, *where, out, lse = ctx.saved_tensors
    grads = _backward_op(grad, q, k, v, out, lse, *where, *ctx.options)
    return *grads, *[None] * 8


def _setup_rotate(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, positions, *ctx.options = inputs
    ctx.save_for_backward(positions)


def _backward_rotate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    sections, theta, inverse, backend = ctx.options
    return _rotate_op(grad, positions, sections, theta, not inverse, backend), *[None] * 5


_op = register(ROPE_ATTENTION, __name__, _fake, _backward, _setup)
_rotate_op = register(ROPE_ATTENTION_ROTATE, __name__, _fake_rotate, _backward_rotate, _setup_rotate)


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    positions_q: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    sections: Sequence[int] | None = None,
    theta: float = 10000.0,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Rotate q and k by their coordinates, then attend without a mask within each packed sequence.

    Args:
        q, k, v: ``[N, A, D]`` float32, bfloat16 or float16, one dtype, not rotated. Any strides, so that the
            views ``qkv.unbind(1)`` of a packed ``[N, 3, A, D]`` product are read in place. D is 64, 72, 80, 96
            or 128 for ``"triton"`` and ``"cuda"``, any even number from 2 to 256 for ``"cpu"`` and any even one
            for ``"reference"``.
        positions: ``[N, axes]`` int32 coordinates, such as :func:`hulukern.grid_positions` gives. On CUDA and in
            Triton angles are of fp32: coordinates up to 10 million.
        cu_seqlens: ``[S+1]`` int32, sequence s is rows ``cu_seqlens[s]`` to ``cu_seqlens[s+1]``, such as
            :func:`hulukern.grid_cu_seqlens` gives. On a CUDA device the values are not checked, since
            reading them would stall the stream.
        positions_q, cu_seqlens_q: of the queries, where these are other rows than the keys: ``[Nq, axes]``
            and ``[S+1]``, then q is ``[Nq, A, D]``. Both or neither.
        sections: pairs per axis, in the order of the coordinates; they add up to D/2. Pair i of the n of an
            axis turns by ``position / theta**(i/n)`` and joins dimensions j and j + D/2 (rotate-half).
            None splits D/2 evenly over the axes: (18, 18) for (h, w) and (12, 12, 12) for (t, h, w) at D = 72.
        scale: of the logits; None is ``D**-0.5``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        ``[Nq, A, D]`` in q's dtype. Angles, rotation and softmax are fp32. A query whose sequence has no keys
        gets zeros. Differentiable in q, k and v.

    Raises:
        TypeError: wrong type or dtype. ValueError: shapes, a D that the backend does not take, sections,
        cu_seqlens that fall or do not end at N.
        BackendUnavailable: the backend cannot run here.

    Source: Hulu-Med's encoder attention; the 3D form extends it by a frame axis.
    """
    op = "rope_attention"
    if (positions_q is None) != (cu_seqlens_q is None):
        fail(op, "positions_q, cu_seqlens_q", "one of the two", "both or neither")
    split = _sections(op, sections, q, positions)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else number(op, "scale", scale)
    return _op(
        q, k, v, positions if positions_q is None else positions_q, positions,
        cu_seqlens if cu_seqlens_q is None else cu_seqlens_q, cu_seqlens,
        split, number(op, "theta", theta), scale, backend or "",
    )[0]  # fmt: skip


def rope_attention_rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    *,
    sections: Sequence[int] | None = None,
    theta: float = 10000.0,
    inverse: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The rotary of :func:`rope_attention` alone: ``[N, A, D]`` by ``[N, axes]`` int32 coordinates.

    ``inverse`` turns back. Differentiable in x.
    """
    op = "rope_attention_rotate"
    options = (_sections(op, sections, x, positions), number(op, "theta", theta), inverse, backend or "")
    return _rotate_op(x, positions, *options)


def _sections(op: str, sections: Sequence[int] | None, x: torch.Tensor, positions: torch.Tensor) -> list[int]:
    for name, tensor in (("q", x), ("positions", positions)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
            came = (
                f"shape {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else f"type {type(tensor).__name__}"
            )
            fail(op, name, came, "[N, A, D] and positions [N, axes]", TypeError)
    if sections is not None:
        return [whole(op, "sections", n) for n in listed(op, "sections", sections, "pair counts, one per axis")]
    pairs, axes = x.shape[-1] // 2, positions.shape[-1]
    if axes < 1 or pairs % axes:
        fail(op, "sections", "value None", f"pair counts, since D/2 = {pairs} does not divide into {axes} axes")
    return [pairs // axes] * axes
