"""patch_embed_resize is Pillow's bicubic, bit for bit: across, then down.

Pillow 13 goes down first where height shrinks much more than width, which rounds differently; two calls for one
dimension each pin the order that every release before it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hulukern.backends import native_error
from hulukern.ops.patch_embed.native import patch_embed_resize

assert not native_error()  # also tells the module torch's dtypes

SIZES = [
    ((512, 512), (504, 504)), ((37, 53), (28, 56)), ((28, 56), (37, 53)), ((1, 1), (14, 28)), ((300, 7), (14, 14)),
    ((64, 48), (64, 28)), ((64, 48), (28, 48)), ((64, 48), (64, 48)), ((1000, 31), (99, 30)), ((5, 900), (33, 65)),
    ((2, 3), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_equals_pillow(source: tuple[int, int], target: tuple[int, int], channels: int) -> None:
    # Half the pixels are black or white: overshoots must clip as Pillow's do.
    generator = np.random.default_rng(sum(source + target))
    frames = generator.integers(0, 256, (2, *source, channels), dtype=np.uint8)
    frames = np.where(generator.random(frames.shape) < 0.5, np.uint8(255) * (frames > 127), frames).astype(np.uint8)
    got = patch_embed_resize(torch.from_numpy(frames), *target).numpy()
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame[:, :, 0] if channels == 1 else frame)
        across = image.resize((target[1], source[0]), Image.Resampling.BICUBIC)
        expected = np.asarray(across.resize(target[::-1], Image.Resampling.BICUBIC)).reshape(*target, channels)
        assert np.array_equal(got[t], expected)


def test_strided_frames_and_refusals() -> None:
    frames = torch.randint(0, 256, (4, 40, 60, 3), dtype=torch.uint8)
    view = frames[::2, 3:31, 8:36]
    assert torch.equal(patch_embed_resize(view, 14, 14), patch_embed_resize(view.contiguous(), 14, 14))
    assert patch_embed_resize(frames[:0], 14, 14).shape == (0, 14, 14, 3)
    with pytest.raises(ValueError, match="patch_embed_resize: frames has C=2, expected 1 or 3"):
        patch_embed_resize(frames[..., :2], 14, 14)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        patch_embed_resize(frames, 0, 14)
