"""token_score: how much each cell (M x M patches, one visual token) differs from an earlier version."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hulukern.ops.common import GridTHW, flat_grid_thw, listed, whole
from hulukern.ops.token_score.spec import TOKEN_SCORE, TOKEN_SCORE_FRAMES
from hulukern.registry import register
from hulukern.validation import fail


def _fake_patches(
    patches: torch.Tensor, grid_thw: list[int], merge_size: int, reference: str, threshold: float
) -> torch.Tensor:
    return patches.new_empty(patches.shape[0] // merge_size**2, dtype=torch.float32)


def _fake_frames(
    frames: torch.Tensor, patch_size: int, merge_size: int, windows: list[int], reference: str, threshold: float
) -> torch.Tensor:
    T, H, W, _ = frames.shape
    side = patch_size * merge_size
    return frames.new_empty(T * (H // side) * (W // side), dtype=torch.float32)


_patches_op = register(TOKEN_SCORE, __name__, _fake_patches)
_frames_op = register(TOKEN_SCORE_FRAMES, __name__, _fake_frames)


def token_score(
    patches: torch.Tensor,
    grid_thw: GridTHW,
    *,
    merge_size: int = 2,
    reference: str = "previous",
    threshold: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean absolute difference per cell against an earlier version of the same cell.

    Args:
        patches: ``[N, L]`` uint8, float32, bfloat16 or float16, in merge-block order (t, h/M, w/M, M, M),
            grids packed one after the other. Strided rows are read in place; an inner stride other
            than 1 is copied first.
        grid_thw: ``[G, 3]`` (t, h, w) in patches, known to the host: nested lists or a CPU tensor.
        merge_size: M; h and w must be divisible by it.
        reference: ``"previous"`` compares with the frame before, ``"kept"`` with the last version whose
            own score was above ``threshold`` (NaN counts as above).
        threshold: in the score's unit, at least 0; read by ``"kept"`` only.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        ``[N / M**2]`` float32 in (t, h/M, w/M) order, grid after grid. uint8: in steps of 0..255, exact.
        Floats: in the input's unit. The first frame of every grid scores +inf: it has nothing to differ
        from. A NaN or an infinite pair gives NaN.

    Raises:
        TypeError: wrong type or dtype. ValueError: shapes, a grid that does not match N, a threshold
        below 0. BackendUnavailable: the backend cannot run here.

    Source: the released Hulu-Med compression mask, whose mean |frame - previous frame| this is.
    """
    return _patches_op(patches, flat_grid_thw("token_score", grid_thw), merge_size, reference, threshold, backend or "")


def token_score_frames(
    frames: torch.Tensor,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    windows: Sequence[tuple[int, int]] | None = None,
    reference: str = "previous",
    threshold: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """As :func:`token_score`, from one clip of whole frames.

    Args:
        frames: ``[T, H, W, C]`` uint8, or int16 (such as Hounsfield units) with ``windows``. H and W must
            be divisible by ``patch_size * merge_size``.
        windows: int16 only, 1 to 8 pairs (lo, hi) in the frames' own unit. Values are clamped to the
            window, which then spans 255 steps; a cell's score is its largest over the windows, so it
            counts as changed if it changes in any of them.

    Returns:
        ``[T * H/(P M) * W/(P M)]`` float32 in steps of 0..255, exact. First frame +inf.
    """
    op, flat = "token_score_frames", list[int]()
    for window in () if windows is None else listed(op, "windows", windows, "rows (lo, hi)"):
        edges = listed(op, "windows", window, "rows (lo, hi)")
        if len(edges) != 2:
            fail(op, "windows", f"a row {window!r}", "rows (lo, hi)")
        flat += [whole(op, "windows", edge) for edge in edges]
    return _frames_op(frames, patch_size, merge_size, flat, reference, threshold, backend or "")
