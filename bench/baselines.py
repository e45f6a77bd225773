"""Plain torch, as a careful user would write it: what the fused ops are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

P, M = 14, 2


def normalise(frames: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 frames to normalised ones (mean and std 0.5)."""
    return ((frames.float() / 255 - 0.5) / 0.5).to(dtype)


def cut(frames: torch.Tensor) -> torch.Tensor:
    """[T, H, W, C] to [N, C*P*P] in merge-block order."""
    T, H, W, C = frames.shape
    grid = frames.reshape(T, H // (P * M), M, P, W // (P * M), M, P, C)
    return grid.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, C * P * P)


def score(patches: torch.Tensor, T: int) -> torch.Tensor:
    """Mean |difference| per cell to the frame before; the first frame +inf."""
    cells = patches.view(T, -1, M * M * patches.shape[1])
    difference = (cells[1:] - cells[:-1]).abs().mean(-1)
    return torch.cat([torch.full_like(cells[:1, :, 0], float("inf")), difference])


def frontend(
    frames: torch.Tensor, threshold: float = 0.1, score_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames to the bf16 patches that rule ``previous`` keeps, and its mask: normalise, reshape, permute,
    difference, mean, boolean index. Scores from bf16 patches are faster and round the mask."""
    patches = cut(normalise(frames, score_dtype))
    keep = score(patches, frames.shape[0]) > threshold
    few = ~keep.any(1)
    keep[few, :1] = True
    keep = keep.flatten()
    return patches.to(torch.bfloat16).view(keep.numel(), -1)[keep], keep


def patch_embed_frames(frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(cut(normalise(frames, weight.dtype)), weight, bias)
