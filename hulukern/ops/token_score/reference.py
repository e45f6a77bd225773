"""token_score in plain torch: what every backend must equal."""

from __future__ import annotations

import torch

from hulukern.ops.common import divided


def token_score(
    patches: torch.Tensor,  # [N, L]
    grid_thw: list[int],  # [3 G]
    merge_size: int,
    reference: str,
    threshold: float,
) -> torch.Tensor:  # [N / merge_size**2] f32
    parts, row = [], 0
    for t, h, w in zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True):
        n = t * h * w
        cells = patches[row : row + n].reshape(t, h * w // merge_size**2, merge_size**2 * patches.shape[1])
        parts.append(_score(cells, reference, threshold, [(0, 255)]).flatten())
        row += n
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=patches.device)


def token_score_frames(
    frames: torch.Tensor,  # [T, H, W, C]
    patch_size: int,
    merge_size: int,
    windows: list[int],  # [2 windows]
    reference: str,
    threshold: float,
) -> torch.Tensor:  # [T * H / side * W / side] f32
    T, H, W, C = frames.shape
    side = patch_size * merge_size
    cells = frames.reshape(T, H // side, side, W // side, side, C).transpose(2, 3)
    cells = cells.reshape(T, (H // side) * (W // side), side * side * C)
    pairs = list(zip(windows[::2], windows[1::2], strict=True)) or [(0, 255)]
    return _score(cells, reference, threshold, pairs).flatten()


def _score(cells: torch.Tensor, reference: str, threshold: float, windows: list[tuple[int, int]]) -> torch.Tensor:
    """[T, cells, values] -> [T, cells]; the first version has nothing to differ from: +inf."""
    infinite = torch.full_like(cells[:1, :, :1].squeeze(-1), 0).float() + float("inf")
    if cells.dtype == torch.float64:
        infinite = infinite.double()
    if reference == "previous":
        return torch.cat([infinite, _difference(cells[1:], cells[:-1], windows)])
    scores, kept = [infinite], cells[:1].clone()
    for t in range(1, cells.shape[0]):
        score = _difference(cells[t : t + 1], kept, windows)
        keep = ~(score <= threshold)
        kept[keep] = cells[t : t + 1][keep]
        scores.append(score)
    return torch.cat(scores)


def _difference(a: torch.Tensor, b: torch.Tensor, windows: list[tuple[int, int]]) -> torch.Tensor:
    """Mean |a - b| over the last dimension, f32: integers summed exactly and divided once."""
    if a.is_floating_point():
        wide = torch.promote_types(a.dtype, torch.float32)
        return (a.to(wide) - b.to(wide)).abs().mean(-1)
    scores = []
    for lo, hi in windows:
        total = (a.int().clamp(lo, hi) - b.int().clamp(lo, hi)).abs().sum(-1)
        count = torch.tensor(float(a.shape[-1]), device=a.device)
        scale = divided(torch.tensor(float(hi - lo), device=a.device), 255)
        scores.append(total.float() / (count * scale))
    return torch.stack(scores).amax(0)
