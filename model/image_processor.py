"""Clips to patches: the visual half of the processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hulukern
from hulukern.pruning import prune_frames
from model.media import IMAGE, Clip, Window
from model.media.clip import score_windows
from model.sizing import MAX_TOKENS, MIN_TOKENS, PATCH, cut_patches, frame_sizes, resize_frames, resize_values

MAX_STRETCH = 32.0  # that a header's spacing may ask for


@dataclass(frozen=True)
class Visual:
    """G grids, one per clip, packed in order.

    pixel_values: uint8 ``[N, 3 * P * P]`` patches in merge-block order. grid_thw: int64 ``[G, 3]``, frames and
    patches down and across. merge_sizes: int64 ``[G]``. modals: ``"image"``, or ``"video"`` for videos and
    volumes, per grid. tokens: per frame, clip after clip.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    merge_sizes: torch.Tensor
    modals: list[str]
    tokens: list[int]


@dataclass(frozen=True)
class HuluMedImageProcessor:
    """Resize, and cut into patches.

    patch_size in pixels. max_tokens: budget of a call, after the merge, shared by all its frames;
    min_tokens: of each frame. image_mean, image_std: in units of 0..1. released: the released code takes
    Pillow's (width, height) for (height, width), so that pictures get the transposed aspect ratio.
    """

    patch_size: int = PATCH
    min_tokens: int = MIN_TOKENS
    max_tokens: int = MAX_TOKENS
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    released: bool = False

    def __post_init__(self) -> None:
        for name in ("patch_size", "min_tokens", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"image processor: has {name} {value!r}, expected at least 1")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
                raise ValueError(f"image processor: has {name} {values!r}, expected 3 numbers")

    def sizes(self, clips: Sequence[Clip], merge_sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(height, width) in pixels that each clip of one call is resized to. Where rows and columns have
        different mm, the longer ones are stretched first, so that a pixel is square."""
        shapes = []
        for clip in clips:
            T, H, W, _ = clip.frames.shape
            if self.released:
                shapes.append((T, W, H) if clip.form == "image" else (T, H, W))
                continue
            _, row_mm, column_mm = clip.spacing or (0.0, 1.0, 1.0)
            tall = min(max(row_mm / column_mm, 1 / MAX_STRETCH), MAX_STRETCH)
            shapes.append((T, round(H * max(tall, 1.0)), round(W * max(1 / tall, 1.0))))
        return frame_sizes(
            shapes, merge_sizes, patch_size=self.patch_size, max_tokens=self.max_tokens, min_tokens=self.min_tokens
        )

    def __call__(self, clips: Sequence[Clip], merge_sizes: Sequence[int]) -> Visual:
        """The clips of one call, at least one, which share the budget."""
        patches, grids, tokens = [], [], []
        for clip, m, (h, w) in zip(clips, merge_sizes, self.sizes(clips, merge_sizes), strict=True):
            patches.append(cut_patches(resize_frames(clip, (h, w)), m, self.patch_size))
            grids.append((len(clip.frames), h // self.patch_size, w // self.patch_size))
            tokens += [h * w // (self.patch_size * m) ** 2] * len(clip.frames)
        modals = ["image" if clip.kind == IMAGE else "video" for clip in clips]
        return Visual(torch.cat(patches), torch.tensor(grids), torch.tensor(list(merge_sizes)), modals, tokens)

    def keep(
        self, clips: Sequence[Clip], merge_sizes: Sequence[int], windows: Sequence[Window], **rule: Any
    ) -> torch.Tensor:
        """Which cells of :meth:`__call__` survive, bool ``[V]``, by what can be seen in intensity windows.

        A volume's cell counts as changed if it changes in any of ``windows`` (names or (lo, hi) in the file's
        own unit), whatever window its picture has. Clips without intensities are scored by their pixels,
        images are kept whole. ``rule``: arguments of :func:`hulukern.pruning.prune_frames`.

        Raises:
            ValueError: windows that are no whole numbers apart; as :func:`hulukern.pruning.prune_frames`.
        """
        edges = score_windows(windows)
        kept = []
        for clip, m, (h, w) in zip(clips, merge_sizes, self.sizes(clips, merge_sizes), strict=True):
            if clip.kind == IMAGE:
                kept.append(torch.ones(h * w // (self.patch_size * m) ** 2, dtype=torch.bool))
                continue
            seen = clip.values is not None
            frames = torch.from_numpy(resize_values(clip, (h, w)) if seen else resize_frames(clip, (h, w)))
            pruned = prune_frames(
                frames, patch_size=self.patch_size, merge_size=m, windows=edges if seen else None,
                mean=self.image_mean[0], std=self.image_std[0], **rule,
            )  # fmt: skip
            kept.append(pruned.keep)
        return torch.cat(kept)

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """uint8 patches as float32: (u8 / 255 - mean) / std."""
        return hulukern.patch_embed_normalize(pixel_values, mean=self.image_mean, std=self.image_std)
