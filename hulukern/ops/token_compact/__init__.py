"""token_compact: the rows a mask keeps, in order, and all that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hulukern.ops.common import listed, whole
from hulukern.ops.token_compact.spec import TOKEN_COMPACT, TOKEN_COMPACT_BACKWARD
from hulukern.registry import register
from hulukern.validation import fail, shape_text


@dataclass(frozen=True)
class Compacted:
    """What :func:`token_compact` returns. B is K, or the bound."""

    tensors: list[torch.Tensor]  # each [B, ...]
    index: torch.Tensor  # [B] int64, rows of the input; -1 past the count
    position_ids: torch.Tensor  # [B] int64, place within its sequence; 0 past the count
    cu_seqlens: torch.Tensor  # [S+1] int32
    count: torch.Tensor  # [1] int64, the true K, also when it is above the bound


def _fake(
    keep: torch.Tensor, tensors: list[torch.Tensor], cu_seqlens: torch.Tensor | None, n_rows: int, bound: int | None,
    fill: list[int],
) -> tuple[Any, ...]:  # fmt: skip
    size: Any = bound
    if bound is None:
        size = keep.shape[0] if keep.dtype != torch.bool else torch.library.get_ctx().new_dynamic_size()
    rows = [x.new_empty((size, *x.shape[1:])) for x in tensors]
    ends = 2 if cu_seqlens is None else cu_seqlens.shape[0]
    index = keep.new_empty(size, dtype=torch.int64)
    cu_seqlens_out = keep.new_empty(ends, dtype=torch.int32)
    return rows, index, torch.empty_like(index), cu_seqlens_out, keep.new_empty(1, dtype=torch.int64)


def _fake_backward(grad: torch.Tensor, index: torch.Tensor, n_rows: int) -> torch.Tensor:
    return grad.new_empty((n_rows, *grad.shape[1:]))


_backward_op = register(TOKEN_COMPACT_BACKWARD, __name__, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.n_rows, ctx.backend = inputs[3], inputs[-1]
    ctx.differentiable = [x.is_floating_point() for x in inputs[1]]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grads: list[torch.Tensor | None], *_: Any) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    inputs = [
        None if grad is None or not wanted else _backward_op(grad, index, ctx.n_rows, ctx.backend)
        for grad, wanted in zip(grads, ctx.differentiable, strict=True)
    ]
    return None, inputs, None, None, None, None, None


_op = register(TOKEN_COMPACT, __name__, _fake, _backward, _setup)


def token_compact(
    keep: torch.Tensor,
    *tensors: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    n_rows: int | None = None,
    bound: int | None = None,
    fill: Sequence[int] | None = None,
    backend: str | None = None,
) -> Compacted:
    """Keep some of N packed rows: features, ids, labels, and what follows from them.

    Args:
        keep: ``[N]`` bool mask, or ``[K]`` int64 row numbers, strictly increasing.
        tensors: any number of ``[N, ...]`` tensors of any dtype (up to 5 dimensions): features,
            ``input_ids``, ``labels``. Float tensors are differentiable; dropped rows get zero.
        cu_seqlens: ``[S+1]`` int32, sequence s is rows ``cu_seqlens[s]`` to ``cu_seqlens[s+1]``; any
            batch size packed. None is one sequence.
        n_rows: N; needed only with row numbers and no tensors.
        bound: fixes the size of the outputs, so that nothing depends on the mask's values (no host
            sync on a device, one graph for any mask). Rows past the count are ``fill``. When more than
            ``bound`` rows are kept the first ``bound`` are returned and ``count`` still tells how many
            there were: compare the two.
        fill: per tensor, what stands in rows past the count; default 0 (use -100 for labels).
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        :class:`Compacted`: order is kept, integers are exact.

    Raises:
        TypeError: wrong type or dtype. ValueError: lengths that differ, row numbers not increasing or
        not below N, cu_seqlens that fall or do not end at N, a negative bound.
        BackendUnavailable: the backend cannot run here.

    Source: the released Hulu-Med ``_compress_visual_tokens``, for any batch size.
    """
    op = "token_compact"
    if n_rows is None:
        if tensors:
            n_rows = _rows(op, "tensors[0]", tensors[0])
        elif not isinstance(keep, torch.Tensor) or keep.dtype == torch.bool:
            n_rows = _rows(op, "keep", keep)
        else:
            fail(op, "n_rows", "value None", "N, since row numbers come without tensors")
    values = [0] * len(tensors)
    if fill is not None:
        values = [whole(op, "fill", v) for v in listed(op, "fill", fill, "numbers, one per tensor")]
    return Compacted(*_op(keep, list(tensors), cu_seqlens, n_rows, bound, values, backend or ""))


def _rows(op: str, name: str, x: torch.Tensor) -> int:
    if not isinstance(x, torch.Tensor):
        fail(op, name, f"type {type(x).__name__}", "a torch.Tensor", TypeError)
    if not x.dim():
        fail(op, name, f"shape {shape_text(x.shape)}", "[N, ...]")
    return x.shape[0]
