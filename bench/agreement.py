"""Correct first: what must hold before anything is timed."""

from __future__ import annotations

import torch


class Disagreement(RuntimeError):
    """Two implementations of the same thing differ: nothing is worth timing."""


def agree(name: str, expected: torch.Tensor, got: torch.Tensor, tolerance: float) -> None:
    a, b = expected.detach().float(), got.detach().float()
    if a.numel() == 0:
        return
    off = float((a - b).abs().max() / a.abs().max().clamp(min=1e-9))
    if not off <= tolerance:
        raise Disagreement(f"{name}: outputs differ by {off:.3g} of the largest value, at most {tolerance} is expected")
