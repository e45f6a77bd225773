"""token_score through the C ABI, on the CPU and on CUDA alike."""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, rows_dense

_REFERENCE = {"previous": 0, "kept": 1}


def token_score(
    patches: torch.Tensor, grid_thw: list[int], merge_size: int, reference: str, threshold: float
) -> torch.Tensor:
    patches = rows_dense(patches, 1)
    cells = patches.shape[0] // (merge_size * merge_size)
    scores = torch.empty(cells, dtype=torch.float32, device=patches.device)
    _C.token_score(*native_target(patches), patches, scores, grid_thw, merge_size, _REFERENCE[reference], threshold)
    return scores


def token_score_frames(
    frames: torch.Tensor, patch_size: int, merge_size: int, windows: list[int], reference: str, threshold: float
) -> torch.Tensor:
    frames = rows_dense(frames, 2)
    side = patch_size * merge_size
    cells = frames.shape[0] * (frames.shape[1] // side) * (frames.shape[2] // side)
    scores = torch.empty(cells, dtype=torch.float32, device=frames.device)
    _C.token_score_frames(
        *native_target(frames), frames, scores, patch_size, merge_size, windows, _REFERENCE[reference], threshold
    )
    return scores
