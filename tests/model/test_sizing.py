"""Sizes, resize and cut against the released image processor's golden numbers and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from model.media import Clip
from model.sizing import frame_size, resize_frames


@pytest.mark.parametrize(
    ("size", "n", "expected"),
    [
        ((512, 512), 32, (504, 504)),
        ((512, 512), 64, (448, 448)),
        ((512, 512), 160, (280, 280)),
        ((512, 512), 180, (252, 252)),
        ((512, 512), 1024, (112, 112)),
        ((300, 200), 1, (308, 196)),
        ((1, 1), 1, (112, 112)),
    ],
)
def test_frame_sizes_of_the_released_rule(size: tuple[int, int], n: int, expected: tuple[int, int]) -> None:
    assert frame_size(*size, n_frames=n) == expected


def test_resize_is_pils_bicubic() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)
    h, w = frame_size(50, 70, n_frames=2)
    out = resize_frames(Clip(frames, "x", "video", "array"), (h, w))
    assert out.shape == (2, h, w, 3)
    assert (out[1] == np.asarray(Image.fromarray(frames[1]).resize((w, h), Image.Resampling.BICUBIC))).all()
