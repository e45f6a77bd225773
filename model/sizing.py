"""The size that frames are resized to, the resize, and the cut into patches.

A cell, merge_size x merge_size patches, becomes one visual token. Budgets count tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hulukern.backends import native_error
from model.media.clip import Clip, Pixels

PATCH = 14
MIN_TOKENS, MAX_TOKENS = 16, 16384


def frame_size(
    height: int, width: int, *, n_frames: int = 1, merge_size: int = 2, patch_size: int = PATCH,
    max_tokens: int = MAX_TOKENS, min_tokens: int = MIN_TOKENS,
) -> tuple[int, int]:  # fmt: skip
    """(height, width) that frames are resized to: whole cells, close to the original, within the budget
    of ``max_tokens`` cells that all ``n_frames`` of a call share, and at least ``min_tokens`` each, which
    wins. Hulu-Med's rule for one merge size in a call."""
    factor = patch_size * merge_size
    if min(height, width) < 1 or n_frames < 1:
        raise ValueError(f"frame size: has {n_frames} frames of {height}x{width}, expected at least 1 of 1x1")
    max_pixels, min_pixels = max_tokens * factor**2 // n_frames, min_tokens * factor**2
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    if h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def frame_sizes(
    sizes: Sequence[tuple[int, int, int]], merge_sizes: Sequence[int], *, patch_size: int = PATCH,
    max_tokens: int = MAX_TOKENS, min_tokens: int = MIN_TOKENS,
) -> list[tuple[int, int]]:  # fmt: skip
    """(height, width) for each of several clips (frames, height, width) of one call.

    One merge size: :func:`frame_size` with the frames of all. Different ones: Hulu-Med's other rule, one
    scale for all clips so that their tokens fit ``max_tokens`` together, and no minimum but one cell
    (where the released code would ask for none and fail).
    """
    if len(set(merge_sizes)) <= 1:
        n = sum(t for t, _, _ in sizes)
        return [
            frame_size(h, w, n_frames=n, merge_size=m, patch_size=patch_size, max_tokens=max_tokens,
                       min_tokens=min_tokens)
            for (_, h, w), m in zip(sizes, merge_sizes, strict=True)
        ]  # fmt: skip
    factors = [patch_size * m for m in merge_sizes]
    tokens = sum(t * math.ceil(h / f) * math.ceil(w / f) for (t, h, w), f in zip(sizes, factors, strict=True))
    beta = math.sqrt(tokens / max_tokens)
    out = []
    for (_, h, w), f in zip(sizes, factors, strict=True):
        cells = [math.floor(x / beta / f) if tokens > max_tokens else round(x / f) for x in (h, w)]
        out.append((max(cells[0], 1) * f, max(cells[1], 1) * f))
    return out


@functools.cache
def _native_equals_pillow(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether the installed Pillow resamples across before it goes down, as the native library does. Releases before
    13 always do; 13 decides by the sizes, and rounds differently where it does not. Noise tells."""
    from PIL import Image

    from hulukern.ops.patch_embed.native import patch_embed_resize

    noise = np.random.default_rng(0).integers(0, 256, source, dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))
    return np.array_equal(patch_embed_resize(torch.from_numpy(noise)[None, :, :, None], *size)[0, :, :, 0], expected)


def resize_frames(clip: Clip, size: tuple[int, int]) -> Pixels:
    """uint8 [T, H, W, C] at ``size`` (height, width): Pillow's bicubic, which antialiases, on uint8. Clips go
    through the native library, on all threads, where that gives Pillow's bits."""
    if len(clip.frames) > 1 and not native_error() and _native_equals_pillow(clip.frames.shape[1:3], size):
        from hulukern.ops.patch_embed.native import patch_embed_resize

        frames = torch.from_numpy(np.require(clip.frames, requirements=["C", "W"]))  # torch takes no read-only array
        return patch_embed_resize(frames, *size).numpy()
    from PIL import Image

    T, _, _, C = clip.frames.shape
    out = np.empty((T, *size, C), np.uint8)
    for t, frame in enumerate(clip.frames):
        image = Image.fromarray(frame[:, :, 0] if C == 1 else frame)
        out[t] = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, C)
    return out


def resize_values(clip: Clip, size: tuple[int, int]) -> npt.NDArray[np.int16]:
    """int16 [T, H, W, 1] intensities at ``size``, for scores in windows: bicubic in fp32, rounded."""
    from PIL import Image

    if clip.values is None:
        raise ValueError(f"{clip.source}: has no int16 intensities, expected a gray volume that fits them")
    out = np.empty((len(clip.values), *size, 1), np.int16)
    for t, frame in enumerate(clip.values):
        image = Image.fromarray(frame[:, :, 0].astype(np.float32))
        resized = np.rint(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
        out[t, :, :, 0] = resized.clip(-32768, 32767)
    return out


def cut_patches(frames: Pixels, merge_size: int, patch_size: int = PATCH) -> torch.Tensor:
    """Frames [T, H, W, C] as uint8 patches [N, 3 * P * P] in merge-block order (t, h/M, w/M, M, M), each
    (channel, y, x); gray is repeated to three channels."""
    T, H, W, C = frames.shape
    cell = patch_size * merge_size
    x = torch.from_numpy(frames).view(T, H // cell, merge_size, patch_size, W // cell, merge_size, patch_size, C)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.expand(*x.shape[:5], 3, patch_size, patch_size).reshape(-1, 3 * patch_size**2)
