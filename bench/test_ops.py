"""The ops under pytest-benchmark: ``pytest bench/ --benchmark-only``; ``python -m bench compare`` reads its JSON.

Results are checked against the reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hulukern
from hulukern.backends import BACKENDS, runs_on, unavailable
from hulukern.spec import Case, Op
from hulukern.testing import harness
from hulukern.validation import dtype_name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def calls() -> Iterator[Any]:
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        dtype = op.main_dtype
        for case in op.perf_cases:
            for backend in (b for b in BACKENDS if b in op.backends and b != "reference"):
                reason = unavailable(backend)
                if not reason and runs_on(backend, DEVICE):
                    yield pytest.param(op, case, dtype, backend, id=f"{name}-{case.name}-{dtype_name(dtype)}-{backend}")


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), calls())
def test_op(op: Op, case: Case, dtype: torch.dtype, backend: str, benchmark: Any) -> None:
    harness.check_forward(op, op.cases[0], dtype, backend, DEVICE)
    arguments = harness.sample(op, case, dtype, DEVICE)
    cost = op.cost(arguments)
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, backend=backend)

    def call() -> None:
        harness.call(op, arguments, backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
