"""rope_attention's first case with a static fault planted: python planted.py ARCH FOLDER PLANT [float32]."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from hulukern.ops.rope_attention import triton_kernels, triton_rotary
from hulukern.testing import offline
from hulukern.tuning import TABLE


def healthy(_arch: int) -> None:
    pass


def spill(arch: int) -> None:
    """Twice the rows a warp: logits and output no longer fit in registers."""
    row = TABLE["rope_attention"][arch]
    TABLE["rope_attention"][arch] = dataclasses.replace(row, warps=row.warps // 2)


def narrow(_arch: int) -> None:
    """Strides in elements: the compiler cannot know that 72 of them are a multiple of 16 bytes."""
    mock.patch.object(triton_kernels, "unit_of", return_value=1).start()


def padded(_arch: int) -> None:
    """72 columns as 128, the next power of two, in both products."""
    pairs = {"HALF": 36, "W": 32, "REST": 4, "P": 32}
    for module in (triton_kernels, triton_rotary):
        mock.patch.object(module, "pairs_of", return_value=pairs).start()
    mock.patch.object(triton_kernels, "split_of", return_value={"MAIN": 64, "TAIL": 64, "TAIL_REAL": 8}).start()


def fma(_arch: int) -> None:
    """fp32 products as fp32 ones, not as three of tf32."""
    mock.patch.object(triton_kernels, "PRECISION", "ieee").start()


PLANTS: dict[str, Callable[[int], None]] = {f.__name__: f for f in (healthy, spill, narrow, padded, fma)}

if __name__ == "__main__":
    arch, folder, plant = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    dtype = torch.float32 if "float32" in sys.argv else torch.bfloat16
    PLANTS[plant](arch)
    with mock.patch.object(offline, "cases", lambda op, _: [(op.cases[0], dtype)]):
        offline.compile_all(arch, folder, ["rope_attention"])
