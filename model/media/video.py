"""Video by PyAV: times from the packets first, then only the frames that are kept."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.media.clip import VIDEO, Clip, Pixels, Reading, check_size, choose, reading, refuse

# What a file may be opened as: FFmpeg also knows playlists, which open other files.
CONTAINERS = {"mov": "MP4 or MOV", "matroska": "Matroska or WebM", "avi": "AVI", "mpeg": "MPEG", "mpegts": "MPEG-TS"}
PICTURES = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix")  # brands that share MP4's boxes
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
Ticks = npt.NDArray[np.int64]
HEAD = 352  # bytes that tell the container
MAX_PACKETS = 5_000_000  # a day at 60 frames per second


def container(head: bytes) -> str | None:
    """FFmpeg's name of the container, by its magic."""
    if head[4:8] == b"ftyp":
        return None if head[8:12] in PICTURES else "mov"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime before it had a brand
        return "mov"
    if (head[:4], head[8:12]) == (b"RIFF", b"AVI "):
        return "avi"
    if head[:2] == b"G@" and head[188:189] == b"G":
        return "mpegts"
    return {b"\x1aE\xdf\xa3": "matroska", b"\0\0\1\xba": "mpeg"}.get(head[:4])


def load(path: Path, how: Reading) -> Clip:
    """The frames nearest to every 1 / fps seconds, at most ``max_frames``, RGB, upright, with their times.

    Memory is bounded by the frames that are kept. Between two of them the decoder jumps to the last key
    frame that leads to the next one.
    """
    import av

    source = str(path)
    with reading(source, "a video that decodes"):
        with path.open("rb") as raw:
            form = container(raw.read(HEAD))
        if form is None:
            refuse(source, "no container that is known", ", ".join(CONTAINERS.values()))
        place = str(path.absolute())  # a name cannot be taken for a protocol
        with av.open(place, format=form) as file:
            if not file.streams.video:
                refuse(source, "no video stream", "one")
            stamps, keys, seconds_per_tick = _stamps(source, file)
        times = (stamps - stamps[0]) * seconds_per_tick
        at = choose(len(stamps), times, how.fps, how.max_frames)
        with av.open(place, format=form) as file:
            stream = file.streams.video[0]
            check_size(source, len(at), stream.height, stream.width, 3)
            frames = _decode(source, file, stamps, at, keys)
    # A cut-off file may end before its last packets do.
    return Clip(np.stack(frames), source, VIDEO, "video", tuple(times[at[: len(frames)]].tolist()))


def _stamps(source: str, file: Any) -> tuple[Ticks, Ticks, float]:
    """Presentation times of all frames and of the key frames, in ticks, sorted; nothing is decoded. AVI has times of
    decoding alone, and seeks by them."""
    stream = file.streams.video[0]
    stamps, keys = array("q"), array("q")
    for packet in file.demux(stream):
        if packet.size == 0:
            continue
        time = packet.dts if file.format.name == "avi" else packet.pts
        if time is None:
            refuse(source, "packets without a time", "a container with presentation times")
        stamps.append(time)
        if packet.is_keyframe:
            keys.append(time)
        if len(stamps) > MAX_PACKETS:
            refuse(source, f"more than {MAX_PACKETS} frames", "fewer")
    if not stamps:
        refuse(source, "0 frames", "at least 1")
    return np.sort(np.array(stamps)), np.sort(np.array(keys)), float(stream.time_base)


def _decode(source: str, file: Any, stamps: Ticks, at: Ticks, keys: Ticks) -> list[Pixels]:
    """The first frame at or after each of the wanted times, which are stamps[at]."""
    stream, wanted = file.streams.video[0], stamps[at]
    stream.thread_type = "AUTO"
    # Where frames of an AVI are reordered, the n-th that is shown has the n-th time of decoding, and only counting from
    # the start tells which it is.
    avi = file.format.name == "avi"
    counted = avi and stream.codec_context.has_b_frames
    frames: list[Pixels] = []
    decoded = enumerate(file.decode(stream))
    now = -(1 << 62)

    def following() -> tuple[int | None, Any]:
        n, frame = next(decoded, (0, None))
        if counted:
            return int(stamps[min(n, len(stamps) - 1)]), frame
        return frame and (frame.dts if avi else frame.pts), frame

    while len(frames) < len(wanted):
        before = int(np.searchsorted(keys, wanted[len(frames)], side="right"))
        nearest = int(keys[before - 1]) if before else now
        next_one = int(stamps[min(int(np.searchsorted(stamps, now, side="right")), len(stamps) - 1)])
        if frames and next_one < nearest <= wanted[len(frames)] and not counted:
            file.seek(nearest, stream=stream)
            decoded = enumerate(file.decode(stream))
        pts, frame = following()
        while frame is not None and (pts is None or pts < wanted[len(frames)]):
            pts, frame = following()
        if frame is None or pts is None:
            break
        now = pts
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        if frames and pixels.shape != frames[0].shape:
            refuse(source, "frames of different sizes", "one size")
        check_size(source, len(wanted), *pixels.shape)
        while len(frames) < len(wanted) and wanted[len(frames)] <= now:
            frames.append(pixels)
    if not frames:
        refuse(source, "0 frames that decode", "at least 1")
    return frames
