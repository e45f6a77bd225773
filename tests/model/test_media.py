"""Files to frames: what each kind becomes, and what is refused with a line that names the file."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import GifImagePlugin, Image
from writers import (
    write_dicom,
    write_nifti,
    write_video,
)

from model.media import Reading, from_memory, load_frames
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
