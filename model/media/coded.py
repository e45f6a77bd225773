"""What the compressed frames of a DICOM file claim, read before any decoder sees them."""

from __future__ import annotations

import re
import struct
from typing import Any

from model.media.clip import refuse

# Start of frame markers by transfer syntax: JPEG baseline to progressive, lossless, JPEG-LS.
JPEG = "1.2.840.10008.1.2.4."
FRAMES = {JPEG + "50": b"\xc0\xc1\xc2", JPEG + "51": b"\xc0\xc1\xc2", JPEG + "57": b"\xc3", JPEG + "70": b"\xc3"}
JPEG_LS = b"\xf7"
FRAMES |= {JPEG + "80": JPEG_LS, JPEG + "81": JPEG_LS}
# The marker that ends a scan: what 0xFF is followed by inside one depends on how its data are stuffed.
AFTER_SCAN, AFTER_LS_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]"), re.compile(rb"\xff[\x80-\xfe]")
Coded = tuple[int, int, int, int]  # rows, columns, components and bits of a compressed frame


def check_coded(source: str, data: Any, frame: int) -> None:
    """What a JPEG, JPEG-LS or JPEG 2000 stream says is what its decoder allocates: it must be what the header says, and
    a stream that says nothing does not reach the decoder."""
    from pydicom.encaps import get_frame
    from pydicom.uid import JPEG2000TransferSyntaxes

    syntax = data.file_meta.TransferSyntaxUID
    if syntax not in FRAMES and syntax not in JPEG2000TransferSyntaxes:
        return
    offsets = None
    if "ExtendedOffsetTable" in data:
        offsets = (data.ExtendedOffsetTable, data.get("ExtendedOffsetTableLengths", b""))
    n = int(data.get("NumberOfFrames") or 1)
    stream = get_frame(data.PixelData, frame, number_of_frames=n, extended_offsets=offsets)
    coded = _coded(stream, FRAMES[syntax]) if syntax in FRAMES else _coded_2000(stream)
    if coded is None:
        refuse(source, f"frame {frame} that is no whole stream", syntax.name)
    claimed = (int(data.Rows), int(data.Columns), int(data.get("SamplesPerPixel", 1)), int(data.BitsAllocated))
    # pydicom fits its buffer to the bits of JPEG-LS and JPEG 2000; others must fill the header's bytes.
    narrow = coded[3] <= 8 < claimed[3] and syntax in FRAMES and FRAMES[syntax] != JPEG_LS
    if coded[:3] != claimed[:3] or not 0 < coded[3] <= claimed[3] or narrow:
        shown = "{}x{}x{} of {} bits"
        refuse(source, f"pixels coded as {shown.format(*coded)}", f"{shown.format(*claimed)} as in the header")


def _coded(stream: bytes, frames: bytes) -> Coded | None:
    """Of a JPEG or JPEG-LS stream: what its start of frame says, which must be one of ``frames``; None unless whole
    segments and scans lead to its end."""
    found: Coded | None = None
    i = 2
    while stream[:2] == b"\xff\xd8" and i + 2 <= len(stream) and stream[i] == 0xFF:
        marker, length = stream[i + 1], int.from_bytes(stream[i + 2 : i + 4])
        if marker == 0xFF:  # a fill byte
            i += 1
            continue
        if marker == 0xD9:
            return found
        if length < 2 or i + 2 + length > len(stream):
            break
        if marker == 0xEE and stream[i + 4 : i + 9] == b"Adobe" and stream[i + 15 : i + 16] not in (b"\0", b"\1"):
            break  # neither RGB nor YCbCr: at that too GDCM ends the process
        if marker in frames and found is None and length >= 8:
            bits, rows, columns, components = struct.unpack(">B2HB", stream[i + 4 : i + 10])
            if length != 8 + 3 * components:
                break
            found = (rows, columns, components, bits)
        elif marker == 0xDA and found is not None:
            after = (AFTER_LS_SCAN if frames == JPEG_LS else AFTER_SCAN).search(stream, i + 2 + length)
            if after is None:  # no end of image, which decoders add
                return found
            i = after.start()
            continue
        elif marker not in (0xC4, 0xCC, 0xDB, 0xDD, 0xF8, 0xFE) and marker & 0xF0 != 0xE0:  # tables, texts
            break
        i += 2 + length
    return None


def _coded_2000(stream: bytes) -> Coded | None:
    """Of a JPEG 2000 stream, in boxes (JP2) or not: what its SIZ says."""
    i = 0
    while stream[4:8] == b"jP  " and stream[i + 4 : i + 8] != b"jp2c":
        length = int.from_bytes(stream[i : i + 4])
        if length < 8 or i + length > len(stream):
            return None
        i += length
    i += 8 if i else 0
    if stream[i : i + 4] != b"\xff\x4f\xff\x51" or len(stream) < i + 45:
        return None
    right, bottom, left, top = struct.unpack(">4I", stream[i + 8 : i + 24])
    (components,) = struct.unpack(">H", stream[i + 40 : i + 42])
    bits = [1 + (depth & 0x7F) for depth in stream[i + 42 : i + 42 + 3 * components : 3]]
    return bottom - top, right - left, components, max(bits, default=0)
