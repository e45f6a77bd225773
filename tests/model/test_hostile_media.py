"""Hostile files: refused in one line, in bounded time and memory, and no other file is reached."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from writers import (
    write_dicom,
    write_encapsulated,
    write_nifti,
    write_video,
)

from model.media import clip as limits
from model.media import dicom, load_frames

DATA = Path(__file__).parents[1] / "data" / "totalsegmentator"


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
