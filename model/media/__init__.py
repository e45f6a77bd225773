"""Files to frames: DICOM, NIfTI, video and images, as :class:`Clip`, found out by content."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.media import dicom, image, nifti, video
from model.media.clip import (
    IMAGE,
    VIDEO,
    VOLUME,
    WINDOWS,
    Clip,
    Pixels,
    Reading,
    Window,
    reading,
    refuse,
    score_windows,
)
from model.media.image import from_memory

__all__ = [
    "IMAGE",
    "VIDEO",
    "VOLUME",
    "WINDOWS",
    "Clip",
    "Pixels",
    "Reading",
    "Window",
    "from_memory",
    "load_frames",
    "score_windows",
]  # fmt: skip

HEAD = 352  # bytes that tell every kind: NIfTI's magic ends there


def load_frames(path: str | Path, how: Reading | None = None, **options: Any) -> Clip:
    """Read any supported file, or a folder that holds a DICOM series or images of one size.

    DICOM: single, multi-frame, colour, palette and compressed; rescale slope; the header's lookup table or
    window, or min-max over the whole file but for its padding; MONOCHROME1 inverted. A series is read whole or
    refused; files beside it that are plainly something else are passed over. NIfTI: see
    :func:`model.media.nifti.load`. Video: see :func:`model.media.video.load`. Images: PNG, JPEG, JPEG 2000,
    BMP, TIFF, WebP, GIF, AVIF and PPM, upright by EXIF; animations are videos.

    Args:
        path: what it is, its content says; the name does not matter.
        how: how to read; ``options`` are fields of :class:`Reading` that replace its own.

    Raises:
        ValueError: missing, empty, truncated or unknown file; no frames; frames of different sizes; NaN
        or infinite values; a mixed or incomplete series; a header that claims too much, a stream that
        inflates beyond it.
    """
    path = Path(path)
    source = str(path)
    how = replace(how or Reading(), **options)
    with reading(source, "a file or a folder that can be read"):
        if not path.exists():
            refuse(source, "nothing there", "a file or a folder")
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
            heads = {f: _head(f) for f in files}
            if any(dicom.is_dicom(head) or f.suffix.lower() in dicom.SUFFIXES for f, head in heads.items()):
                return dicom.load_series(path, [f for f in files if dicom.may_be_slice(f, heads[f])], how)
            return image.load_folder(path, files, how)
        if not path.is_file():
            refuse(source, "no regular file", "a file or a folder")
        if path.stat().st_size == 0:
            refuse(source, "0 bytes", "an image, DICOM, NIfTI or video file")
        return _loader(path)(path, how)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _loader(path: Path) -> Any:
    name, head = path.name.lower(), _head(path)
    if dicom.is_dicom(head):
        return dicom.load
    if name.endswith((".nii", ".nii.gz")) or nifti.is_nifti(_inflated(path, head)):
        return nifti.load
    if name.endswith((".dcm", ".dicom")):
        return dicom.load
    if video.container(head):
        return video.load
    if name.endswith(image.IMAGE_SUFFIXES) or _pillow_knows(path):
        return image.load
    if name.endswith(video.VIDEO_SUFFIXES):
        return video.load
    refuse(str(path), "an unknown type", "DICOM, NIfTI (.nii, .nii.gz), a video or an image")


def _inflated(path: Path, head: bytes) -> bytes:
    if head[:2] != b"\x1f\x8b":
        return head
    try:
        with gzip.open(path) as file:
            return file.read(HEAD)
    except (OSError, EOFError, zlib.error):
        return b""


def _pillow_knows(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=image.FORMATS) as found:
            return min(found.size) > 0
    except Exception:
        return False
