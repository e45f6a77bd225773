"""Files to frames: what each kind becomes, and what is refused with a line that names the file."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from model.media import clip as limits
from model.media import load_frames


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


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def test_dicom_rescale_window_and_monochrome1(tmp_path: Path) -> None:
    pixels = np.arange(6 * 8, dtype=np.int16).reshape(6, 8)
    window = {"RescaleSlope": 2, "RescaleIntercept": -10, "WindowCenter": 30, "WindowWidth": 40}
    frames = load_frames(write_dicom(tmp_path / "a.dcm", pixels, **window)).frames
    expected = np.clip(np.rint((pixels * 2 - 10 - 10) * (255 / 40)), 0, 255)
    assert frames.shape == (1, 6, 8, 1)
    assert np.abs(frames[0, :, :, 0] - expected).max() == 0
    white = write_dicom(tmp_path / "b.dcm", pixels, PhotometricInterpretation="MONOCHROME1", **window)
    assert (load_frames(white).frames == 255 - frames).all()
    assert load_frames(write_dicom(tmp_path / "c.dcm", pixels)).frames.max() == 255  # min-max without a window


def test_dicom_clip_has_times(tmp_path: Path) -> None:
    clip = load_frames(write_dicom(tmp_path / "a.dcm", np.zeros((9, 4, 4), np.uint8), FrameTime=250.0), fps=None)
    assert clip.frames.shape == (9, 4, 4, 1)
    assert clip.times == tuple(0.25 * k for k in range(9))
    assert len(clip.at_fps(1.0).frames) == 3
    assert len(clip.at_fps(100.0).frames) == 9


def test_nifti_is_turned_upright_whatever_its_storage_order(tmp_path: Path) -> None:
    """A mark at the patient's right, front and head ends up on the picture's left, top and last slice."""
    values = np.zeros((5, 6, 7), np.float32)
    values[4, 5, 6] = 9  # canonical: x to the right, y to the front, z to the head
    upright = load_frames(write_nifti(tmp_path / "a.nii.gz", values)).frames
    assert upright.shape == (7, 6, 5, 1)
    assert np.argwhere(upright[..., 0]).tolist() == [[6, 0, 0]]
    turned = write_nifti(tmp_path / "b.nii.gz", values[::-1, ::-1].transpose(1, 2, 0).copy(),
                         np.array([[0, 0, -1, 4], [-1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 0, 1]], float))  # fmt: skip
    assert (load_frames(turned).frames == upright).all()


def test_nifti_is_scaled_as_a_whole(tmp_path: Path) -> None:
    values = np.stack([np.full((4, 4), v, np.int16) for v in (-100, 0, 100)], -1)
    frames = load_frames(write_nifti(tmp_path / "a.nii", values)).frames
    assert [int(f[0, 0, 0]) for f in frames] == [0, 128, 255]


def test_a_folder_in_name_order_and_a_video(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        Image.new("L", (8, 4), 50 * i).save(tmp_path / f"f{i}.png")
    frames = load_frames(tmp_path).frames
    assert frames.shape == (3, 4, 8, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 50, 100]
    clip = load_frames(write_video(tmp_path / "v.mp4", frames=10, rate=5), fps=None)
    assert clip.frames.shape == (10, 32, 48, 3)
    assert clip.times == pytest.approx([0.2 * k for k in range(10)])
    assert len(load_frames(tmp_path / "v.mp4").frames) == 2


def write_video(path: Path, frames: int, rate: int) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            array = np.full((32, 48, 3), 20 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def bad(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.dcm"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        whole = write_dicom(tmp_path / "whole.dcm", np.zeros((40, 40), np.uint8)).read_bytes()
        path.write_bytes(whole[: len(whole) - 900])
    elif kind == "not_dicom":
        path.write_bytes(b"hello world" * 40)
    elif kind == "no_pixels":
        write_dicom(path, np.zeros((4, 4), np.uint8))
        data = pydicom.dcmread(path)
        del data.Rows, data.PixelData
        data.save_as(path)
    elif kind == "claims_frames":
        write_dicom(path, np.zeros((4, 4), np.uint8), NumberOfFrames=100_000)
    elif kind == "claims_pixels":
        write_dicom(path, np.zeros((4, 4), np.uint8), Rows=65000, Columns=65000)
    elif kind == "nan":
        path = write_nifti(tmp_path / "nan.nii", np.full((3, 3, 3), np.nan, np.float32))
    elif kind == "infinite":
        path = write_nifti(tmp_path / "inf.nii", np.full((3, 3, 3), np.inf, np.float32))
    elif kind == "flat":
        path = write_nifti(tmp_path / "flat.nii", np.zeros((3, 3), np.int16))
    elif kind == "truncated_nifti":
        whole = write_nifti(tmp_path / "whole.nii.gz", np.random.default_rng(0).random((20, 20, 20))).read_bytes()
        path = tmp_path / "cut.nii.gz"
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path = tmp_path / "notes.txt"
        path.write_text("hello")
    elif kind == "bad_png":
        path = tmp_path / "a.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    elif kind == "bad_video":
        path = tmp_path / "a.mp4"
        path.write_bytes(b"\0" * 500)
    elif kind == "empty_folder":
        path = tmp_path / "folder"
        path.mkdir()
    elif kind == "mixed_sizes":
        path = tmp_path / "folder"
        path.mkdir()
        Image.new("L", (8, 4)).save(path / "a.png")
        Image.new("L", (8, 6)).save(path / "b.png")
    elif kind == "missing":
        path = tmp_path / "none.dcm"
    return path


REFUSALS = {
    "empty": "0 bytes", "truncated": "cannot be read", "not_dicom": "cannot be read", "no_pixels": "no pixels",
    "claims_frames": "100000", "claims_pixels": "claimed size", "nan": "NaN or infinite", "infinite": "NaN or infinite",
    "flat": "2 dimensions", "truncated_nifti": "cannot be read", "text": "an unknown type", "bad_png": "cannot be read",
    "bad_video": "cannot be read", "empty_folder": "no images", "mixed_sizes": "size 6x8", "missing": "nothing there",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_files_are_refused_by_name_in_one_line(kind: str, tmp_path: Path) -> None:
    path = bad(tmp_path, kind)
    with pytest.raises(ValueError, match=REFUSALS[kind]) as caught:
        load_frames(path)
    text = str(caught.value)
    assert str(path) in text
    assert ", expected " in text
    assert "\n" not in text


def test_a_video_is_bounded_by_what_it_decodes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 4 * 32 * 48 * 3)
    path = write_video(tmp_path / "v.mp4", frames=10, rate=5)
    with pytest.raises(ValueError, match="at most"):
        load_frames(path, fps=None)
    assert len(load_frames(path, fps=None, max_frames=4).frames) == 4
