"""Buffers that show what a kernel did to them: outputs start as NaN, and guards lie on both sides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_GUARD = 64  # elements on either side: a whole cache line and more for every dtype
_GUARD_BYTE = 0xC3
_POISON_BYTE = 0xA5  # integers and bools have no NaN; this value is unlikely and, read as i64, far out of range


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """While it lasts, ``torch.empty`` hands out NaN-filled memory between guards, checked at the end.

    Raises AssertionError if a guard was written. Backends allocate their outputs with ``torch.empty``
    only, which a test of the sources enforces.
    """
    original = torch.empty
    handed_out: list[torch.Tensor] = []

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        n = 1
        for d in shape:
            n *= d
        whole = original(n + 2 * _GUARD, **options)
        inside = whole[_GUARD : _GUARD + n]
        whole.view(torch.uint8).fill_(_GUARD_BYTE)
        if inside.dtype == torch.bool:
            inside.fill_(True)
        elif inside.is_floating_point():
            inside.fill_(float("nan"))
        else:
            inside.view(torch.uint8).fill_(_POISON_BYTE)
        handed_out.append(whole)
        return inside.view(tuple(shape))

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = original
    for whole in handed_out:
        width = _GUARD * whole.element_size()
        raw = whole.view(torch.uint8)
        if (raw[:width] != _GUARD_BYTE).any() or (raw[-width:] != _GUARD_BYTE).any():
            raise AssertionError(f"a kernel wrote outside a buffer of {whole.numel() - 2 * _GUARD} {whole.dtype}")


LAYOUTS = ("contiguous", "offset", "padded_rows", "strided")


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values elsewhere in memory: one element off alignment, rows apart, or every dimension strided."""
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "offset":
        room = x.new_zeros(x.numel() + 1)
        out = room[1:].view(x.shape)
    elif layout == "padded_rows":
        room = x.new_zeros((*x.shape[:1], *(s + (d == 0) for d, s in enumerate(x.shape[1:]))))
        out = room.narrow(1, 0, x.shape[1]) if x.dim() > 1 else room
    elif layout == "strided":
        room = x.new_zeros(tuple(2 * s for s in x.shape))
        out = room[tuple(slice(None, None, 2) for _ in x.shape)]
    else:
        raise ValueError(f"lay_out: layout has value {layout!r}, expected one of {LAYOUTS}")
    out.copy_(x)
    return out
