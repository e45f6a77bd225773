"""The common form of every input, and what all readers share: limits, refusals, scaling, choosing frames.

Files are hostile: a header is believed only up to the limits below, nothing is unpickled, and every
refusal is a ValueError of one line that names the file, what came and what was expected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 1 << 30  # values T*H*W*C of one input, 1 GiB of uint8; checked before anything is decoded
MAX_BYTES = 1 << 31  # of one volume as it is stored
MAX_FRAMES = 20_000  # that a header may claim, or a folder hold
MAX_TOLD = 160  # characters of a decoder's own words in a refusal
MAX_TICKS = 10_000_000  # times that a rate asks for; beyond, all frames are candidates

# Hounsfield windows as (centre, width), the usual presets of CT reading (Radiopaedia, "Windowing (CT)").
WINDOWS = {"lung": (-600, 1500), "soft_tissue": (50, 400), "bone": (400, 1800), "brain": (40, 80)}
Window = str | tuple[float, float]  # a name of WINDOWS, or (lo, hi) in the file's own unit

IMAGE, VIDEO, VOLUME = "image", "video", "volume"


@dataclass(frozen=True)
class Reading:
    """How to read a file. What a kind of file has not, it ignores: an image has no axis.

    fps: frames per second of a video, None for every frame. max_frames: a video's, evenly thinned
    beyond; None for no limit. num_slices: a volume's, the same. axis: the plane that is shown, None for
    a NIfTI's axial and a DICOM series' own. window: intensities that become 0..255; None is the whole
    volume's minimum and maximum, or the window in a DICOM header. volume: which of a NIfTI series.
    released: what the released Hulu-Med loader does, see :func:`model.media.nifti.load`.
    """

    fps: float | None = 1.0
    max_frames: int | None = 128
    num_slices: int | None = 180
    axis: str | None = None
    window: Window | None = None
    volume: int = 0
    released: bool = False


@dataclass(frozen=True)
class Clip:
    """What a file, an array or a list of pictures becomes.

    frames: uint8 ``[T, H, W, C]``, C 1 or 3. kind: ``"image"`` (T 1), ``"video"`` or ``"volume"``.
    form: what it was read from, ``"DICOM"``, ``"NIfTI"``, ``"video"``, ``"image"``, ``"folder"``, ``"array"``.
    times: seconds from the start, one per frame; None where the input has no time axis.
    spacing: mm between slices, rows and columns. plane: of a volume, ``"axial"`` ... where known.
    values: int16 ``[T, H, W, 1]`` before windowing (Hounsfield units for CT), where they fit.
    """

    frames: Pixels
    source: str
    kind: str
    form: str
    times: tuple[float, ...] | None = None
    spacing: tuple[float, float, float] | None = None
    plane: str | None = None
    values: npt.NDArray[np.int16] | None = None

    def take(self, at: Sequence[int] | npt.NDArray[np.int64]) -> Clip:
        """The frames of these numbers. Spacing between slices becomes the mean one."""
        at = np.asarray(at)
        spacing = self.spacing
        if spacing is not None and len(at) > 1:
            spacing = (spacing[0] * float(np.diff(at).mean()), *spacing[1:])
        return replace(
            self,
            frames=self.frames[at],
            times=None if self.times is None else tuple(self.times[t] for t in at),
            spacing=spacing,
            values=None if self.values is None else self.values[at],
        )

    def at_fps(self, fps: float) -> Clip:
        """The frame nearest to every 1 / fps seconds."""
        if self.times is None:
            refuse(self.source, "no frame times", "a video or a DICOM clip for a frame rate")
        return self.take(choose(len(self.frames), self.times, fps, None))


def choose(
    n: int, times: Sequence[float] | npt.NDArray[np.float64] | None, fps: float | None, most: int | None
) -> npt.NDArray[np.int64]:
    """Which of n frames to keep: the nearest to every 1 / fps seconds, evenly thinned beyond ``most``."""
    if fps is None or times is None or n == 1:
        return thin(np.arange(n), most)
    if not fps > 0:
        raise ValueError(f"fps: has {fps}, expected above 0")
    seconds = np.asarray(times) - times[0]
    ticks = seconds[-1] * fps + 1e-6
    if ticks > MAX_TICKS:
        return thin(np.arange(n), most)
    wanted = np.arange(math.floor(ticks) + 1) / fps
    right = np.searchsorted(seconds, wanted).clip(1, n - 1)
    return thin(np.unique(right - (wanted - seconds[right - 1] <= seconds[right] - wanted)), most)


def thin(at: npt.NDArray[np.int64], most: int | None, truncate: bool = False) -> npt.NDArray[np.int64]:
    """``most`` of them, evenly from first to last. ``truncate`` rounds down, as the released loader does."""
    if most is None or len(at) <= most:
        return at
    if most < 1:
        raise ValueError(f"number of frames: has {most}, expected at least 1")
    steps = np.linspace(0, len(at) - 1, most)
    return at[(steps if truncate else steps.round()).astype(int)]


def window_range(window: Window) -> tuple[float, float]:
    """(lo, hi) of a named or explicit window."""
    if isinstance(window, str):
        if window not in WINDOWS:
            raise ValueError(f"window: has {window!r}, expected one of {', '.join(WINDOWS)} or (lo, hi)")
        centre, width = WINDOWS[window]
        return centre - width / 2, centre + width / 2
    lo, hi = (float(x) for x in window)
    if not lo < hi:
        raise ValueError(f"window: has ({lo:g}, {hi:g}), expected lo below hi")
    return lo, hi


def score_windows(windows: Iterable[Window]) -> list[tuple[int, int]]:
    """Windows as :func:`hulukern.pruning.prune_frames` takes them: whole numbers."""
    return [(round(lo), round(hi)) for lo, hi in map(window_range, windows)]


def extent(source: str, values: npt.NDArray[Any], window: Window | None) -> tuple[float, float]:
    """What becomes 0 and 255: the window, or minimum and maximum. Refuses values that are not finite."""
    lo, hi = float(values.min()), float(values.max())
    if not (math.isfinite(lo) and math.isfinite(hi)):
        refuse(source, "NaN or infinite values", "finite ones")
    return (lo, hi) if window is None else window_range(window)


def to_pixels(values: npt.NDArray[Any], lo: float, hi: float) -> Pixels:
    """lo..hi to 0..255, one scale for all of [T, ...]. Nothing but a constant: black."""
    out = np.zeros(values.shape, np.uint8)
    if not hi > lo:
        return out
    most = max(abs(float(x)) for x in (lo, hi, values.min(), values.max()))
    single = most < 1e37 if values.dtype in (np.float16, np.float32) else most <= 1 << 24 and values.dtype.kind in "iu"
    for t, frame in enumerate(values):  # one frame at a time, in float32 where that holds the values
        if single:
            scaled = np.rint((frame.astype(np.float32) - np.float32(lo)) * np.float32(255 / (hi - lo)))
        else:  # halves: the whole of hi - lo may be beyond float64
            scaled = np.rint((frame.astype(np.float64) / 2 - lo / 2) / (hi / 2 - lo / 2) * 255)
        out[t] = np.clip(scaled, 0, 255, out=scaled)
    return out


def to_int16(values: npt.NDArray[Any]) -> npt.NDArray[np.int16] | None:
    """Intensities [T, H, W] as int16 [T, H, W, 1], or None where that would lose more than rounding
    to a unit in a range of hundreds of them."""
    lo, hi = float(values.min()), float(values.max())
    if lo < -32768 or hi > 32767 or (values.dtype.kind == "f" and hi - lo < 255):
        return None
    whole = values if values.dtype.kind != "f" else np.rint(values)
    return whole.astype(np.int16)[..., None]


def refuse(source: str, came: str, expected: str) -> NoReturn:
    raise ValueError(f"{source}: has {' '.join(came.split())}, expected {expected}")


@contextmanager
def reading(source: str, expected: str) -> Iterator[None]:
    """Whatever a decoder throws at a bad file becomes the one-line refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        refuse(source, "more data than memory holds", expected)
    except Exception as error:
        if isinstance(error, ValueError) and ": has " in str(error) and ", expected " in str(error):
            raise
        text = " ".join(str(error).split())
        told = text if len(text) <= MAX_TOLD else text[:MAX_TOLD] + " ..."
        refuse(source, f"content that cannot be read ({type(error).__name__}: {told})", expected)


def check_size(source: str, *sizes: int) -> None:
    """Sizes as the header claims them."""
    shown = " x ".join(map(str, sizes))
    if min(sizes) < 1:
        refuse(source, f"a size of {shown}", "sizes of at least 1")
    if math.prod(sizes) > MAX_PIXELS:
        refuse(source, f"a claimed size of {shown}", f"at most {MAX_PIXELS} values")
