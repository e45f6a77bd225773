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
    Window,
    check_size,
    choose,
    extent,
    reading,
    refuse,
    thin,
    to_int16,
    to_pixels,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
# Pillow's other formats run programs (EPS), open further files, or are known by next to nothing. JPEG is MPO too.
FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "PPM")
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
Page = npt.NDArray[Any]  # uint8 [H, W, C], or [H, W] of more than 8 bits


def load(path: Path, how: Reading) -> Clip:
    """One picture; several are a video in formats of animations, else a volume. Of an MPO, the first.

    More than 8 bits are scaled by one minimum and maximum, several of them by ``how.window`` where it is given.
    """
    source = str(path)
    with reading(source, "a whole image"):
        pages, kind, times = _pages(path, how)
        if len({page.shape for page in pages}) > 1:
            refuse(source, "pages of different sizes", "one size")
        frames, values = _scaled(source, pages, None if kind == IMAGE else how.window)
    return Clip(frames, source, kind, "image", times, values=values)


def load_folder(path: Path, files: Sequence[Path], how: Reading) -> Clip:
    """Images of one size in name order, a video without times; only the kept ones are decoded. Those of more than 8
    bits are scaled as the pages of one file."""
    source = str(path)
    files = sorted(f for f in files if f.name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        refuse(source, "no images", f"a DICOM series or files ending in {', '.join(IMAGE_SUFFIXES)}")
    if len(files) > MAX_FRAMES:
        refuse(source, f"{len(files)} images", f"at most {MAX_FRAMES}")
    kept = [files[k] for k in thin(np.arange(len(files)), how.max_frames)]
    pages: list[Page] = []
    for file in kept:
        with reading(str(file), "a whole image"):
            page = _pages(file, how, first=True)[0][0]
        page = np.repeat(page, 3, -1) if page.shape[2:] == (1,) else page
        if pages and page.shape[:2] != pages[0].shape[:2]:
            size = "x".join(map(str, pages[0].shape[:2]))
            refuse(str(file), f"size {'x'.join(map(str, page.shape[:2]))}", f"{size} as {kept[0].name}")
        if pages and page.ndim != pages[0].ndim:
            bits = ("more than 8 bits", "8 bits")
            refuse(str(file), bits[page.ndim == 3], f"{bits[page.ndim == 2]} as {kept[0].name}")
        pages.append(page)
        check_size(source, len(pages), *page.shape[:2], 3)
    frames, values = _scaled(source, pages, how.window)
    return Clip(np.repeat(frames, 3, -1) if frames.shape[-1] == 1 else frames, source, VIDEO, "folder", values=values)


def _pages(path: Path, how: Reading, first: bool = False) -> tuple[list[Page], str, tuple[float, ...] | None]:
    """What is kept of a file, or its first page alone; image, video or volume; its times."""
    from PIL import Image, ImageOps

    source = str(path)

    def page(k: int) -> Page:
        image.seek(k)
        check_size(source, image.height, image.width, 3)
        return _page(image if how.released else ImageOps.exif_transpose(image))

    with Image.open(path, formats=FORMATS) as image:
        n = 1 if first or image.format == "MPO" else int(getattr(image, "n_frames", 1))
        if n > MAX_FRAMES:
            refuse(source, f"{n} claimed pages", f"at most {MAX_FRAMES}")
        check_size(source, image.height, image.width, 3)
        if n == 1 or image.format not in ANIMATED:
            at = thin(np.arange(n), how.num_slices)
            check_size(source, len(at), image.height, image.width, 3)
            return [page(int(k)) for k in at], IMAGE if n == 1 else VOLUME, None
        # A frame is drawn over those before it, and may have its duration only then: every one, in order, once.
        check_size(source, n, image.height, image.width, 3)
        pages, seconds = [], []
        for k in range(n):
            pages.append(page(k))
            seconds.append(float(image.info.get("duration") or 0) / 1000)
    times = np.cumsum([0, *seconds[:-1]])
    if not times[-1] > 0:
        return [pages[k] for k in thin(np.arange(n), how.max_frames)], VIDEO, None
    at = choose(n, times, how.fps, how.max_frames)
    return [pages[k] for k in at], VIDEO, tuple(times[at].tolist())


def _scaled(source: str, pages: Sequence[Page], window: Window | None) -> tuple[Pixels, npt.NDArray[np.int16] | None]:
    """As frames [T, H, W, C], and what they were before, if that was more than 8 bits."""
    stack = np.stack(pages)
    if stack.ndim == 4:
        return stack, None
    return to_pixels(stack, *extent(source, stack, window))[..., None], to_int16(stack)


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
        return Clip(_scaled(source, [_page(upright)], None)[0], source, IMAGE, "image")
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


def _page(image: Any) -> Page:
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))
