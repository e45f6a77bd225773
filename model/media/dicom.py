"""DICOM: single images, clips, and series of slices in a folder, decoded through pydicom."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.media.clip import (
    IMAGE,
    MAX_FRAMES,
    MAX_PIXELS,
    VIDEO,
    VOLUME,
    Clip,
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
from model.media.nifti import check_axis, slices

DECODERS = "python-gdcm"  # the package whose plugin decodes JPEG, lossless JPEG, JPEG 2000 and JPEG-LS


def is_dicom(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def load(path: Path, how: Reading) -> Clip:
    """One file: an image; several frames are a video, or a volume where they have positions."""
    source = str(path)
    with reading(source, "a whole DICOM file with pixels"):
        check_axis(how.axis)
        data = _open(path)
        n = _check_header(source, data)
        frames_info = [_Slice(data, k) for k in range(n)]
        placed = n > 1 and all(s.position is not None for s in frames_info)
        if placed and len({s.depth for s in frames_info}) == n:
            order = np.array(sorted(range(n), key=lambda k: frames_info[k].depth))
            return _volume(source, [frames_info[k] for k in order], how)
        times = _times(data, n)
        at = choose(n, times, how.fps, how.max_frames)
        pixels = np.stack(list(_decode(source, data, at)))
        if pixels.ndim == 4:
            top = 255 if pixels.dtype == np.uint8 else (1 << int(data.BitsStored)) - 1
            clip = Clip(to_pixels(pixels, 0, top), source, VIDEO, "DICOM")
        else:
            values = _rescale(data, pixels, 0)
            clip = _window(source, Clip(np.empty(0, np.uint8), source, VIDEO, "DICOM"), data, values, how)
        chosen = None if times is None else tuple(times[k] - times[0] for k in at)
        spacing = frames_info[0].spacing
        mm = None if spacing is None else (0.0, *spacing)
        return replace(clip, kind=IMAGE if n == 1 else VIDEO, times=chosen, spacing=mm)


def load_series(path: Path, files: Sequence[Path], how: Reading) -> Clip:
    """A folder's series, sorted by position along the slice normal, or by InstanceNumber without positions.

    In the plane and orientation that it was acquired in, unless ``how.axis`` names one.
    """
    source = str(path)
    if len(files) > MAX_FRAMES:
        refuse(source, f"{len(files)} files", f"at most {MAX_FRAMES}")
    found: dict[str, list[_Slice]] = {}
    check_axis(how.axis)
    for file in files:
        with reading(str(file), "a whole DICOM file with pixels"):
            data = _open(file, stop_before_pixels=True)
            if "Rows" in data:
                found.setdefault(str(data.get("SeriesInstanceUID")), []).append(_Slice(data, 0, file))
    if not found:
        refuse(source, "no DICOM images", "a series of slices")
    if len(found) > 1:
        first, second = list(found)[:2]
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        refuse(source, f"series {first} and {second}{more}", "one SeriesInstanceUID")
    (members,) = found.values()
    if len(members) == 1 and members[0].file is not None:
        return load(members[0].file, how)
    for one in members:
        n = _check_header(str(one.file), one.data)
        if n > 1:
            refuse(str(one.file), f"{n} frames beside other files of its series", "one")
        if one.size != members[0].size:
            refuse(str(one.file), f"size {'x'.join(map(str, one.size))}", f"{'x'.join(map(str, members[0].size))}")
    positions = len({one.depth for one in members})
    if positions == len(members):
        members.sort(key=lambda one: one.depth)
    elif positions > 1:  # phases or echoes under one UID: in no order are they one volume
        refuse(source, f"{len(members)} slices at {positions} positions", "one slice at each")
    else:
        members.sort(key=lambda one: int(one.data.get("InstanceNumber") or 0))
    return _volume(source, members, how)


class _Slice:
    """Where one slice lies: a file of a series, or a frame of an enhanced multi-frame file."""

    def __init__(self, data: Any, frame: int, file: Path | None = None) -> None:
        self.data, self.frame, self.file = data, frame, file
        self.size = (int(data.Rows), int(data.Columns))
        self.position = _numbers(_functional(data, frame, "PlanePositionSequence", "ImagePositionPatient"), 3)
        self.axes = _numbers(_functional(data, frame, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
        spacing = _functional(data, frame, "PixelMeasuresSequence", "PixelSpacing") or data.get("ImagerPixelSpacing")
        self.spacing: tuple[float, float] | None = None
        if (mm := _numbers(spacing, 2)) is not None and (mm > 0).all():
            self.spacing = (float(mm[0]), float(mm[1]))

    @property
    def depth(self) -> float:
        """mm along the slice normal; without a position the same for all."""
        if self.position is None or self.axes is None:
            return 0.0
        return round(float(self.position @ np.cross(self.axes[:3], self.axes[3:])), 4)


def _volume(source: str, members: Sequence[_Slice], how: Reading) -> Clip:
    at = np.arange(len(members)) if how.axis else thin(np.arange(len(members)), how.num_slices)
    height, width = members[0].size
    check_size(source, len(at), height, width, 1)
    stack: npt.NDArray[Any] | None = None
    for t, k in enumerate(at):
        one = members[k]
        name = source if one.file is None else str(one.file)
        with reading(name, "a whole DICOM file with pixels"):
            data = one.data if one.file is None else _open(one.file)
            pixels = next(_decode(name, data, [one.frame]))
            if pixels.ndim != 2:
                refuse(name, "colour pixels", "gray slices of a volume")
            values = _rescale(data, pixels, one.frame)
            if stack is None:
                stack = np.empty((len(at), *values.shape), values.dtype)
            elif values.dtype.kind == "f" and stack.dtype.kind != "f":  # slopes may differ between slices
                stack = stack.astype(values.dtype)
            stack[t] = values
    assert stack is not None
    spacing = _spacing(members)
    first, middle = members[0], members[at[len(at) // 2]].data
    if how.axis is not None:
        if first.position is None or first.axes is None or spacing is None or not spacing[0] > 0:
            refuse(source, "slices without positions", "ImagePositionPatient in every slice for an axis")
        how = replace(how, window=how.window or _header_window(middle))
        clip = slices(source, stack.transpose(2, 1, 0), _affine(first, spacing), how.axis or "axial", how)
        frames = 255 - clip.frames if middle.PhotometricInterpretation == "MONOCHROME1" else clip.frames
        return replace(clip, frames=frames, form="DICOM")
    step = float(np.diff(at).mean()) if len(at) > 1 else 1.0
    if spacing is not None:
        spacing = (spacing[0] * step, *spacing[1:])
    empty = Clip(np.empty(0, np.uint8), source, VOLUME, "DICOM", spacing=spacing, plane=_plane(first))
    return _window(source, empty, middle, stack, how)


def _spacing(members: Sequence[_Slice]) -> tuple[float, float, float] | None:
    if members[0].spacing is None:
        return None
    steps = np.diff([one.depth for one in members])
    return (float(np.median(steps)) if len(steps) else 0.0, *members[0].spacing)


def _plane(one: _Slice) -> str | None:
    """The plane nearest to the one that was acquired."""
    if one.axes is None:
        return None
    return ("sagittal", "coronal", "axial")[int(np.abs(np.cross(one.axes[:3], one.axes[3:])).argmax())]


def _affine(one: _Slice, spacing: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Of (column, row, slice) to mm right, anterior, superior; DICOM's axes are left, posterior, superior."""
    assert one.axes is not None
    assert one.position is not None
    right, down = one.axes[:3], one.axes[3:]
    out = np.eye(4)
    out[:3, 0], out[:3, 1], out[:3, 2] = right * spacing[2], down * spacing[1], np.cross(right, down) * spacing[0]
    out[:3, 3] = one.position
    out[:2] *= -1
    return out


def _window(source: str, clip: Clip, data: Any, values: npt.NDArray[Any], how: Reading) -> Clip:
    """Gray values [T, H, W] as pixels: the window asked for, the header's first, or min-max over all."""
    lo, hi = extent(source, values, how.window or _header_window(data))
    frames = to_pixels(values, lo, hi)[..., None]
    if data.PhotometricInterpretation == "MONOCHROME1":
        np.subtract(255, frames, out=frames)
    return replace(clip, frames=frames, values=to_int16(values))


def _header_window(data: Any) -> tuple[float, float] | None:
    """(lo, hi) of the header's first window, of the image or its first frame."""
    centre = _numbers(_functional(data, 0, "FrameVOILUTSequence", "WindowCenter"), 1)
    width = _numbers(_functional(data, 0, "FrameVOILUTSequence", "WindowWidth"), 1)
    if centre is None or width is None or not width[0] > 0:
        return None
    return float(centre[0] - width[0] / 2), float(centre[0] + width[0] / 2)


def _check_header(source: str, data: Any) -> int:
    """The number of frames, once the header's claims are within bounds."""
    if "Rows" not in data or "Columns" not in data:
        refuse(source, "no pixels", "a DICOM image")
    n = int(data.get("NumberOfFrames") or 1)
    if n > MAX_FRAMES:
        refuse(source, f"{n} claimed frames", f"at most {MAX_FRAMES}")
    check_size(source, n, int(data.Rows), int(data.Columns), int(data.get("SamplesPerPixel", 1)))
    return n


def _open(path: Path, **options: Any) -> Any:
    """The data set; one without the preamble and meta header too, as old archives hold them."""
    import pydicom

    _check_deflated(path)
    data = pydicom.dcmread(path, force=True, **options)
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
    return data


def _check_deflated(path: Path) -> None:
    """A deflated file is inflated as a whole by whoever opens it: count first, in pieces."""
    import pydicom

    with path.open("rb") as file:
        if not is_dicom(file.read(132)):
            return
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return
        file.seek(144 + int(meta.FileMetaInformationGroupLength))  # preamble, DICM and the length element itself
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := inflate.unconsumed_tail or file.read(1 << 16):
            total += len(inflate.decompress(piece, 1 << 20))
            if total > MAX_PIXELS:
                refuse(str(path), "a stream that inflates without end", f"at most {MAX_PIXELS} bytes")


def _decode(source: str, data: Any, at: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
    """The frames of these numbers, [H, W] or RGB [H, W, 3], one in memory at a time."""
    from pydicom.pixels import apply_color_lut, get_decoder, iter_pixels

    if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        refuse(source, "no pixels", "a DICOM image")
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        try:
            able = get_decoder(syntax).is_available
        except NotImplementedError:
            refuse(source, f"pixels compressed as {syntax.name}", "a transfer syntax of still images")
        if not able:
            refuse(source, f"pixels compressed as {syntax.name}", f"a decoder for them: pip install {DECODERS}")
        for k in at:
            _check_coded_size(source, data, int(k))
    palette = data.PhotometricInterpretation == "PALETTE COLOR"
    for pixels in iter_pixels(data, indices=[int(k) for k in at]):  # YBR comes as RGB
        if palette:
            pixels = apply_color_lut(pixels, data)
            if pixels.max() > 255:  # some writers fill 16-bit tables with 8-bit values
                pixels = pixels >> 8
            pixels = pixels.astype(np.uint8)
        yield pixels


def _check_coded_size(source: str, data: Any, frame: int) -> None:
    """The size in a JPEG or JPEG 2000 stream is what its decoder allocates: it must be the header's."""
    from pydicom.encaps import get_frame

    stream = get_frame(data.PixelData, frame, number_of_frames=int(data.get("NumberOfFrames") or 1))
    size = _coded_size(stream)
    if size is not None and size != (data.Rows, data.Columns):
        refuse(source, f"pixels coded as {size[0]}x{size[1]}", f"{data.Rows}x{data.Columns} as in the header")


def _coded_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG 2000 (SIZ), JPEG or JPEG-LS (start of frame) stream; None for others."""
    if stream[:4] == b"\xff\x4f\xff\x51" and len(stream) >= 24:
        right, bottom, left, top = struct.unpack(">4I", stream[8:24])
        return bottom - top, right - left
    if stream[:2] != b"\xff\xd8":
        return None
    i = 2
    while i + 9 <= len(stream) and stream[i] == 0xFF:
        marker, length = stream[i + 1], 2 + int.from_bytes(stream[i + 2 : i + 4])
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack(">2H", stream[i + 5 : i + 9])
            return rows, columns
        i += 1 if marker == 0xFF else length  # 0xFF: a fill byte
    return None


def _rescale(data: Any, pixels: npt.NDArray[Any], frame: int) -> npt.NDArray[Any]:
    """Stored values to modality units (Hounsfield units for CT); integers stay integers where they can."""
    from pydicom.pixels import apply_modality_lut

    if "ModalityLUTSequence" in data:
        return np.asarray(apply_modality_lut(pixels, data))
    slope = _functional(data, frame, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _functional(data, frame, "PixelValueTransformationSequence", "RescaleIntercept")
    slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
    whole = slope.is_integer() and intercept.is_integer() and pixels.itemsize <= 2
    if whole and abs(slope) * (1 << 16) + abs(intercept) < 1 << 31:
        return pixels.astype(np.int32) * np.int32(slope) + np.int32(intercept)
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _times(data: Any, n: int) -> tuple[float, ...] | None:
    """Seconds of each frame from the header: FrameTimeVector or FrameTime (ms), or a rate."""
    if n == 1:
        return None
    steps = data.get("FrameTimeVector")
    if steps is not None and len(steps) == n:
        return tuple(float(t) for t in np.cumsum([float(ms) for ms in steps]) / 1000)
    rate = data.get("CineRate") or data.get("RecommendedDisplayFrameRate")
    ms = float(data.get("FrameTime") or (1000 / float(rate) if rate else 0))
    return tuple(k * ms / 1000 for k in range(n)) if ms > 0 and math.isfinite(ms) else None


def _functional(data: Any, frame: int, group: str, keyword: str) -> Any:
    """An attribute of the image, or of a frame's or the shared functional groups of an enhanced one."""
    if keyword in data:
        return data[keyword].value
    for where, k in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = data.get(where)
        if groups and k < len(groups) and groups[k].get(group):
            value = groups[k][group][0].get(keyword)
            if value is not None:
                return value
    return None


def _numbers(value: Any, n: int) -> npt.NDArray[np.float64] | None:
    """At least n finite numbers, the first n of them, or None."""
    if value is None or value == "":
        return None
    many = [value] if not hasattr(value, "__len__") else list(value)
    numbers = np.array([float(x) for x in many[:n]])
    return numbers if len(numbers) == n and np.isfinite(numbers).all() else None
