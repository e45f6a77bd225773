"""Files to frames: what each kind becomes, and what is refused with a line that names the file."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import GifImagePlugin, Image
from pydicom.dataset import Dataset
from writers import (
    write_dicom,
    write_encapsulated,
    write_enhanced,
    write_nifti,
    write_series,
    write_video,
)

from model.media import Reading, dicom, from_memory, load_frames
from model.media import clip as limits

DATA = Path(__file__).parents[1] / "data" / "totalsegmentator"


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
    elif kind == "nan" or kind == "nan_in_window":
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
    "empty": "0 bytes", "truncated": "cannot be read", "not_dicom": "no pixels", "no_pixels": "no pixels",
    "claims_frames": "100000", "claims_pixels": "claimed size", "nan": "NaN or infinite",
    "nan_in_window": "NaN or infinite", "infinite": "NaN or infinite",
    "flat": "2 dimensions", "truncated_nifti": "cannot be read", "text": "an unknown type", "bad_png": "cannot be read",
    "bad_video": "no container that is known", "empty_folder": "no images", "mixed_sizes": "size 6x8",
    "missing": "nothing there",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_files_are_refused_by_name_in_one_line(kind: str, tmp_path: Path) -> None:
    path = bad(tmp_path, kind)
    with pytest.raises(ValueError, match=REFUSALS[kind]) as caught:
        load_frames(path, window="bone" if kind == "nan_in_window" else None)
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


# --- volumes ------------------------------------------------------------------------------------------------


def marked(shape: tuple[int, int, int], at: tuple[int, int, int]) -> np.ndarray:
    values = np.zeros(shape, np.int16)
    values[at] = 9
    return values


@pytest.mark.parametrize(
    ("axis", "shape", "mark"),
    [("axial", (7, 6, 5), [6, 0, 0]), ("coronal", (6, 7, 5), [5, 0, 0]), ("sagittal", (5, 7, 6), [4, 0, 0])],
)
def test_planes_show_top_and_right_or_front_where_readers_expect_them(
    axis: str, shape: tuple[int, ...], mark: list[int], tmp_path: Path
) -> None:
    """The voxel at the patient's right, front and head: last slice, upper left corner."""
    clip = load_frames(write_nifti(tmp_path / "a.nii", marked((5, 6, 7), (4, 5, 6))), axis=axis)
    assert clip.frames.shape == (*shape, 1)
    assert np.argwhere(clip.frames[..., 0]).tolist() == [mark]
    assert (clip.kind, clip.plane) == ("volume", axis)


def test_spacing_is_the_headers_and_grows_with_subsampling(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", np.zeros((5, 6, 9), np.int16), np.diag([0.5, 0.7, 2.0, 1]))
    assert load_frames(path).spacing == pytest.approx((2.0, 0.7, 0.5))
    thinned = load_frames(path, num_slices=5)
    assert thinned.frames.shape[0] == 5
    assert thinned.spacing == pytest.approx((4.0, 0.7, 0.5))
    assert load_frames(path, axis="sagittal").spacing == pytest.approx((0.5, 2.0, 0.7))


def test_hounsfield_values_stay_beside_the_window(tmp_path: Path) -> None:
    values = np.linspace(-1000, 3000, 4 * 4 * 4).round().astype(np.int16).reshape(4, 4, 4)
    path = write_nifti(tmp_path / "a.nii", values)
    soft, named = load_frames(path, window=(-150.0, 250.0)), load_frames(path, window="soft_tissue")
    assert (soft.frames == named.frames).all()
    assert soft.values is not None
    assert soft.values.dtype == np.int16
    expected = np.clip(np.rint((soft.values.astype(float) + 150) * 255 / 400), 0, 255)
    assert np.abs(soft.frames - expected).max() <= 1
    with pytest.raises(ValueError, match="has 'liver', expected one of lung"):
        load_frames(path, window="liver")
    with pytest.raises(ValueError, match="lo below hi"):
        load_frames(path, window=(3.0, 3.0))
    with pytest.raises(ValueError, match="has 'oblique', expected one of axial"):
        load_frames(path, axis="oblique")


def test_scaled_integers_and_floats_in_a_small_range(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(27, dtype=np.int16).reshape(3, 3, 3), np.eye(4))
    image.header.set_slope_inter(2, -10)
    nibabel.save(image, tmp_path / "a.nii")
    values = load_frames(tmp_path / "a.nii").values
    expected = nibabel.load(tmp_path / "a.nii").get_fdata()
    assert values is None or np.array_equal(np.sort(values, None), np.sort(expected, None))
    assert load_frames(write_nifti(tmp_path / "b.nii", np.random.default_rng(0).random((3, 3, 3)))).values is None


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("slope", [0.5, -2.0])
def test_what_is_kept_is_scaled_as_if_all_were(slope: float, released: bool, tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(-500, 500, (6, 5, 9)).astype(np.int16)
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(slope, 7)
    nibabel.save(image, tmp_path / "stored.nii")
    write_nifti(tmp_path / "scaled.nii", (stored * np.float32(slope) + np.float32(7)).astype(np.float32))
    got, expected = (load_frames(tmp_path / f"{n}.nii", num_slices=4, released=released) for n in ("stored", "scaled"))
    assert len(got.frames) == 4
    assert (got.frames == expected.frames).all()
    assert got.values is not None
    assert expected.values is not None
    assert (got.values == expected.values).all()


def test_one_volume_of_a_series(tmp_path: Path) -> None:
    values = np.zeros((3, 4, 5, 3), np.int16)
    values[0, 0, 0, 1], values[2, 2, 2, 2] = 7, 8
    for name in ("a.nii", "a.nii.gz"):
        path = write_nifti(tmp_path / name, values)
        assert load_frames(path).frames.max() == 0
        assert np.argwhere(load_frames(path, volume=1).frames[..., 0]).tolist() == [[0, 3, 2]]
        with pytest.raises(ValueError, match="has no volume 3, expected 0 to 2"):
            load_frames(path, volume=3)


def test_the_released_loader(tmp_path: Path) -> None:
    """As stored, each slice by its own extent in float64, cut; slices chosen by rounding down."""
    values = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 8)).astype(np.int16)
    values[:, :, 0] = 3
    path = write_nifti(tmp_path / "a.nii", values, np.diag([-1.0, 1, 1, 1]))
    frames = load_frames(path, released=True, num_slices=5).frames
    kept = np.linspace(0, 7, 5, dtype=int)
    assert frames.shape == (5, 6, 5, 1)
    for frame, k in zip(frames[1:], kept[1:], strict=True):
        x = values[:, :, k].astype(np.float64)
        assert (frame[..., 0] == ((x - x.min()) / (x.max() - x.min()) * 255.0).astype(np.uint8)).all()
    assert frames[0].max() == 0
    windowed = load_frames(path, released=True, window=(-100.0, 100.0), axis="sagittal").frames
    assert windowed.shape == (6, 5, 8, 1)
    assert np.unique(windowed[:, :, 1:]).size > 2


def test_a_series_is_sorted_by_position_and_reformatted(tmp_path: Path) -> None:
    stack = np.arange(5, dtype=np.int16)[:, None, None] * 100 + np.arange(8 * 6, dtype=np.int16).reshape(8, 6)
    clip = load_frames(write_series(tmp_path / "s", stack, RescaleIntercept=-1024, RescaleSlope=1))
    assert clip.values is not None
    assert (clip.values[..., 0] == stack - 1024).all()
    assert (clip.kind, clip.form, clip.plane) == ("volume", "DICOM", "axial")
    assert clip.spacing == (2.0, 0.5, 0.5)
    assert len(load_frames(tmp_path / "s", num_slices=3).frames) == 3
    again = load_frames(tmp_path / "s", axis="axial")  # as acquired, so reformatting changes nothing
    assert (again.frames == clip.frames).all()
    coronal = load_frames(tmp_path / "s", axis="coronal")
    assert coronal.frames.shape == (8, 5, 6, 1)
    assert coronal.spacing == pytest.approx((0.5, 2.0, 0.5))
    assert coronal.values is not None
    assert (coronal.values[-1, 0, :, 0] == stack[-1, 0] - 1024).all()  # last from the front, row from the head


def test_a_series_keeps_its_window_and_its_fractions(tmp_path: Path) -> None:
    stack = np.full((3, 6, 6), 100, np.int16)
    folder = write_series(tmp_path / "s", stack, WindowCenter=100, WindowWidth=400)
    for axis in (None, "axial", "sagittal"):
        assert set(np.unique(load_frames(folder, axis=axis).frames)) == {128}
    inverted = write_series(
        tmp_path / "i", stack, WindowCenter=200, WindowWidth=200, PhotometricInterpretation="MONOCHROME1"
    )
    for axis in (None, "axial"):
        assert set(np.unique(load_frames(inverted, axis=axis).frames)) == {255}
    for k, file in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(file)
        data.RescaleSlope, data.RescaleIntercept = (1, 0) if k == 0 else (0.016, 0)
        del data.WindowCenter, data.WindowWidth
        data.save_as(file)
    assert len(np.unique(load_frames(folder).frames)) == 2  # 1.6 is neither 1 nor 100


def test_a_series_without_positions_goes_by_instance_number(tmp_path: Path) -> None:
    for number, name in ((3, "a"), (1, "b"), (2, "c")):
        write_dicom(tmp_path / name, np.full((4, 4), number, np.uint8), SeriesInstanceUID="1.2", InstanceNumber=number)
    clip = load_frames(tmp_path)
    assert clip.values is not None
    assert clip.values[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert clip.spacing is None
    with pytest.raises(ValueError, match="without positions"):
        load_frames(tmp_path, axis="coronal")


def test_two_phases_under_one_uid_are_no_volume(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((3, 4, 4), np.uint8))
    for file in list(tmp_path.iterdir())[:2]:
        data = pydicom.dcmread(file)
        data.InstanceNumber += 3
        data.save_as(tmp_path / f"later_{file.name}")
    with pytest.raises(ValueError, match="has 5 slices at 3 positions, expected one slice at each"):
        load_frames(tmp_path)


def edited(file: Path, **more: object) -> None:
    """With attributes set, or gone where they are None."""
    data = pydicom.dcmread(file)
    for name, value in more.items():
        if value is None:
            del data[name]
        else:
            setattr(data, name, value)
    data.save_as(file)


def test_slices_in_several_orientations_are_no_volume(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((6, 4, 4), np.uint8))
    for file, turn in zip(
        sorted(tmp_path.iterdir()), 2 * ([1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1], None), strict=True
    ):
        if turn:
            edited(file, ImageOrientationPatient=turn)
    with pytest.raises(ValueError, match="has slices in 3 orientations, expected one"):
        load_frames(tmp_path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "has 0 bytes, expected a slice"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:200]), "has no pixels, expected a DICOM image"),
    "overwritten": (lambda f: f.write_bytes(b"\0" * 300), "expected a"),
    "unplaced": (lambda f: edited(f, ImagePositionPatient=None), "has 1 of 4 slices without a position"),
    "unturned": (lambda f: edited(f, ImageOrientationPatient=None), "has 1 of 4 slices without a position"),
    "study": (lambda f: edited(f, StudyInstanceUID="1.7"), r"has studies None and 1\.7|has studies 1\.7 and None"),
    "patient": (lambda f: edited(f, PatientID="other"), "has 2 patients, expected one PatientID"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_no_slice_of_a_series_is_left_out_in_silence(kind: str, tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((4, 4, 4), np.uint8))
    breaks, message = BROKEN[kind]
    breaks(tmp_path / "0_0")
    with pytest.raises(ValueError, match=message):
        load_frames(tmp_path)


def test_a_slice_without_preamble_belongs_to_its_series_and_other_files_do_not(tmp_path: Path) -> None:
    stack = np.arange(4, dtype=np.int16)[:, None, None] * np.ones((4, 4), np.int16)
    bare = next(write_series(tmp_path, stack).glob("*_2"))
    data = bare.read_bytes()
    bare.write_bytes(data[144 + struct.unpack("<I", data[140:144])[0] :])
    (tmp_path / "notes").write_text("first visit")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "scan.bin").write_bytes(b"\0" * 500)
    directory = write_dicom(tmp_path / "DICOMDIR", np.zeros((4, 4), np.uint8), SOPClassUID="1.2.840.10008.1.3.10")
    edited(directory, Rows=None, Columns=None, PixelData=None)
    write_dicom(tmp_path / "report", np.zeros((4, 4), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    edited(tmp_path / "report", Rows=None, Columns=None, PixelData=None)
    clip = load_frames(tmp_path)
    assert clip.values is not None
    assert clip.values[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_gap_is_refused_only_where_an_even_grid_is_needed(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((6, 4, 4), np.uint8))
    next(tmp_path.glob("*_3")).unlink()
    assert len(load_frames(tmp_path).frames) == 5
    with pytest.raises(ValueError, match="has slices 2 to 4 mm apart, expected even steps for an axis"):
        load_frames(tmp_path, axis="coronal")


def test_some_slices_without_a_number_have_no_order(tmp_path: Path) -> None:
    for k in range(3):
        number = {} if k == 1 else {"InstanceNumber": k + 1}
        write_dicom(tmp_path / str(k), np.full((4, 4), k, np.uint8), SeriesInstanceUID="1.2", **number)
    with pytest.raises(ValueError, match="has 1 of 3 slices without position and InstanceNumber"):
        load_frames(tmp_path)


def test_frames_of_an_enhanced_image_are_rescaled_one_by_one(tmp_path: Path) -> None:
    pixels, slopes = np.full((4, 4, 4), 10, np.int16), [1.0, 2.0, 3.0, 4.0]
    for places in ([[0, 0, 2.0 * k] for k in range(4)], 4 * [[0, 0, 0]]):  # a volume, a clip
        clip = load_frames(write_enhanced(tmp_path / "a.dcm", pixels, places, slopes))
        assert clip.values is not None
        assert clip.values[:, 0, 0, 0].tolist() == [10, 20, 30, 40]
    phases = write_enhanced(tmp_path / "b.dcm", pixels, [[0, 0, 2.0 * (k % 2)] for k in range(4)], slopes)
    with pytest.raises(ValueError, match=r"b\.dcm: has 4 slices at 2 positions, expected one slice at each"):
        load_frames(phases)


def test_two_series_in_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for uid in ("1.2.33", "1.2.44"):
        write_dicom(tmp_path / uid, np.zeros((4, 4), np.uint8), SeriesInstanceUID=uid)
    with pytest.raises(ValueError, match=r"has series 1\.2\.33 and 1\.2\.44, expected one SeriesInstanceUID"):
        load_frames(tmp_path)


def test_a_real_series_of_compressed_slices_without_suffixes() -> None:
    clip = load_frames(DATA / "ct_dicom_series")
    assert clip.frames.shape == (3, 512, 512, 1)
    assert clip.spacing == pytest.approx((2.0, 0.9765625, 0.9765625))
    assert clip.values is not None
    assert clip.values.min() == -1024
    table = clip.frames[:, 400:, :, 0].mean()  # below the patient, who lies on his back
    assert table > clip.frames[:, :100, :, 0].mean()


def test_a_real_volume() -> None:
    clip = load_frames(DATA / "example_ct_sm.nii.gz", window="soft_tissue")
    assert clip.frames.shape == (30, 101, 122, 1)
    assert clip.spacing == pytest.approx((3, 3, 3))


def test_a_decoder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydicom.pixels

    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ValueError, match=r"JPEG 2000.*pip install python-gdcm"):
        load_frames(DATA / "ct_dicom_series")


SYNTAXES = {
    "JPGLosslessP14SV1_1s_1f_8b.dcm": "JPEG lossless", "emri_small_jpeg_ls_lossless.dcm": "JPEG-LS",
    "emri_small_jpeg_2k_lossless.dcm": "JPEG 2000", "emri_small_RLE.dcm": "RLE",
    "color3d_jpeg_baseline.dcm": "JPEG baseline", "OBXXXX1A_expb.dcm": "big endian palette",
}  # fmt: skip


@pytest.mark.parametrize("name", SYNTAXES)
def test_transfer_syntaxes(name: str) -> None:
    files = importlib.metadata.files("pydicom-data") or []
    clip = load_frames(str(next(f for f in files if f.name == name).locate()), fps=None)
    assert clip.frames.std() > 0


def test_an_enhanced_multi_frame_file_is_a_volume_of_equal_slices_in_any_encoding() -> None:
    files = {f.name: str(f.locate()) for f in importlib.metadata.files("pydicom-data") or []}
    plain = load_frames(files["emri_small.dcm"])
    for name in ("emri_small_RLE.dcm", "emri_small_jpeg_ls_lossless.dcm", "emri_small_jpeg_2k_lossless.dcm"):
        assert (load_frames(files[name]).frames == plain.frames).all()


# --- how DICOM says that gray is shown ------------------------------------------------------------------------


def test_padding_is_no_minimum(tmp_path: Path) -> None:
    pixels = np.full((6, 6), -2000, np.int16)
    pixels[1:5, 1:5] = np.arange(16).reshape(4, 4)
    pixels[0, 0] = -1990
    path = write_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    shown = load_frames(path).frames[0, 1:5, 1:5, 0]
    assert shown.ravel().tolist() == [17 * k for k in range(16)]
    folder = write_series(tmp_path / "s", np.stack(2 * [pixels]), PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    for axis in (None, "axial"):
        assert (load_frames(folder, axis=axis).frames[0, 1:5, 1:5, 0] == shown).all()


def test_presentation_and_lookup_tables_and_sigmoid(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    plain = load_frames(write_dicom(tmp_path / "a.dcm", pixels)).frames
    inverse = write_dicom(tmp_path / "b.dcm", pixels, PresentationLUTShape="INVERSE")
    assert (load_frames(inverse).frames == 255 - plain).all()
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [16, 0, 8])
    table.add_new("LUTData", "US", [10 * k for k in range(15, -1, -1)])
    with_table = write_dicom(tmp_path / "c.dcm", pixels, VOILUTSequence=[table])
    assert load_frames(with_table).frames.ravel().tolist() == [10 * k for k in range(15, -1, -1)]
    assert (load_frames(with_table, window=(0.0, 15.0)).frames == plain).all()
    sigmoid = {"WindowCenter": 8, "WindowWidth": 8, "VOILUTFunction": "SIGMOID"}
    curve = np.rint(255 / (1 + np.exp(-4 * (pixels - 8.0) / 8)))
    assert (load_frames(write_dicom(tmp_path / "d.dcm", pixels, **sigmoid)).frames[0, ..., 0] == curve).all()
    folder = write_series(tmp_path / "s", np.stack(2 * [pixels]), **sigmoid)
    assert (load_frames(folder, axis="axial").frames[..., 0] == curve).all()


def test_frame_times_of_zero_are_none(tmp_path: Path) -> None:
    pixels = np.zeros((5, 4, 4), np.uint8)
    clip = load_frames(write_dicom(tmp_path / "a.dcm", pixels, FrameTimeVector=[0.0] * 5))
    assert (len(clip.frames), clip.times) == (5, None)
    timed = write_dicom(tmp_path / "b.dcm", pixels, FrameTimeVector=[0.0] * 5, FrameTime=500.0)
    assert load_frames(timed).times == (0.0, 1.0, 2.0)


def test_wide_numbers_keep_their_levels() -> None:
    far = 2_000_000_000 + np.arange(256, dtype=np.int32).reshape(1, 16, 16)
    assert limits.to_pixels(far, float(far.min()), float(far.max())).ravel().tolist() == list(range(256))
    huge = np.array([[[-1.5e308, 0, 1.5e308]]])
    assert limits.to_pixels(huge, -1.5e308, 1.5e308).ravel().tolist() == [0, 128, 255]
    single = np.array([[[-3e38, 0, 3e38]]], np.float32)
    assert limits.to_pixels(single, -3e38, 3e38).ravel().tolist() == [0, 128, 255]


# --- video, folders, memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["mpeg4", "h264"])
def test_video_frames_and_times(codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", frames=120, rate=10, codec=codec)
    every = load_frames(path, fps=None, max_frames=None)
    assert every.frames.shape == (120, 32, 48, 3)
    for options in ({}, {"fps": 0.5}, {"fps": 3.0}, {"fps": None, "max_frames": 7}, {"fps": 100.0, "max_frames": None}):
        some = load_frames(path, **options)
        assert some.times is not None
        at = [round(10 * t) for t in some.times]
        assert (some.frames == every.frames[at]).all(), options  # whether the decoder jumped or not
    assert load_frames(path).times == pytest.approx(range(12))
    thinned = load_frames(path, fps=10.0, max_frames=5)
    assert thinned.times == pytest.approx([0, 3.0, 6.0, 8.9, 11.9])  # of 120, evenly


@pytest.mark.parametrize("form", ["avi", "mp4", "mkv"])
@pytest.mark.parametrize(("codec", "between"), [("h264", "0"), ("h264", "3"), ("mpeg4", "2")])
def test_reordered_frames_come_as_they_are_shown(codec: str, between: str, form: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"v.{form}", frames=24, rate=8, codec=codec, bf=between, g="8", b_adapt="0")
    for options in ({"fps": None}, {"fps": 2.0}):
        clip = load_frames(path, **options)
        assert clip.times is not None
        shown = [int(x) for x in np.rint(clip.frames[:, 16, 24, 0] / 20)]
        assert shown == [round(8 * t) % 13 for t in clip.times]


def test_a_video_is_known_without_its_suffix(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", frames=10, rate=5).rename(tmp_path / "clip")
    assert load_frames(path).kind == "video"
    Image.new("L", (8, 4)).save(tmp_path / "x.png")
    assert load_frames((tmp_path / "x.png").rename(tmp_path / "picture")).kind == "image"
    volume = write_nifti(tmp_path / "x.nii.gz", np.zeros((3, 3, 3), np.int16)).rename(tmp_path / "volume")
    assert load_frames(volume).form == "NIfTI"


def test_a_truncated_video_gives_what_decodes_or_one_line(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mkv", frames=60, rate=10).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    assert 0 < len(load_frames(tmp_path / "cut.mkv", fps=None).frames) < 60


def test_a_folder_is_thinned_before_it_is_decoded(tmp_path: Path) -> None:
    for k in range(9):
        Image.new("L", (8, 4), 10 * k).save(tmp_path / f"{k}.png")
    (tmp_path / "5.png").write_bytes(b"broken, and not among the kept")
    assert load_frames(tmp_path, max_frames=3).frames[:, 0, 0, 0].tolist() == [0, 40, 80]


def test_an_animation_has_the_times_of_its_frames(tmp_path: Path) -> None:
    pages = [Image.new("L", (8, 4), 40 * k) for k in range(6)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=500)
    clip = load_frames(tmp_path / "a.gif")
    assert clip.kind == "video"
    assert clip.times == (0.0, 1.0, 2.0)
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert load_frames(tmp_path / "a.tif").kind == "volume"


def test_pages_and_folders_of_16_bits_have_one_scale(tmp_path: Path) -> None:
    stack = (np.arange(4, dtype=np.uint16)[:, None, None] + 1) * np.linspace(0, 1000, 64).astype(np.uint16).reshape(
        8, 8
    )
    pages = [Image.fromarray(page) for page in stack]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "f").mkdir()
    for k, page in enumerate(pages):
        page.save(tmp_path / "f" / f"{k}.png")
    for clip in (load_frames(tmp_path / "a.tif"), load_frames(tmp_path / "f")):
        assert clip.frames[:, -1, -1, 0].tolist() == [64, 128, 191, 255]
        assert clip.values is not None
        assert (clip.values[..., 0] == stack).all()
    assert load_frames(tmp_path / "a.tif", window=(0.0, 1000.0)).frames[:, -1, -1, 0].tolist() == 4 * [255]
    Image.new("L", (8, 8)).save(tmp_path / "f" / "4.png")
    with pytest.raises(ValueError, match=r"4\.png: has 8 bits, expected more than 8 bits as 0\.png"):
        load_frames(tmp_path / "f")


@pytest.mark.parametrize("form", ["gif", "webp", "png", "avif"])
def test_animations_are_videos_with_times(form: str, tmp_path: Path) -> None:
    pages = [Image.new("RGB", (16, 16), (40 * k, 40 * k, 40 * k)) for k in range(6)]
    pages[0].save(tmp_path / f"a.{form}", save_all=True, append_images=pages[1:], duration=500)
    clip = load_frames((tmp_path / f"a.{form}").rename(tmp_path / "bare"))  # by content alone
    assert (clip.kind, clip.times) == ("video", (0.0, 1.0, 2.0))
    assert clip.frames[:, 8, 8, 0].tolist() == pytest.approx([0, 80, 160], abs=3)


def test_an_animation_without_durations_keeps_its_frames(tmp_path: Path) -> None:
    pages = [Image.new("L", (8, 4), 40 * k) for k in range(6)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=0)
    clip = load_frames(tmp_path / "a.gif")
    assert (clip.kind, len(clip.frames), clip.times) == ("video", 6, None)


def test_the_first_picture_of_an_mpo_is_the_image(tmp_path: Path) -> None:
    pages = [Image.new("RGB", size, (200, 0, 0)) for size in ((16, 8), (4, 2))]
    pages[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pages[1:])
    assert load_frames(tmp_path / "a.jpg").frames.shape == (1, 8, 16, 3)
    assert load_frames(tmp_path / "a.jpg").kind == "image"


def test_a_gif_is_bounded_before_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.new("L", (64, 64), 40 * k) for k in range(6)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=500)
    drawn: list[int] = []
    advance = GifImagePlugin.GifImageFile.seek

    def seek(self: GifImagePlugin.GifImageFile, k: int) -> None:
        drawn.append(k)
        advance(self, k)

    monkeypatch.setattr(GifImagePlugin.GifImageFile, "seek", seek)
    load_frames(tmp_path / "a.gif", max_frames=2)
    assert [k for k in drawn if k > 0] == [1, 2, 3, 4, 5]  # once each
    drawn.clear()
    monkeypatch.setattr(limits, "MAX_PIXELS", 5 * 64 * 64 * 3)
    with pytest.raises(ValueError, match="has a claimed size of 6 x 64 x 64 x 3"):
        load_frames(tmp_path / "a.gif", max_frames=2)
    assert not any(drawn)


def test_a_turned_video_comes_upright(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mp4", frames=4, rate=4).read_bytes()
    at = whole.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)  # as a phone held upright writes it
    (tmp_path / "turned.mp4").write_bytes(whole[:at] + quarter + whole[at + 36 :])
    plain, turned = (load_frames(tmp_path / f"{name}.mp4", fps=None).frames for name in ("v", "turned"))
    assert turned.shape == (4, 48, 32, 3)
    assert (turned == np.rot90(plain, -1, (1, 2))).all()  # clockwise


@pytest.mark.parametrize("form", ["mp4", "avi", "mkv"])
def test_between_key_frames_nothing_is_decoded(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    path = write_video(tmp_path / f"v.{form}", frames=60, rate=10, codec="mpeg4", g="1")
    every = load_frames(path, fps=None).frames
    decoded: list[object] = []

    class Counted:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def decode(self, stream: object) -> object:
            for frame in self.file.decode(stream):
                decoded.append(frame)
                yield frame

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: Counted(opened(*args, **options)))
    assert (load_frames(path, fps=1.0).frames == every[::10]).all()
    assert len(decoded) < 12


def test_memory_inputs() -> None:
    how = Reading()
    gray = np.zeros((4, 6), np.uint8)
    assert from_memory(gray, "image", how).frames.shape == (1, 4, 6, 1)
    assert from_memory(torch.zeros(3, 4, 6, dtype=torch.uint8), "image", how).frames.shape == (1, 4, 6, 3)
    assert from_memory([gray, gray], "video", how).frames.shape == (2, 4, 6, 1)
    assert from_memory(np.zeros((5, 3, 4, 6), np.uint8), "video", how).frames.shape == (5, 4, 6, 3)
    volume = from_memory(np.linspace(-1000, 1000, 60).reshape(3, 4, 5), "volume", replace(how, window="bone"))
    assert volume.frames.shape == (3, 4, 5, 1)
    for data, kind in ((np.zeros((4, 6, 2), np.uint8), "image"), (gray, "video"), ([], "video")):
        with pytest.raises(ValueError, match=f"{kind} in memory: has .*, expected "):
            from_memory(data, kind, how)


# --- hostile files --------------------------------------------------------------------------------------------


def bomb(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bomb.nii.gz"
    if kind in ("claims", "inflates", "short"):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.int16)
        header.set_data_shape((30_000, 30_000, 30_000) if kind == "claims" else (20, 20, 20))
        header["vox_offset"] = 352
        header["magic"] = b"n+1"
        with gzip.open(path, "wb") as file:
            file.write(header.binaryblock + b"\0" * 4)
            for _ in range({"claims": 1, "inflates": 64, "short": 0}[kind]):
                file.write(b"\0" * (1 << 20))
    elif kind == "zero_axis":
        data = write_nifti(tmp_path / "a.nii", np.zeros((3, 3, 3), np.int16)).read_bytes()
        path = tmp_path / "zero.nii"
        path.write_bytes(data[:44] + b"\0\0" + data[46:])
    elif kind == "picture":
        path = tmp_path / "bomb.png"
        body = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)
    elif kind == "deflated":
        path = write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint8))
        data = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
        start = 144 + struct.unpack("<I", data[140:144])[0]
        meta = bytearray(data[: start + 2])
        place = meta.index(b"1.2.840.10008.1.2.1.99")
        meta[place - 2 : place] = struct.pack("<H", 22)
        meta[140:144] = struct.pack("<I", start - 144 + 2)
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        body = b"".join(deflate.compress(b"\0" * (1 << 20)) for _ in range(40)) + deflate.flush()
        path.write_bytes(bytes(meta) + body)
    return path


@pytest.mark.parametrize(
    ("name", "at"),
    [("emri_small_jpeg_2k_lossless.dcm", b"\xff\x4f\xff\x51"), ("color3d_jpeg_baseline.dcm", b"\xff\xc0")],
)
def test_a_coded_size_beyond_the_headers_is_refused_before_decoding(name: str, at: bytes, tmp_path: Path) -> None:
    files = importlib.metadata.files("pydicom-data") or []
    data = bytearray(next(f for f in files if f.name == name).read_binary())
    place = data.index(at) + (8 if len(at) == 4 else 5)
    data[place : place + 2] = b"\x7f\xff"
    (tmp_path / "a.dcm").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.dcm: has pixels coded as .*, expected .* as in the header"):
        load_frames(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("claims", "claimed size of 30000 x 30000 x 30000"), ("inflates", "more data than its header claims"),
        ("short", "data that cannot be read beyond 0 bytes"), ("zero_axis", "a size of 3 x 0 x 3"),
        ("picture", "claimed size|cannot be read"), ("deflated", "inflates without end"),
    ],
)  # fmt: skip
def test_bombs_cost_no_memory(kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bomb(tmp_path, kind)
    monkeypatch.setattr(limits, "MAX_PIXELS", 1 << 24)
    monkeypatch.setattr(dicom, "MAX_PIXELS", 1 << 24)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            load_frames(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile v.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\nv.mp4\n#EXT-X-ENDLIST\n",
    "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
}


@pytest.mark.parametrize("suffix", ["mp4", "png", "bin"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_leads_to_no_other_and_runs_nothing(kind: str, suffix: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", frames=4, rate=4)
    path = tmp_path / f"list.{suffix}"
    path.write_text(PLAYLISTS[kind])
    with pytest.raises(ValueError, match=r"no container that is known|UnidentifiedImageError|an unknown type"):
        load_frames(path)


LOSSLESS, BASELINE, LS = (
    "JPGLosslessP14SV1_1s_1f_8b.dcm",
    "color3d_jpeg_baseline.dcm",
    "emri_small_jpeg_ls_lossless.dcm",
)
CORRUPT = {  # file, what to find in its first stream, bytes from there on, what they become
    "no marker": (LOSSLESS, b"\xff\xd8", 2, b"\x9f"), "restart": (LOSSLESS, b"\xff\xd8", 3, b"\xd0"),
    "bits": (LOSSLESS, b"\xff\xc3", 4, b"\x0c"), "components": (LOSSLESS, b"\xff\xc3", 9, b"\x03"),
    "other frame": (LOSSLESS, b"\xff\xc3", 1, b"\xc1"), "table": (LOSSLESS, b"\xff\xc4", 0, b"\x5d"),
    "scan": (LOSSLESS, b"\xff\xda", 400, b"\xff\x56"), "baseline": (BASELINE, b"\xff\xd8", 2, b"\x9f"),
    "baseline bits": (BASELINE, b"\xff\xc0", 4, b"\x0c"), "LS bits": (LS, b"\xff\xf7", 4, b"\x9b"),
    "colours": ("SC_rgb_jpeg_gdcm.dcm", b"Adobe", 11, b"\2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_stream_reaches_no_decoder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process."""
    name, found, offset, value = CORRUPT[kind]
    file = next((f.locate() for f in importlib.metadata.files("pydicom-data") or [] if f.name == name), None)
    data = bytearray(Path(str(file or pydicom.data.get_testdata_file(name, download=False))).read_bytes())
    place = data.index(found, data.index(b"\xff\xd8\xff")) + offset
    data[place : place + len(value)] = value
    (tmp_path / "a.dcm").write_bytes(data)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(pydicom.pixels, "iter_pixels", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"has frame 0 that is no whole stream, expected JPEG|has pixels coded as"):
        load_frames(tmp_path / "a.dcm")


def test_a_coded_size_inside_boxes_is_checked(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (8, 8), 77).save(stream, "JPEG2000", no_jp2=False)
    syntax = pydicom.uid.JPEG2000Lossless
    assert load_frames(write_encapsulated(tmp_path / "a.dcm", stream.getvalue(), syntax)).values is not None
    data = bytearray(stream.getvalue())
    place = data.index(b"\xff\x4f\xff\x51")
    data[place + 8 : place + 16] = data[place + 24 : place + 32] = struct.pack(">2I", 30_000, 30_000)
    with pytest.raises(ValueError, match="has pixels coded as 30000x30000x1 of 8 bits, expected 8x8x1 of 8 bits"):
        load_frames(write_encapsulated(tmp_path / "b.dcm", bytes(data), syntax))
    for broken in (stream.getvalue()[:60], b"hello" * 20):
        with pytest.raises(ValueError, match="has frame 0 that is no whole stream, expected JPEG 2000"):
            load_frames(write_encapsulated(tmp_path / "c.dcm", broken, syntax))
