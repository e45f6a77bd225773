"""Bytes of every memory-bound Triton kernel against the fewest possible, which are the spec's cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hulukern
from hulukern import tuning
from hulukern.backends import unavailable
from hulukern.spec import Case, Op
from hulukern.testing import harness, traffic

pytestmark = pytest.mark.skipif(
    bool(unavailable("triton")) or torch.cuda.is_available(), reason="bytes are counted by Triton's interpreter"
)
# The performance case's 36th part, by a 36th of the programs: in the interpreter the whole takes minutes.
SIDE = 6
LIMIT = 1.05
# What a kernel asks for again within a launch, and L2 serves: ratio of everything asked for, and what it is.
AGAIN = {
    "layer_norm": (1.07, "weight and bias by every program, 8 rows each"),
    "spatial_merge": (1.26, "weight and bias by every program, 2 to 4 cells each"),
    "spatial_merge_backward": (1.06, "weight by every program"),
    "token_score": (1.10, "the version before by each of 4 chunks of 8"),
    "token_score_frames": (1.10, "the version before by each of 4 chunks of 8"),
    "rope_attention_rotate": (1.06, "coordinates by every group of heads: 16 groups here, 4 in the whole case"),
}


def part(case: Case) -> Case:
    s: dict[str, Any] = dict(case.sizes)
    for name in ("N", "cells"):
        if name in s:
            s[name] //= SIDE**2
    if "lengths" in s:
        s["lengths"] = tuple(n // SIDE**2 for n in s["lengths"])
    if "THWC" in s:
        T, H, W, C = s["THWC"]
        s["THWC"] = (T, H // SIDE, W // SIDE, C)
    if "grid_thw" in s:
        s["grid_thw"] = [(t, h // SIDE, w // SIDE) for t, h, w in s["grid_thw"]]
    return dataclasses.replace(case, sizes=s)


def bound_by_memory() -> list[object]:
    found = []
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        # The others multiply matrices, and are bound by that.
        if "triton" in op.backends and not op.uninterpreted:
            found += [pytest.param(op, case, id=f"{name}-{case.name}") for case in op.perf_cases]
    return found


@pytest.mark.parametrize(("op", "case"), bound_by_memory())
def test_moves_the_fewest_bytes_possible(op: Op, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, rows in tuning.TABLE.items():
        for architecture, row in rows.items():
            if "PROGRAMS" in row.blocks:
                blocks = {**row.blocks, "PROGRAMS": -(-row.blocks["PROGRAMS"] // SIDE**2)}
                monkeypatch.setitem(tuning.TABLE[kernel], architecture, dataclasses.replace(row, blocks=blocks))
    dtype = torch.float16 if torch.float16 in op.dtypes else op.dtypes[0]  # bf16's size
    arguments = harness.sample(op, part(case), dtype, "cpu")
    fewest = op.cost(arguments).bytes
    with traffic.counted() as t:
        harness.call(op, arguments, "triton")
    moved, asked = t.moved / fewest, t.asked / fewest
    print(f"{op.name} {case.name}: moved {moved:.3f} asked {asked:.3f}")
    assert 1 / LIMIT <= moved <= LIMIT, f"moves {moved:.3f} of the fewest bytes"
    limit, _ = AGAIN.get(op.name, (LIMIT, ""))
    assert asked <= limit, f"asks for {asked:.3f} of the fewest bytes"


def test_a_second_pass_would_show() -> None:
    x = torch.randn(64, 256)
    with traffic.counted() as once:
        hulukern.bias_gelu(x, None, backend="triton")
    with traffic.counted() as twice:
        hulukern.bias_gelu(x, None, backend="triton")
        hulukern.bias_gelu(x, None, backend="triton")
    assert once.moved == 2 * x.numel() * 4
    assert twice.moved == 2 * once.moved
