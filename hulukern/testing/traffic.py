"""Bytes that Triton's kernels load and store, counted under their masks as the interpreter runs them.

    asked  every element of every load and store
    moved  each address once a launch for reads and once for writes: what goes through memory where L2 serves what a
           launch reads again

The fewest possible bytes stand in the spec's cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

_PAGE = 1 << 20


class _Touched:
    """Addresses of elements, as a size in bytes at the address where each begins."""

    def __init__(self) -> None:
        self.pages: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def add(self, addresses: np.ndarray[Any, Any], size: int) -> None:
        if not addresses.size:
            return
        first, last = int(addresses.min()) // _PAGE, int(addresses.max()) // _PAGE
        for page in range(first, last + 1):
            inside = addresses if first == last else addresses[addresses // _PAGE == page]
            if page not in self.pages:
                self.pages[page] = np.zeros(_PAGE, np.uint8)
            self.pages[page][inside - page * _PAGE] = size

    def total(self) -> int:
        return sum(int(sizes.sum(dtype=np.int64)) for sizes in self.pages.values())


class Traffic:
    def __init__(self) -> None:
        self.asked = 0
        self.moved = 0
        self._touched = (_Touched(), _Touched())

    def add(self, pointers: Any, mask: Any, is_store: bool) -> None:
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.asked += addresses.size * size
        self._touched[is_store].add(addresses, size)

    def end_launch(self) -> None:
        self.moved += sum(touched.total() for touched in self._touched)
        self._touched = (_Touched(), _Touched())


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """The traffic of all interpreted launches meanwhile."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic()
    load, store, launch = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, GridExecutor

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.add(pointers, mask, False)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.add(pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    real_call = launch.__call__

    def counted_launch(self: Any, *arguments: Any, **options: Any) -> None:
        real_call(self, *arguments, **options)
        traffic.end_launch()

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(launch, "__call__", counted_launch),
    ):
        yield traffic
