"""Small files of every kind, for the tests of the readers."""

from __future__ import annotations

from pathlib import Path

import av
import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage


def write_dicom(path: Path, pixels: np.ndarray, **more: object) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    data.Rows, data.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        data.NumberOfFrames = pixels.shape[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in more.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def write_encapsulated(path: Path, stream: bytes, syntax: str, size: tuple[int, int] = (8, 8)) -> Path:
    """One gray 8-bit frame, compressed as ``stream``."""
    data = pydicom.dcmread(write_dicom(path, np.zeros(size, np.uint8)))
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    data.save_as(path)
    return path


def write_enhanced(path: Path, pixels: np.ndarray, positions: list[list[float]], slopes: list[float]) -> Path:
    """A multi-frame image whose axial frames have a position and a rescale slope each."""
    groups = []
    for position, slope in zip(positions, slopes, strict=True):
        group, place, turn, rescale = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, turn.ImageOrientationPatient = position, [1, 0, 0, 0, 1, 0]
        rescale.RescaleSlope, rescale.RescaleIntercept = slope, 0
        group.PlanePositionSequence, group.PlaneOrientationSequence = [place], [turn]
        group.PixelValueTransformationSequence = [rescale]
        groups.append(group)
    return write_dicom(path, pixels, PerFrameFunctionalGroupsSequence=groups)


def write_series(folder: Path, stack: np.ndarray, **more: object) -> Path:
    """Axial slices [k, rows, columns], 2 mm apart, pixels of 0.5 mm, in files whose names are in no order."""
    folder.mkdir(exist_ok=True)
    for k, pixels in enumerate(stack):
        write_dicom(
            folder / f"{(7 * k) % len(stack)}_{k}", pixels, SeriesInstanceUID="1.2.9", InstanceNumber=k + 1,
            ImagePositionPatient=[-3, -4, 2 * k], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[0.5, 0.5],
            **more,
        )  # fmt: skip
    return folder


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def write_video(path: Path, frames: int, rate: int, codec: str = "mpeg4", **options: str) -> Path:
    """32x48, frame k is gray 20 * k (up to 240)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = options
        for k in range(frames):
            array = np.full((32, 48, 3), 20 * (k % 13), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
