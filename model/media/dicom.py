"""DICOM: single images, clips, and series of slices in a folder, decoded through pydicom."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from model.media.coded import check_coded
from model.media.nifti import check_axis, reformat

DECODERS = "python-gdcm"  # the package whose plugin decodes lossless JPEG and JPEG-LS; Pillow does the others
SUFFIXES = (".dcm", ".dicom", ".ima")
SAME_TURN = 0.01  # by which direction cosines of parallel slices may differ
UNEVEN = 0.2  # of a step: slices may be that much nearer or further than most, positions are rounded


def is_dicom(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def may_be_slice(path: Path, head: bytes) -> bool:
    """Whether a file beside DICOM files is one too, perhaps broken: what no name and no text says otherwise."""
    if path.suffix.lower() in SUFFIXES:
        return True
    named = path.suffix[1:2].isalpha() or path.name in ("DICOMDIR", "LOCKFILE")
    return is_dicom(head) if named else not head or b"\0" in head


def load(path: Path, how: Reading) -> Clip:
    """One file: an image; several frames are a video, or a volume where they have positions."""
    source = str(path)
    with reading(source, "a whole DICOM file with pixels"):
        check_axis(how.axis)
        data = _open(path)
        n = _check_header(source, data)
        members = [_Slice(data, k) for k in range(n)]
        if n > 1 and (placed := _in_order(source, members)):
            return _volume(source, placed, how)
        times = _times(data, n)
        at = choose(n, times, how.fps, how.max_frames)
        pixels = list(_decode(source, data, at))
        if pixels[0].ndim == 3:
            top = 255 if pixels[0].dtype == np.uint8 else (1 << int(data.BitsStored)) - 1
            clip = Clip(to_pixels(np.stack(pixels), 0, top), source, VIDEO, "DICOM")
        else:
            values, ends = _stack(((data, int(k), one) for k, one in zip(at, pixels, strict=True)), len(at))
            frames = _shown(source, data, ends, how)(values)
            clip = Clip(frames, source, VIDEO, "DICOM", values=to_int16(values))
        chosen = None if times is None else tuple(times[k] - times[0] for k in at)
        spacing = members[0].spacing
        mm = None if spacing is None else (0.0, *spacing)
        return replace(clip, kind=IMAGE if n == 1 else VIDEO, times=chosen, spacing=mm)


def load_series(path: Path, files: Sequence[Path], how: Reading) -> Clip:
    """A folder's series, sorted by position along the slice normal, or by InstanceNumber without positions.

    In the plane and orientation that it was acquired in, unless ``how.axis`` names one. Nothing is left out but what
    says that it is no image: a report, a presentation state.
    """
    source = str(path)
    if len(files) > MAX_FRAMES:
        refuse(source, f"{len(files)} files", f"at most {MAX_FRAMES}")
    members: list[_Slice] = []
    check_axis(how.axis)
    for file in files:
        with reading(str(file), "a whole DICOM file with pixels"):
            if file.stat().st_size == 0:
                refuse(str(file), "0 bytes", "a slice of its series")
            data = _open(file, stop_before_pixels=True)
            if "Rows" in data:
                members.append(_Slice(data, 0, file))
            elif not _no_image(data):
                refuse(str(file), "no pixels", "a DICOM image, or another object that says which")
    if not members:
        refuse(source, "no DICOM images", "a series of slices")
    for keyword, many in (("SeriesInstanceUID", "series"), ("StudyInstanceUID", "studies"), ("PatientID", "patients")):
        found = list(dict.fromkeys(str(one.data.get(keyword)) for one in members))
        if len(found) > 1:
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            named = f"{many} {found[0]} and {found[1]}{more}"
            refuse(source, f"{len(found)} patients" if many == "patients" else named, f"one {keyword}")
    if len(members) == 1 and members[0].file is not None:
        return load(members[0].file, how)
    for one in members:
        n = _check_header(str(one.file), one.data)
        if n > 1:
            refuse(str(one.file), f"{n} frames beside other files of its series", "one")
        if one.size != members[0].size:
            refuse(str(one.file), f"size {'x'.join(map(str, one.size))}", f"{'x'.join(map(str, members[0].size))}")
    if (placed := _in_order(source, members)) is None:
        numbers = [one.data.get("InstanceNumber") for one in members]
        numbered = [one for one, number in zip(members, numbers, strict=True) if number is not None]
        if 0 < len(numbered) < len(members):
            missing = f"{len(members) - len(numbered)} of {len(members)} slices without position and InstanceNumber"
            refuse(source, missing, "one of them in every slice")
        placed = sorted(members, key=lambda one: int(one.data.InstanceNumber)) if numbered else members
    return _volume(source, placed, how)


def _no_image(data: Any) -> bool:
    """A whole object of a class that has no pixels: a report, a presentation state, a directory."""
    import pydicom

    known = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    return known is not None and known in pydicom.uid.UID_dictionary and "Image Storage" not in known.name


def _in_order(source: str, members: Sequence[_Slice]) -> list[_Slice] | None:
    """Sorted by position along the slice normal; None where there are no positions, or one for all.

    Refuses what is no volume: slices in several orientations, several at a position, some without any.
    """
    placed = sum(one.axes is not None and one.position is not None for one in members)
    if 0 < placed < len(members):
        came = f"{len(members) - placed} of {len(members)} slices without a position"
        refuse(source, came, "ImagePositionPatient and ImageOrientationPatient in every slice")
    turns: list[npt.NDArray[np.float64]] = []
    for one in members:
        if one.axes is not None and not any(np.abs(one.axes - turn).max() < SAME_TURN for turn in turns):
            turns.append(one.axes)
    if len(turns) > 1:
        refuse(source, f"slices in {len(turns)} orientations", "one")
    positions = len({one.depth for one in members})
    if 1 < positions < len(members):  # phases or echoes under one UID: in no order are they one volume
        refuse(source, f"{len(members)} slices at {positions} positions", "one slice at each")
    return sorted(members, key=lambda one: one.depth) if positions == len(members) else None


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

    def parts() -> Iterator[tuple[Any, int, npt.NDArray[Any]]]:
        for k in at:
            one = members[k]
            name = source if one.file is None else str(one.file)
            with reading(name, "a whole DICOM file with pixels"):
                data = one.data if one.file is None else _open(one.file)
                pixels = next(_decode(name, data, [one.frame]))
                if pixels.ndim != 2:
                    refuse(name, "colour pixels", "gray slices of a volume")
            yield data, one.frame, pixels

    stack, ends = _stack(parts(), len(at))
    spacing, plane = _spacing(members), _plane(members[0])
    show = _shown(source, members[at[len(at) // 2]].data, ends, how)
    if how.axis is not None:
        affine, plane = _affine(source, members, spacing), how.axis
        turned, at, spacing = reformat(source, stack.transpose(2, 1, 0), affine, plane, how.num_slices)
        stack = np.ascontiguousarray(turned[at])
    elif spacing is not None and len(at) > 1:
        spacing = (spacing[0] * float(np.diff(at).mean()), *spacing[1:])
    return Clip(show(stack), source, VOLUME, "DICOM", spacing=spacing, plane=plane, values=to_int16(stack))


def _stack(
    parts: Iterable[tuple[Any, int, npt.NDArray[Any]]], n: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """The values [n, H, W] of stored (data set, frame, pixels), and their minimum and maximum but for padding."""
    stack: npt.NDArray[Any] | None = None
    ends = []
    for t, (data, frame, pixels) in enumerate(parts):
        values = _rescale(data, pixels, frame)
        if stack is None:
            stack = np.empty((n, *values.shape), values.dtype)
        elif values.dtype.kind == "f" and stack.dtype.kind != "f":  # slopes may differ between slices
            stack = stack.astype(values.dtype)
        stack[t] = values
        if (scanned := _scanned(data, pixels, values)).size:
            ends += [float(scanned.min()), float(scanned.max())]
    assert stack is not None
    return stack, np.array(ends or [0.0])


def _scanned(data: Any, pixels: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values but for those of pixels that fill the image up around what was scanned."""
    first = data.get("PixelPaddingValue")
    if not isinstance(first, int) or pixels.dtype.kind not in "iu":
        return values
    last = data.get("PixelPaddingRangeLimit")
    limits = np.array([first, first if last is None else int(last)])
    lo, hi = sorted(limits.astype(pixels.dtype))  # some write a negative number as unsigned
    return np.asarray(values[(pixels < lo) | (pixels > hi)])


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


def _affine(
    source: str, members: Sequence[_Slice], spacing: tuple[float, float, float] | None
) -> npt.NDArray[np.float64]:
    """Of (column, row, slice) to mm right, anterior, superior; DICOM's axes are left, posterior, superior."""
    first = members[0]
    if first.position is None or first.axes is None or spacing is None or not spacing[0] > 0:
        refuse(source, "slices without positions", "ImagePositionPatient in every slice for an axis")
    steps = np.diff([one.depth for one in members])
    if (np.abs(steps - spacing[0]) > UNEVEN * spacing[0]).any():
        refuse(source, f"slices {steps.min():g} to {steps.max():g} mm apart", "even steps for an axis")
    right, down = first.axes[:3], first.axes[3:]
    out = np.eye(4)
    out[:3, 0], out[:3, 1], out[:3, 2] = right * spacing[2], down * spacing[1], np.cross(right, down) * spacing[0]
    out[:3, 3] = first.position
    out[:2] *= -1
    return out


def _shown(source: str, data: Any, ends: npt.NDArray[np.float64], how: Reading) -> Callable[[npt.NDArray[Any]], Pixels]:
    """From gray values [T, H, W] to pixels: by the window asked for, or the header's first lookup table or window, or
    min-max over all."""
    from pydicom.pixels import apply_voi

    window = how.window or _header_window(data)
    lo, hi = extent(source, ends, window)
    table = how.window is None and data.get("VOILUTSequence")
    sigmoid = _functional(data, 0, "FrameVOILUTSequence", "VOILUTFunction") == "SIGMOID" and how.window is None

    def show(values: npt.NDArray[Any]) -> Pixels:
        if table:
            looked = apply_voi(values if values.dtype.kind in "iu" else np.rint(values).astype(np.int32), data)
            frames = to_pixels(looked, 0, (1 << int(table[0].LUTDescriptor[2])) - 1)
        elif sigmoid and window is not None:
            frames = np.empty(values.shape, np.uint8)
            for t, frame in enumerate(values):  # lo and hi are centre -+ width / 2
                frames[t] = np.rint(127.5 + 127.5 * np.tanh((frame - (lo + hi) / 2) / (hi - lo) * 2))
        else:
            frames = to_pixels(values, lo, hi)
        if data.PhotometricInterpretation == "MONOCHROME1" or data.get("PresentationLUTShape") == "INVERSE":
            np.subtract(255, frames, out=frames)
        return frames[..., None]

    return show


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
    from pydicom.pixels import apply_color_lut, get_decoder
    from pydicom.uid import JPEG2000TransferSyntaxes

    if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        refuse(source, "no pixels", "a DICOM image")
    syntax, plugins = data.file_meta.TransferSyntaxUID, [""]
    if syntax.is_encapsulated:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            refuse(source, f"pixels compressed as {syntax.name}", "a transfer syntax of still images")
        if not decoder.is_available:
            refuse(source, f"pixels compressed as {syntax.name}", f"a decoder for them: pip install {DECODERS}")
        # GDCM ends the process at some bad streams, Pillow never; but Pillow refuses some JPEG 2000 that others read.
        plugins = sorted(decoder.available_plugins, reverse=True)[: 2 if syntax in JPEG2000TransferSyntaxes else 1]
        for k in at:
            check_coded(source, data, int(k))
    palette = data.PhotometricInterpretation == "PALETTE COLOR"
    for k in at:
        pixels = _pixels(data, int(k), plugins)
        if palette:
            pixels = apply_color_lut(pixels, data)
            if pixels.max() > 255:  # some writers fill 16-bit tables with 8-bit values
                pixels = pixels >> 8
            pixels = pixels.astype(np.uint8)
        yield pixels


def _pixels(data: Any, frame: int, plugins: Sequence[str]) -> npt.NDArray[Any]:
    """By the first plugin that can; YBR comes as RGB."""
    from pydicom.pixels import pixel_array

    for plugin in plugins[:-1]:
        with contextlib.suppress(RuntimeError):
            return pixel_array(data, index=frame, decoding_plugin=plugin)
    return pixel_array(data, index=frame, decoding_plugin=plugins[-1])


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
        times = np.cumsum([float(ms) for ms in steps]) / 1000
        if np.isfinite(times).all() and (np.diff(times) > 0).all():  # some leave it filled with zeros
            return tuple(times.tolist())
    rate = data.get("CineRate") or data.get("RecommendedDisplayFrameRate")
    ms = float(data.get("FrameTime") or (1000 / float(rate) if rate else 0))
    return tuple(k * ms / 1000 for k in range(n)) if ms > 0 and math.isfinite(ms) else None


def _functional(data: Any, frame: int, group: str, keyword: str) -> Any:
    """An attribute of a frame's or the shared functional groups of an enhanced image, or of any image."""
    for where, k in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = data.get(where)
        if groups and k < len(groups) and groups[k].get(group):
            value = groups[k][group][0].get(keyword)
            if value is not None:
                return value
    return data.get(keyword)


def _numbers(value: Any, n: int) -> npt.NDArray[np.float64] | None:
    """At least n finite numbers, the first n of them, or None."""
    if value is None or value == "":
        return None
    many = [value] if not hasattr(value, "__len__") else list(value)
    numbers = np.array([float(x) for x in many[:n]])
    return numbers if len(numbers) == n and np.isfinite(numbers).all() else None
