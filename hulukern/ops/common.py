"""What several ops say the same way: grids, dtype sets, where a CPU kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from hulukern.backends import on_simulator
from hulukern.spec import Arguments
from hulukern.validation import came, dtype_name, fail, number

GridTHW = torch.Tensor | Sequence[Sequence[int]]

PIXELS = (torch.uint8,)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of ops whose Triton kernels multiply tiles.
DOT_UNINTERPRETED = {torch.bfloat16: "Triton's interpreter computes a bfloat16 tl.dot wrongly"}


def flat_grid_thw(op: str, grid_thw: GridTHW) -> list[int]:
    """``[G, 3]`` sizes (t, h, w) in patches as one flat list: what the op schemas take.

    A CPU tensor or nested sequence; a tensor on a device is refused, since reading it would stall the
    stream behind it.
    """
    if isinstance(grid_thw, torch.Tensor):
        if grid_thw.device.type != "cpu":
            fail(op, "grid_thw", f"device {grid_thw.device}", "cpu: the host must know it without a sync")
        if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
            fail(op, "grid_thw", f"{grid_thw.dtype} of shape {list(grid_thw.shape)}", "integers of shape [G, 3]")
        return [int(size) for row in grid_thw.tolist() for size in row]
    flat: list[int] = []
    for row in grid_thw if isinstance(grid_thw, Sequence) else [grid_thw]:
        if not isinstance(row, (Sequence, torch.Tensor)) or isinstance(row, str) or len(row) != 3:
            fail(op, "grid_thw", f"a row {row!r}", "rows (t, h, w)")
        flat.extend(whole(op, "grid_thw", size) for size in row)
    return flat


def divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, rounded once: by a number of the host torch multiplies on a GPU, by its reciprocal, one bit off."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def whole(op: str, name: str, value: Any) -> int:
    """A whole number, of whatever type; 2.9 is refused instead of becoming 2."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fail(op, name, came(value), "a whole number", TypeError)
    if found != value:
        fail(op, name, came(value), "a whole number")
    return found


def listed(op: str, name: str, values: Any, expected: str) -> list[Any]:
    """What is given one by one; ``expected`` says what that is."""
    try:
        return list(values)
    except TypeError:
        fail(op, name, came(values), expected, TypeError)


def per_channel(op: str, name: str, values: Any) -> list[float] | None:
    """mean or std as numbers; None is none."""
    if values is None:
        return None
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError, RuntimeError):  # which one is no number, without a check of each in every call
        return [number(op, name, v) for v in listed(op, name, values, "numbers, one per channel")]


def check_grid(op: str, grid_thw: Sequence[int], merge_size: int, n_patches: int) -> None:
    """Sizes must be whole cells and add up to the packed patches."""
    if merge_size < 1:
        fail(op, "merge_size", f"value {merge_size}", "at least 1")
    if len(grid_thw) % 3:
        fail(op, "grid_thw", f"{len(grid_thw)} values", "rows (t, h, w)")
    total = 0
    for g in range(0, len(grid_thw), 3):
        t, h, w = grid_thw[g : g + 3]
        if min(t, h, w) < 0 or h % merge_size or w % merge_size:
            fail(op, "grid_thw", f"row {g // 3} = ({t}, {h}, {w})", f"h and w divisible by merge_size={merge_size}")
        total += t * h * w
    if total != n_patches:
        fail(op, "grid_thw", f"{total} patches in all", f"N={n_patches} from patches")


def check_frames(op: str, frames: torch.Tensor, patch_size: int, merge_size: int) -> None:
    """Frames ``[T, H, W, C]`` must be whole cells of ``merge_size`` x ``merge_size`` patches."""
    if patch_size < 1 or merge_size < 1:
        fail(op, "patch_size, merge_size", f"values {patch_size}, {merge_size}", "at least 1")
    if frames.shape[3] < 1:
        fail(op, "frames", "C=0", "at least 1 channel")
    side = patch_size * merge_size
    if frames.shape[1] % side or frames.shape[2] % side:
        fail(
            op,
            "frames",
            f"H={frames.shape[1]}, W={frames.shape[2]}",
            f"multiples of patch_size * merge_size = {side}",
        )


def as_rows(op: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """``[..., E]`` as ``[N, E]``."""
    if not isinstance(x, torch.Tensor):
        fail(op, name, f"type {type(x).__name__}", "a torch.Tensor", TypeError)
    if x.dim() < 1:
        fail(op, name, "0 dimensions", "[..., E]")
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def rows_dense(x: torch.Tensor, inner: int) -> torch.Tensor:
    """``x`` if its trailing ``inner`` dimensions are row-major and dense, else a contiguous copy."""
    if x.is_contiguous():
        return x
    expected = 1
    for d in range(x.dim() - 1, x.dim() - 1 - inner, -1):
        if x.shape[d] > 1 and x.stride(d) != expected:
            return x.contiguous()
        expected *= x.shape[d]
    return x


def native_target(x: torch.Tensor) -> tuple[bool, int]:
    """Where a native launcher runs: (on CUDA, its stream) or (False, threads to use)."""
    if x.is_cuda:
        return True, torch.cuda.current_stream(x.device).cuda_stream
    if on_simulator.get():
        return True, 0
    return False, torch.get_num_threads()


def packed_rows(x: torch.Tensor, inner: int) -> torch.Tensor:
    """``rows_dense``, and on CUDA with every row at a multiple of 16 bytes, as kernels that read packs ask."""
    x = rows_dense(x, inner)
    if not native_target(x)[0] or x.numel() == 0:
        return x
    size = x.element_size()
    outer = [x.stride(d) for d in range(x.dim() - inner) if x.shape[d] > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in outer)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def row_stretches(n_rows: int, on_cuda: bool) -> int:
    """In how many stretches a backward sums rows: fixed by the shape, so that threads don't change the bits.

    A stretch is a block on CUDA, hence more of them: four for each of 132 multiprocessors, of 8 rows or more.
    """
    return max(1, min(528, n_rows // 8) if on_cuda else min(32, n_rows // 64))


def check_same_dtype(op: str, arguments: Arguments, name: str, like: str) -> None:
    """A tensor argument, where it is given, must have another's dtype."""
    x, expected = arguments[name], arguments[like].dtype
    if x is not None and x.dtype != expected:
        fail(op, name, f"dtype {dtype_name(x.dtype)}", f"{dtype_name(expected)} as {like}", TypeError)


def check_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor, n_rows: int) -> None:
    """``[S+1]`` from 0 to N, never falling; looked at only where that does not stall a device."""
    if cu_seqlens.shape[0] < 1:
        fail(op, name, "0 entries", "S+1")
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != n_rows:
        fail(op, name, f"ends {ends[0]} .. {ends[-1]}", f"0 .. N={n_rows}")
    for a, b in pairwise(ends):
        if b < a:
            fail(op, name, f"{a} before {b}", "it never to fall")


def rstd_of(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / standard deviation over the last dimension, which LayerNorm multiplies with."""
    return ((rows - rows.mean(-1, keepdim=True)).square().mean(-1) + eps).rsqrt()
