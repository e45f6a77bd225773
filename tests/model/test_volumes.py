"""Volumes: order, orientation, spacing and intensities of NIfTI and DICOM, and how DICOM says that gray is shown."""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from writers import (
    write_dicom,
    write_enhanced,
    write_nifti,
    write_series,
)

from model.media import clip as limits
from model.media import load_frames

DATA = Path(__file__).parents[1] / "data" / "totalsegmentator"


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
