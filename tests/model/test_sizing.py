"""Sizes, resize and cut: the released image processor's golden numbers, and Pillow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hulukern.pruning import prune_frames
from model.image_processor import HuluMedImageProcessor
from model.media import Clip, Reading, from_memory, score_windows
from model.sizing import cut_patches, frame_size, frame_sizes, resize_frames, resize_values

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "released_qwen2" / "image_processor.json").read_text())["cases"]


def picture(height: int, width: int) -> np.ndarray:
    """The golden numbers' own, see image_processor.json."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * y + x) % 256, (y + 2 * x) % 256, ((y // 7) * (x // 5)) % 256], -1).astype(np.uint8)


def clips_of(case: dict) -> list[Clip]:
    """As the released processor was called: with Pillow images, a clip as a list of them."""
    pictures = [picture(*size) for size in case["sizes_hw"]]
    if case["clip"]:
        rolled = [Image.fromarray(np.roll(pictures[0], k, 0)) for k in range(len(pictures))]
        return [from_memory(rolled, "video", Reading())]
    return [from_memory(Image.fromarray(p), "image", Reading()) for p in pictures]


@pytest.mark.parametrize("family", ["released_qwen2", "released_qwen3"])
@pytest.mark.parametrize("k", range(len(CASES)))
def test_released_is_bit_exact(family: str, k: int) -> None:
    golden = load_file(GOLDEN / family / "image_processor.safetensors")
    case = CASES[k]
    processor = HuluMedImageProcessor(max_tokens=case["max_tokens"], released=True)
    clips = clips_of(case)
    out = processor(clips, [case["merge"]] * len(clips))
    assert torch.equal(out.grid_thw, golden[f"case{k}.grid_sizes"])
    normal = processor.normalize(out.pixel_values)
    rows = golden[f"case{k}.pixel_values"]
    kept = normal[:: int(golden[f"case{k}.row_stride"])]
    assert torch.equal(out.pixel_values[:: int(golden[f"case{k}.row_stride"])], ((rows + 1) * 127.5).round().byte())
    assert torch.equal(kept, rows)
    assert normal.mean().item() == pytest.approx(golden[f"case{k}.mean"].item(), abs=1e-6)
    assert normal.abs().mean().item() == pytest.approx(golden[f"case{k}.abs_mean"].item(), abs=1e-6)


def test_a_picture_keeps_its_shape_unless_released() -> None:
    clip = from_memory(Image.fromarray(picture(200, 300)), "image", Reading())
    assert HuluMedImageProcessor()([clip], [1]).grid_thw.tolist() == [[1, 14, 21]]
    assert HuluMedImageProcessor(released=True)([clip], [1]).grid_thw.tolist() == [[1, 21, 14]]
    array = from_memory(picture(200, 300), "image", Reading())  # the released code reads arrays as they are
    assert HuluMedImageProcessor(released=True)([array], [1]).grid_thw.tolist() == [[1, 14, 21]]


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


@pytest.mark.parametrize("size", [(1, 1000), (3, 700), (2000, 5), (13, 14)])
@pytest.mark.parametrize("merge", [1, 2])
def test_sizes_are_whole_cells_for_any_shape(size: tuple[int, int], merge: int) -> None:
    h, w = frame_size(*size, merge_size=merge)
    assert min(h, w) >= 14 * merge
    assert h % (14 * merge) == w % (14 * merge) == 0


def test_different_merge_sizes_share_one_scale() -> None:
    sizes = [(1, 280, 560), (8, 280, 280)]
    assert frame_sizes(sizes, [1, 2]) == [(280, 560), (280, 280)]
    (h, w), (hv, wv) = frame_sizes(sizes, [1, 2], max_tokens=400)  # 800 + 800 tokens: sides times 1 / 2
    assert (h, w, hv, wv) == (140, 280, 140, 140)
    assert frame_sizes([(1, 3, 3), (1, 20, 20)], [1, 2]) == [(14, 14), (28, 28)]  # the released code asks for 0


def test_resize_is_pils_bicubic() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)
    h, w = frame_size(50, 70, n_frames=2)
    out = resize_frames(Clip(frames, "x", "video", "array"), (h, w))
    assert out.shape == (2, h, w, 3)
    assert (out[1] == np.asarray(Image.fromarray(frames[1]).resize((w, h), Image.Resampling.BICUBIC))).all()


def test_intensities_are_resized_beyond_eight_bits() -> None:
    values = np.full((2, 20, 30), -1000, np.int16)
    values[:, :, 15:] = 3000
    out = resize_values(from_memory(values, "volume", Reading()), (28, 56))
    assert out.shape == (2, 28, 56, 1)
    assert out.dtype == np.int16
    assert out[0, 14, 0, 0] == -1000
    assert out[0, 14, -1, 0] == 3000
    with pytest.raises(ValueError, match="no int16 intensities"):
        resize_values(from_memory(values.astype(np.uint8), "volume", Reading()), (28, 56))


def test_pruning_scores_hounsfield_windows() -> None:
    """A change of 60 HU in soft tissue counts in its window and is lost over the whole range."""
    values = np.full((2, 56, 56), 20, np.int16)
    values[0, 0, 0], values[0, 0, 1] = -1000, 3000
    values[1, 28:] = 80
    clip = from_memory(values, "volume", Reading())
    windows = score_windows(["soft_tissue", "lung"])
    assert windows == [(-150, 250), (-1350, 150)]
    scored = prune_frames(torch.from_numpy(resize_values(clip, (56, 56))), rule="previous", windows=windows)
    assert scored.keep.tolist()[4:] == [False, False, True, True]
    whole = prune_frames(torch.from_numpy(resize_frames(clip, (56, 56))), rule="previous")
    assert whole.keep.tolist()[4:] == [True, False, False, False]  # a token only because a frame keeps one


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_in_merge_block_order(merge: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), np.uint8)
    patches = cut_patches(frames, merge).view(2, 4, 6, 3, 14, 14)
    rows = [(t, i * merge + a, j * merge + b) for t in range(2) for i in range(4 // merge) for j in range(6 // merge)
            for a in range(merge) for b in range(merge)]  # fmt: skip
    for patch, (t, i, j) in zip(patches.flatten(0, 2), rows, strict=True):
        whole = frames[t, 14 * i : 14 * i + 14, 14 * j : 14 * j + 14]
        assert torch.equal(patch, torch.from_numpy(whole).permute(2, 0, 1))


def test_gray_is_three_equal_channels() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1), np.uint8)
    assert torch.equal(cut_patches(gray, 2), cut_patches(gray.repeat(3, -1), 2))
