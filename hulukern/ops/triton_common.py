"""What several Triton kernels say the same way: angles, varlen tiles, strides in units, the architecture.

Differences between Triton versions belong here.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from hulukern.tuning import Row
from hulukern.validation import fail

# Programs that fill a device: 8 for each of an H100's 132 multiprocessors.
PROGRAMS = 1056
# The longest row that a program holds: 32 elements a thread of 16 warps.
_MAX_ROW = 16384
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# What an interpreted kernel is launched as.
_INTERPRETED = 90


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter takes int() of an array of one element, which numpy 2.4 and later refuse."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED.value:
    _mend_interpreter()


def architecture(device: torch.device) -> int:
    """The compute capability that a launch compiles for, 90 for 9.0."""
    if INTERPRETED.value:
        return _INTERPRETED
    return _device_architecture(device.index) if device.type == "cuda" else _target_architecture()


@functools.cache
def _device_architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _target_architecture() -> int:
    """CPU tensors: a driver stands in for a device, and only compiles."""
    return int(triton.runtime.driver.active.get_current_target().arch)


def unit_of(x: torch.Tensor, *strides: int) -> int:
    """Elements of the widest access, at most 16 bytes, that divides all ``strides``.

    Strides are passed to a kernel in these units: one that is not divisible by 16 elements, such as the 72
    of a head, would otherwise hide its alignment and turn every load into single elements.
    """
    return math.gcd(max(1, 16 // x.element_size()), *strides)


def taken_strides(x: torch.Tensor, dims: Iterable[int]) -> tuple[int, ...]:
    """Strides of ``x``; 0 for a dimension of one element, whose stride says nothing."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in dims)


def row_tile(op: str, chosen: Row, E: int) -> dict[str, int]:
    """Whole rows of E values a tile: its sizes and warps, 16 elements a thread as long as 16 warps allow."""
    block_e = triton.next_power_of_2(E)
    if block_e > _MAX_ROW:
        fail(op, "x", f"E={E}", f"at most {_MAX_ROW} for backend 'triton'")
    block_n = max(1, chosen.blocks["TILE"] // block_e)
    warps = min(16, max(chosen.warps, block_n * block_e // 512))
    return {"BLOCK_N": block_n, "BLOCK_E": block_e, "num_warps": warps}


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, to nearest even. The interpreter truncates to bfloat16, so there it is rounded first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def sincos(x):
    """Sine and cosine in fp32 to about an ulp, without the approximate instructions or a slow path.

    x is taken off a multiple of pi/2 in three steps, exactly while that multiple is below 2**13 (Cody and
    Waite); the polynomials are Cephes' on [-pi/4, pi/4].
    """
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = n.to(tl.int32)
    odd = (quadrant & 1) == 1
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where((quadrant & 2) == 2, -sine, sine), tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)


@triton.jit
def sequence_of_tile(
    i_tile,
    cu_seqlens,  # [S+1] i32
    n_sequences,
    BLOCK: tl.constexpr,
):
    """The sequence that owns a tile, and the tile's first row.

    Sequence s owns tiles cu[s] // BLOCK + s up to cu[s+1] // BLOCK + s + 1: never fewer than it needs, N //
    BLOCK + S in all, so that the grid follows from shapes alone. A tile too many begins past its sequence.
    """
    lo = 0
    hi = n_sequences
    while hi - lo > 1:
        middle = (lo + hi) // 2
        first = tl.load(cu_seqlens + middle) // BLOCK + middle
        lo = tl.where(first <= i_tile, middle, lo)
        hi = tl.where(first <= i_tile, hi, middle)
    begin = tl.load(cu_seqlens + lo)
    return lo, begin + (i_tile - (begin // BLOCK + lo)) * BLOCK


@triton.jit
def column_sums_kernel(
    partials,  # [2, R, E] f32, or [1, R, E]
    first,  # [E]
    second,  # [E]
    R,
    E,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """grid (tiles of E, results): sums of what the programs of a backward left, always in the same order."""
    b_col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_col = b_col < E
    i_which = tl.program_id(1)
    acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for i in range(0, R, BLOCK_R):
        b_row = i + tl.arange(0, BLOCK_R)
        p = partials + (i_which.to(tl.int64) * R + b_row[:, None]) * E + b_col[None, :]
        acc += tl.load(p, mask=(b_row < R)[:, None] & m_col[None, :], other=0.0)
    b_sum = tl.sum(acc, 0)
    if i_which == 0:
        tl.store(first + b_col, b_sum.to(first.dtype.element_ty), mask=m_col)
    else:
        tl.store(second + b_col, b_sum.to(second.dtype.element_ty), mask=m_col)


def sum_columns(partials: torch.Tensor, *results: torch.Tensor) -> None:
    """``[len(results), R, E]`` f32 -> each ``[E]``. R = 0 gives zeros."""
    _, R, E = partials.shape
    with torch.cuda.device_of(partials):
        column_sums_kernel[(triton.cdiv(E, 32), len(results))](
            partials, results[0], results[-1], R, E, BLOCK_R=32, BLOCK_E=32, num_warps=4
        )
