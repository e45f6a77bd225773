"""Files to frames: what each kind becomes, and what is refused with a line that names the file."""

from __future__ import annotations

import gzip
import importlib.metadata
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from writers import write_dicom, write_nifti, write_series, write_video

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
    "bad_video": "cannot be read", "empty_folder": "no images", "mixed_sizes": "size 6x8", "missing": "nothing there",
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
