"""Packed patches: coordinates and sequence boundaries from grids, on the host and without a sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hulukern.ops.common import GridTHW, flat_grid_thw
from hulukern.validation import integer, require


def grid_positions(
    grid_thw: GridTHW, merge_size: int | Sequence[int] = 1, *, axes: str = "hw", device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Coordinates of packed patches in merge-block order (t, h/M, w/M, M, M).

    Args:
        grid_thw: ``[G, 3]`` (t, h, w) in patches, nested lists or a CPU tensor.
        merge_size: one M, or one per grid; h and w divisible by it.
        axes: ``"hw"`` or ``"thw"``.

    Returns:
        ``[N, len(axes)]`` int32 on ``device``; t counts frames of its grid from 0.
    """
    op = "grid_positions"
    require(axes in ("hw", "thw"), op, "axes", f"value {axes!r}", "'hw' or 'thw'")
    parts = [_count(0)[:, None].expand(0, len(axes))]
    for (t, h, w), m in zip(*_grids(op, grid_thw, merge_size), strict=True):
        blocks = _count(h * w).view(h // m, m, w // m, m).transpose(1, 2).flatten()
        blocks = blocks.repeat(t)
        columns = [blocks // max(w, 1), blocks % max(w, 1)]
        if axes == "thw":
            columns.insert(0, _count(t).repeat_interleave(h * w))
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts).to(device, non_blocking=True)


def grid_cu_seqlens(grid_thw: GridTHW, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """``[S+1]`` int32: every frame of every grid is a sequence of h * w patches."""
    grids, _ = _grids("grid_cu_seqlens", grid_thw, 1)
    lengths = [0] + [h * w for t, h, w in grids for _ in range(t)]
    return torch.tensor(lengths, device="cpu").cumsum(0).int().to(device, non_blocking=True)


def _count(n: int) -> torch.Tensor:
    """0 to n - 1 on the host, whatever the default device."""
    return torch.arange(n, dtype=torch.int32, device="cpu")


def _grids(op: str, grid_thw: GridTHW, merge_size: int | Sequence[int]) -> tuple[list[tuple[int, int, int]], list[int]]:
    flat = flat_grid_thw(op, grid_thw)
    grids = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    try:
        each = list(merge_size)  # type: ignore[arg-type]
    except TypeError:
        each = [merge_size] * len(grids)  # type: ignore[list-item]
    merges = [integer(op, "merge_size", m) for m in each]
    require(len(merges) == len(grids), op, "merge_size", f"{len(merges)} values", f"one for each of {len(grids)} grids")
    for i, ((t, h, w), m) in enumerate(zip(grids, merges, strict=True)):
        require(m >= 1, op, "merge_size", f"value {m}", "at least 1")
        good = min(t, h, w) >= 0 and h % m == 0 and w % m == 0
        require(good, op, "grid_thw", f"row {i} = ({t}, {h}, {w})", f"h and w divisible by merge_size={m}")
    return grids, merges
