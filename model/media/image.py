"""Images by Pillow, folders of them, and arrays, tensors and pictures that are in memory already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.media.clip import (
    IMAGE,
    MAX_FRAMES,
    VIDEO,
    VOLUME,
    Clip,
    Pixels,
    Reading,
    check_size,
    choose,
    extent,
    reading,
    refuse,
    thin,
    to_int16,
    to_pixels,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def load(path: Path, how: Reading) -> Clip:
    """One picture; several pages are a video where they have durations (GIF, WebP), else a volume."""
    from PIL import Image, ImageOps

    source = str(path)
    with reading(source, "a whole image"), Image.open(path) as image:
        n = int(getattr(image, "n_frames", 1))
        if n > MAX_FRAMES:
            refuse(source, f"{n} claimed pages", f"at most {MAX_FRAMES}")
        check_size(source, image.height, image.width, 3)
        durations = []
        if n > 1 and "duration" in image.info:
            for k in range(n):
                image.seek(k)
                durations.append(image.info.get("duration", 0) / 1000)
        times = tuple(float(t) for t in np.cumsum([0, *durations[:-1]])) if durations else None
        at = choose(n, times, how.fps, how.max_frames) if times else thin(np.arange(n), how.num_slices)
        check_size(source, len(at), image.height, image.width, 3)
        frames = []
        for k in at:
            image.seek(int(k))
            check_size(source, image.height, image.width, 3)
            frames.append(_pixels(source, image if how.released else ImageOps.exif_transpose(image)))
        if len({f.shape for f in frames}) > 1:
            refuse(source, "pages of different sizes", "one size")
    kind = IMAGE if n == 1 else VIDEO if times else VOLUME
    return Clip(np.stack(frames), source, kind, "image", tuple(times[k] for k in at) if times else None)


def load_folder(path: Path, files: Sequence[Path], how: Reading) -> Clip:
    """Images of one size in name order, a video without times; only the kept ones are decoded."""
    source = str(path)
    files = sorted(f for f in files if f.name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        refuse(source, "no images", f"a DICOM series or files ending in {', '.join(IMAGE_SUFFIXES)}")
    if len(files) > MAX_FRAMES:
        refuse(source, f"{len(files)} images", f"at most {MAX_FRAMES}")
    kept = [files[k] for k in thin(np.arange(len(files)), how.max_frames)]
    frames: list[Pixels] = []
    for file in kept:
        frame = load(file, how).frames[0]
        frame = np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else frame
        if frames and frame.shape != frames[0].shape:
            size = "x".join(map(str, frames[0].shape[:2]))
            refuse(str(file), f"size {'x'.join(map(str, frame.shape[:2]))}", f"{size} as {kept[0].name}")
        frames.append(frame)
        check_size(source, len(frames), *frame.shape)
    return Clip(np.stack(frames), source, VIDEO, "folder")


def from_memory(data: Any, kind: str, how: Reading) -> Clip:
    """An array, tensor or PIL image, or a list of them, as a clip of this kind.

    Images ``[H, W]`` or ``[H, W, C]``, videos ``[T, H, W, C]``, volumes ``[T, H, W]`` or with C; C 1 or 3,
    last or, where that is the only reading, before H and W. uint8 is taken as it is. Other types are
    for volumes only, scaled by ``how.window`` or their minimum and maximum.
    """
    from PIL import Image, ImageOps

    source = f"{kind} in memory"
    if isinstance(data, (list, tuple)):
        if not data:
            refuse(source, "0 frames", "at least 1")
        parts = [from_memory(one, IMAGE, how) for one in data]
        if len({p.frames.shape for p in parts}) > 1:
            refuse(source, "frames of different sizes", "one size")
        return Clip(np.concatenate([p.frames for p in parts]), source, kind, parts[0].form)
    if isinstance(data, Image.Image):
        upright = data if how.released else ImageOps.exif_transpose(data)
        return Clip(_pixels(source, upright)[None], source, IMAGE, "image")
    array = np.asarray(data.detach().cpu() if hasattr(data, "detach") else data)
    frames = _channels_last(source, array, kind)
    check_size(source, *frames.shape)
    if frames.dtype == np.uint8:
        return Clip(frames, source, kind, "array")
    if kind != VOLUME or frames.dtype.kind not in "iuf" or frames.shape[-1] != 1:
        refuse(source, f"dtype {array.dtype}", "uint8" + (" or gray numbers" if kind == VOLUME else ""))
    values = frames[..., 0]
    lo, hi = extent(source, values, how.window)
    pixels = to_pixels(values, lo, hi)[..., None]
    return Clip(pixels, source, kind, "array", values=to_int16(values))


def _channels_last(source: str, array: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    wanted = "[H, W], [H, W, C]" if kind == IMAGE else "[T, H, W, C]" + (", [T, H, W]" if kind == VOLUME else "")
    gray = {IMAGE: 2, VIDEO: 0, VOLUME: 3}[kind]
    if array.ndim == gray:
        array = array[..., None]
    elif array.ndim != (3 if kind == IMAGE else 4):
        refuse(source, f"shape {list(array.shape)}", wanted)
    elif array.shape[-1] not in (1, 3) and array.shape[-3] in (1, 3):
        array = np.moveaxis(array, -3, -1)
    if array.shape[-1] not in (1, 3):
        refuse(source, f"shape {list(array.shape)}", f"{wanted} with 1 or 3 channels")
    return array[None] if kind == IMAGE else array


def _pixels(source: str, image: Any) -> Pixels:
    """uint8 [H, W, 1] or [H, W, 3]; more than 8 bits are scaled by their own minimum and maximum."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)[None]
        return to_pixels(values, *extent(source, values, None))[0, ..., None]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))
