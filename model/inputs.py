"""Files to frames: DICOM, NIfTI, video and images, as uint8 ``[T, H, W, C]``, and their resize.

Files are hostile: a header is believed only up to :data:`MAX_PIXELS`, nothing is unpickled, and every
refusal is a ValueError of one line that names the file, what came and what was expected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 1 << 30  # values T*H*W*C of one input, 1 GiB of uint8; checked before anything is decoded
MAX_FRAMES = 20_000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [T, H, W, C], C 1 or 3. seconds_per_frame: None where the file has no time axis."""

    frames: Pixels
    source: str
    kind: str  # "DICOM", "NIfTI", "video", "image", "folder"
    seconds_per_frame: float | None = None

    def at_fps(self, fps: float) -> Clip:
        """The frame nearest to every 1 / fps seconds."""
        if self.seconds_per_frame is None:
            _refuse(self.source, "no frame times", "a video or a DICOM clip for a frame rate")
        if not fps > 0:
            _refuse(self.source, f"fps {fps}", "above 0")
        step = 1 / (fps * self.seconds_per_frame)
        if step <= 1:
            return self
        at = [round(i * step) for i in range(math.ceil(len(self.frames) / step)) if round(i * step) < len(self.frames)]
        return replace(self, frames=self.frames[at], seconds_per_frame=1 / fps)


def load_frames(path: str | Path, *, fps: float | None = None) -> Clip:
    """Read any supported file, or a folder of images of one size, in name order.

    DICOM: single, multi-frame, colour and palette; rescale slope and window of the header, or min-max
    over the whole file; MONOCHROME1 inverted. NIfTI: closest canonical orientation, slices along the
    third axis, the first volume of a series, min-max over the volume. Video: every frame, or ``fps``.

    Raises:
        ValueError: missing, empty, truncated or unknown file; no frames; frames of different sizes; NaN
        or infinite values; a header that claims more than :data:`MAX_PIXELS` values.
    """
    path = Path(path)
    name = str(path)
    if not path.exists():
        _refuse(name, "nothing there", "a file or a folder of images")
    if path.is_dir():
        clip = _load_folder(path)
    else:
        if path.stat().st_size == 0:
            _refuse(name, "0 bytes", "an image, DICOM, NIfTI or video file")
        clip = _loader(path)(path)
    if clip.frames.shape[0] == 0:
        _refuse(name, "0 frames", "at least 1")
    return clip if fps is None else clip.at_fps(fps)


def frame_size(
    height: int, width: int, *, n_frames: int = 1, merge_size: int = 2, patch_size: int = 14,
    max_tokens: int = 16384, min_tokens: int = 16,
) -> tuple[int, int]:  # fmt: skip
    """(height, width) that frames are resized to: whole cells, close to the original, within the budget
    of ``max_tokens`` cells that all frames share. The released rule, with height and width as they are."""
    factor = patch_size * merge_size
    if min(height, width) < 1 or n_frames < 1:
        raise ValueError(f"frame_size: {n_frames} frames of {height}x{width}, expected at least 1 of 1x1")
    h, w = max(round(height / factor), 1) * factor, max(round(width / factor), 1) * factor
    max_pixels, min_pixels = max_tokens * factor**2 // n_frames, min_tokens * factor**2
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(math.floor(height / beta / factor), 1) * factor
        w = max(math.floor(width / beta / factor), 1) * factor
    if h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def resize_frames(clip: Clip, *, merge_size: int = 2, patch_size: int = 14, max_tokens: int = 16384) -> Pixels:
    """Frames at :func:`frame_size`, PIL's bicubic on uint8, as the released processor does."""
    from PIL import Image

    T, H, W, C = clip.frames.shape
    h, w = frame_size(H, W, n_frames=T, merge_size=merge_size, patch_size=patch_size, max_tokens=max_tokens)
    out = np.empty((T, h, w, C), np.uint8)
    for t in range(T):
        image = Image.fromarray(clip.frames[t, :, :, 0] if C == 1 else clip.frames[t])
        out[t] = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)).reshape(h, w, C)
    return out


def _refuse(source: str, came: str, expected: str) -> NoReturn:
    raise ValueError(f"{source}: has {' '.join(came.split())}, expected {expected}")


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Whatever a decoder throws at a bad file becomes the one-line refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ValueError as error:
        if str(error).startswith(f"{path}: has "):
            raise
        _refuse(str(path), f"content that cannot be read ({error})", expected)
    except MemoryError:
        _refuse(str(path), "more data than memory holds", expected)
    except Exception as error:
        _refuse(str(path), f"content that cannot be read ({type(error).__name__}: {error})", expected)


def _loader(path: Path) -> Any:
    name = path.name.lower()
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:132] == b"DICM" or name.endswith((".dcm", ".dicom")):
        return _load_dicom
    if name.endswith((".nii", ".nii.gz")):
        return _load_nifti
    if name.endswith(VIDEO_SUFFIXES):
        return _load_video
    if name.endswith(IMAGE_SUFFIXES):
        return _load_image
    _refuse(str(path), "an unknown type", "DICOM, NIfTI (.nii, .nii.gz), a video or an image")


def _check_size(path: Path, *sizes: int) -> None:
    """Sizes as the header claims them."""
    if min(sizes) < 1:
        _refuse(str(path), f"a size of {' x '.join(map(str, sizes))}", "sizes of at least 1")
    if math.prod(sizes) > MAX_PIXELS:
        _refuse(str(path), f"a claimed size of {' x '.join(map(str, sizes))}", f"at most {MAX_PIXELS} values")


def _scale(path: Path, values: npt.NDArray[Any], lo: float, hi: float) -> Pixels:
    """lo..hi to 0..255, one scale for the whole volume. A constant one is black."""
    if not (math.isfinite(lo) and math.isfinite(hi)):
        _refuse(str(path), "NaN or infinite values", "finite ones")
    width = hi - lo
    scaled = (values.astype(np.float32) - np.float32(lo)) * np.float32(255 / width if width > 0 else 0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _load_dicom(path: Path) -> Clip:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    with _reading(path, "a whole DICOM file with pixels"):
        data = pydicom.dcmread(path)
        if "Rows" not in data or "Columns" not in data:
            _refuse(str(path), "no pixels", "a DICOM image")
        n = int(data.get("NumberOfFrames") or 1)
        _check_size(path, n, int(data.Rows), int(data.Columns), int(data.get("SamplesPerPixel", 1)))
        if n > MAX_FRAMES:
            _refuse(str(path), f"{n} claimed frames", f"at most {MAX_FRAMES}")
        pixels = pixel_array(data)  # YBR comes as RGB
        kind = str(data.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, data)
            pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
        color = pixels.ndim >= 3 and pixels.shape[-1] == 3
        frames = pixels.reshape(n, int(data.Rows), int(data.Columns), 3 if color else 1)
        if color:
            frames = _scale(path, frames, 0, 255 if frames.dtype == np.uint8 else float(frames.max()))
        else:
            frames = _window(path, data, np.asarray(apply_modality_lut(frames, data)))
            if kind == "MONOCHROME1":
                frames = 255 - frames
    time_ms = data.get("FrameTime") or (1000 / float(data.CineRate) if data.get("CineRate") else None)
    return Clip(frames, str(path), "DICOM", float(time_ms) / 1000 if time_ms and n > 1 else None)


def _window(path: Path, data: Any, values: npt.NDArray[Any]) -> Pixels:
    """The first window of the header, or min-max over all frames."""
    center, width = data.get("WindowCenter"), data.get("WindowWidth")
    if center is None or width is None:
        return _scale(path, values, float(values.min()), float(values.max()))
    center = float(center[0] if hasattr(center, "__len__") else center)
    width = float(width[0] if hasattr(width, "__len__") else width)
    return _scale(path, values, center - width / 2, center + width / 2)


def _load_nifti(path: Path) -> Clip:
    import nibabel

    with _reading(path, "a whole NIfTI volume"):
        image: Any = nibabel.load(path)
        shape = tuple(int(s) for s in image.shape)
        if len(shape) not in (3, 4):
            _refuse(str(path), f"{len(shape)} dimensions", "a volume (3) or a series of volumes (4)")
        _check_size(path, *shape[:3])
        _check_size(path, *shape)
        volume = nibabel.as_closest_canonical(image if len(shape) == 3 else image.slicer[..., :1])
        values = np.asarray(volume.dataobj, np.float32).reshape(volume.shape[:3])
        if not np.isfinite(values).all():
            _refuse(str(path), "NaN or infinite values", "finite ones")
        frames = _scale(path, values, float(values.min()), float(values.max()))
    # Canonical is (right, anterior, superior): a picture has anterior up and, as radiologists look, right on the left.
    return Clip(np.ascontiguousarray(frames.transpose(2, 1, 0)[:, ::-1, ::-1, None]), str(path), "NIfTI")


def _load_video(path: Path) -> Clip:
    import av

    frames: list[Pixels] = []
    with _reading(path, "a video that decodes"), av.open(str(path)) as container:
        if not container.streams.video:
            _refuse(str(path), "no video stream", "one")
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        _check_size(path, stream.height, stream.width, 3)
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            _check_size(path, len(frames), *frames[0].shape)
        if not frames:
            _refuse(str(path), "0 frames", "at least 1")
        if len({f.shape for f in frames}) > 1:
            _refuse(str(path), "frames of different sizes", "one size")
    return Clip(np.stack(frames), str(path), "video", 1 / float(rate) if rate else None)


def _load_image(path: Path) -> Clip:
    from PIL import Image, ImageSequence

    with _reading(path, "a whole image"), Image.open(path) as image:
        _check_size(path, getattr(image, "n_frames", 1), image.height, image.width, 3)
        gray = image.mode in ("1", "L", "I;16", "I", "F")
        frames = []
        for page in ImageSequence.Iterator(image):
            if page.mode in ("I;16", "I", "F"):
                values = np.asarray(page, np.float32)
                frames.append(_scale(path, values, float(values.min()), float(values.max()))[..., None])
            else:
                array = np.asarray(page.convert("L" if gray else "RGB"))
                frames.append(array[..., None] if gray else array)
        if len({f.shape for f in frames}) > 1:
            _refuse(str(path), "pages of different sizes", "one size")
    return Clip(np.stack(frames), str(path), "image")


def _load_folder(path: Path) -> Clip:
    files = sorted(p for p in path.iterdir() if p.name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        _refuse(str(path), "no images", f"files ending in {', '.join(IMAGE_SUFFIXES)}")
    if len(files) > MAX_FRAMES:
        _refuse(str(path), f"{len(files)} images", f"at most {MAX_FRAMES}")
    frames: list[Pixels] = []
    for file in files:
        frame = _load_image(file).frames[0]
        frame = np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else frame
        if frames and frame.shape != frames[0].shape:
            size = "x".join(map(str, frames[0].shape[:2]))
            _refuse(str(file), f"size {'x'.join(map(str, frame.shape[:2]))}", f"{size} as {files[0].name}")
        frames.append(frame)
        _check_size(path, len(frames), *frame.shape)
    return Clip(np.stack(frames), str(path), "folder")
