"""NIfTI volumes, and the reformatting of any volume into axial, coronal or sagittal slices."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from model.media.clip import (
    MAX_BYTES,
    MAX_FRAMES,
    VOLUME,
    Clip,
    Pixels,
    Reading,
    check_size,
    extent,
    reading,
    refuse,
    thin,
    to_int16,
    to_pixels,
    window_range,
)

# Of canonical axes (right, anterior, superior): the one that slices are taken along, then rows and
# columns of the picture, which run down and to the right: superior or anterior up, the patient's right
# (sagittal: front) on the left.
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
SLACK = 1 << 20  # bytes after the voxels that a file may pad itself with


def is_nifti(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def load(path: Path, how: Reading) -> Clip:
    """Read a ``.nii`` or ``.nii.gz``.

    The closest canonical orientation, slices from left to right, back to front or foot to head, anterior
    or superior up. With ``released``: axes, order and orientation as stored, every slice scaled by its
    own minimum and maximum (of the window, if one is given) as (x - min) / (max - min) * 255 in float64,
    cut to uint8, a constant slice black; slices chosen by rounding down. That is ``load_nii`` of the
    released processor.
    """
    source = str(path)
    with reading(source, "a whole NIfTI volume"):
        values, scale, affine = _read(path, how.volume)
        check_axis(how.axis)
        if how.released:
            return _released(source, values, scale, affine, how)
        return slices(source, values, affine, how.axis or "axial", how, scale)


def check_axis(axis: str | None) -> None:
    if axis is not None and axis not in PLANES:
        raise ValueError(f"axis: has {axis!r}, expected one of {', '.join(PLANES)}")


@dataclass(frozen=True)
class Scale:
    """From what is stored to intensities, in float32, as the header says; nothing if it says nothing."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if (self.slope, self.intercept) == (1, 0):
            return stored
        return stored * np.float32(self.slope) + np.float32(self.intercept)

    def ends(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The intensities among which all lie."""
        return self(np.array([stored.min(), stored.max()], stored.dtype))


def slices(
    source: str, values: npt.NDArray[Any], affine: npt.NDArray[Any], plane: str, how: Reading, scale: Scale = Scale()
) -> Clip:
    """Slices of values [i, j, k] whose affine leads to mm towards right, anterior, superior. ``values`` are as stored:
    only what is kept is scaled."""
    stack, at, spacing = reformat(source, values, affine, plane, how.num_slices)
    lo, hi = extent(source, scale.ends(stack), how.window)
    chosen = scale(np.ascontiguousarray(stack[at]))
    frames = to_pixels(chosen, lo, hi)[..., None]
    return Clip(frames, source, VOLUME, "NIfTI", spacing=spacing, plane=plane, values=to_int16(chosen))


def reformat(
    source: str, values: npt.NDArray[Any], affine: npt.NDArray[Any], plane: str, most: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], tuple[float, float, float]]:
    """All slices in this plane, a view; which of them to keep; the mm between those, rows and columns."""
    import nibabel

    orientation = nibabel.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        refuse(source, "an orientation that leaves out an axis", "an affine of full rank")
    voxel_mm = np.sqrt((affine[:3, :3] ** 2).sum(0))[np.argsort(orientation[:, 0])]
    canonical = nibabel.orientations.apply_orientation(values, orientation)
    axes = PLANES[plane]
    stack = canonical.transpose(axes)
    stack = stack[:, ::-1, ::-1]  # rows from the top; columns from the patient's right, or front
    at = thin(np.arange(len(stack)), most)
    step = float(np.diff(at).mean()) if len(at) > 1 else 1.0
    return stack, at, (float(voxel_mm[axes[0]]) * step, float(voxel_mm[axes[1]]), float(voxel_mm[axes[2]]))


def _released(source: str, values: npt.NDArray[Any], scale: Scale, affine: npt.NDArray[Any], how: Reading) -> Clip:
    plane = how.axis or "axial"
    axis = PLANES[plane][0]
    stack = np.moveaxis(values, axis, 0)
    at = thin(np.arange(len(stack)), how.num_slices, truncate=True)
    frames: Pixels = np.zeros((len(at), *stack.shape[1:], 1), np.uint8)
    extent(source, scale.ends(values), None)
    for t, k in enumerate(at):
        one = scale(stack[k]).astype(np.float64)
        if how.window is not None:
            one = np.clip(one, *window_range(how.window))
        lo, hi = one.min(), one.max()
        if hi > lo:
            frames[t, :, :, 0] = ((one - lo) / (hi - lo) * 255.0).astype(np.uint8)
    mm = np.sqrt((affine[:3, :3] ** 2).sum(0))
    step = float(np.diff(at).mean()) if len(at) > 1 else 1.0
    rows, columns = (i for i in range(3) if i != axis)
    spacing = (float(mm[axis]) * step, float(mm[rows]), float(mm[columns]))
    return Clip(frames, source, VOLUME, "NIfTI", spacing=spacing, values=to_int16(scale(stack[at])))


def _read(path: Path, volume: int) -> tuple[npt.NDArray[Any], Scale, npt.NDArray[Any]]:
    """One volume [i, j, k] in its stored type, how it is scaled, and the affine.

    Reads exactly what the header claims, once the claim is within bounds: neither a large claim nor a
    stream that inflates without end costs memory.
    """
    import nibabel

    source = str(path)
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if packed else raw as file:
            start = file.read(8)
            header_type = nibabel.Nifti2Header if start[4:8] == b"n+2\0" else nibabel.Nifti1Header
            header: Any = header_type(start + file.read(header_type.template_dtype.itemsize - 8), check=False)
            shape = tuple(int(s) for s in header.get_data_shape())
            while len(shape) > 4 and shape[-1] == 1:  # as some writers leave them
                shape = shape[:-1]
            if len(shape) not in (3, 4):
                refuse(source, f"{len(shape)} dimensions", "a volume (3) or a series of volumes (4)")
            check_size(source, *shape[:3])
            if len(shape) == 4 and shape[3] < 1:
                refuse(source, f"{shape[3]} volumes", "at least 1")
            dtype = header.get_data_dtype()
            if max(shape) > MAX_FRAMES or math.prod(shape[:3]) * dtype.itemsize > MAX_BYTES:
                most = f"sides of at most {MAX_FRAMES} and {MAX_BYTES} bytes"
                refuse(source, f"a claimed size of {' x '.join(map(str, shape))} {dtype}", most)
            if dtype.fields is not None or dtype.kind not in "iuf":
                refuse(source, f"voxels of type {dtype}", "integers or floats")
            n = shape[3] if len(shape) == 4 else 1
            if not 0 <= volume < n:
                refuse(source, f"no volume {volume}", f"0 to {n - 1}")
            voxels = math.prod(shape[:3])
            offset = max(int(header.get_data_offset()), header_type.template_dtype.itemsize)
            skipped = offset - header_type.template_dtype.itemsize + volume * voxels * dtype.itemsize
            data = b"" if _skip(file, skipped) else _take(file, voxels * dtype.itemsize)
            if len(data) < voxels * dtype.itemsize:
                refuse(source, f"data that cannot be read beyond {len(data)} bytes", f"{voxels * dtype.itemsize}")
            rest = (n - 1 - volume) * voxels * dtype.itemsize + SLACK
            if packed and _skip(file, rest) == 0 and file.read(1):
                refuse(source, "more data than its header claims", f"{n * voxels * dtype.itemsize} bytes of voxels")
    values: npt.NDArray[Any] = np.frombuffer(data, dtype).reshape(shape[:3], order="F")
    slope, intercept = header.get_slope_inter()
    scale = Scale() if slope is None else Scale(slope, intercept or 0.0)
    return values, scale, header.get_best_affine()


def _take(file: IO[bytes] | gzip.GzipFile, n: int) -> bytearray:
    """Up to n bytes; memory grows with what comes, not with n."""
    data = bytearray()
    while piece := file.read(min(n - len(data), 1 << 20)):
        data += piece
    return data


def _skip(file: IO[bytes] | gzip.GzipFile, n: int) -> int:
    """Read past n bytes in pieces; how many were missing."""
    while n > 0:
        piece = len(file.read(min(n, 1 << 20)))
        if piece == 0:
            break
        n -= piece
    return n
