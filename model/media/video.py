"""Video by PyAV: times from the packets first, then only the frames that are kept."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.media.clip import VIDEO, Clip, Pixels, Reading, check_size, choose, reading, refuse

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
Ticks = npt.NDArray[np.int64]
MAX_PACKETS = 5_000_000  # a day at 60 frames per second


def is_video(head: bytes) -> bool:
    """By the container's magic: MP4 and MOV, Matroska and WebM, AVI, MPEG."""
    magic = (b"\x1aE\xdf\xa3", b"\0\0\1\xba")
    return head[4:8] == b"ftyp" or head[:4] in magic or (head[:4], head[8:12]) == (b"RIFF", b"AVI ")


def load(path: Path, how: Reading) -> Clip:
    """The frames nearest to every 1 / fps seconds, at most ``max_frames``, RGB, with their times.

    Memory is bounded by the frames that are kept. Between two of them the decoder jumps to the last key
    frame that leads to the next one.
    """
    import av

    source = str(path)
    with reading(source, "a video that decodes"):
        with av.open(source) as container:
            if not container.streams.video:
                refuse(source, "no video stream", "one")
            stamps, keys, seconds_per_tick = _stamps(source, container)
        times = (stamps - stamps[0]) * seconds_per_tick
        at = choose(len(stamps), times, how.fps, how.max_frames)
        with av.open(source) as container:
            stream = container.streams.video[0]
            check_size(source, len(at), stream.height, stream.width, 3)
            frames = _decode(source, container, stamps, at, keys)
    # A cut-off file may end before its last packets do.
    return Clip(np.stack(frames), source, VIDEO, "video", tuple(times[at[: len(frames)]].tolist()))


def _stamps(source: str, container: Any) -> tuple[Ticks, Ticks, float]:
    """Presentation times of all frames and of the key frames, in ticks, sorted; nothing is decoded."""
    stream = container.streams.video[0]
    stamps, keys = array("q"), array("q")
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.pts is None:
            refuse(source, "packets without a time", "a container with presentation times")
        stamps.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        if len(stamps) > MAX_PACKETS:
            refuse(source, f"more than {MAX_PACKETS} frames", "fewer")
    if not stamps:
        refuse(source, "0 frames", "at least 1")
    return np.sort(np.array(stamps)), np.sort(np.array(keys)), float(stream.time_base)


def _decode(source: str, container: Any, stamps: Ticks, at: Ticks, keys: Ticks) -> list[Pixels]:
    """The first frame at or after each of the wanted times, which are stamps[at]."""
    stream, wanted = container.streams.video[0], stamps[at]
    stream.thread_type = "AUTO"
    # AVI has times of decoding alone. Where frames are reordered, the n-th that is shown has the n-th of them, and only
    # counting from the start tells which it is.
    counted = container.format.name == "avi" and stream.codec_context.has_b_frames
    frames: list[Pixels] = []
    decoded = enumerate(container.decode(stream))
    now = -(1 << 62)

    def following() -> tuple[int | None, Any]:
        n, frame = next(decoded, (0, None))
        return (int(stamps[min(n, len(stamps) - 1)]) if counted else frame and frame.pts), frame

    while len(frames) < len(wanted):
        before = int(np.searchsorted(keys, wanted[len(frames)], side="right"))
        nearest = int(keys[before - 1]) if before else now
        if frames and now < nearest < wanted[len(frames)] and not counted:
            container.seek(nearest, stream=stream)
            decoded = enumerate(container.decode(stream))
        pts, frame = following()
        while frame is not None and (pts is None or pts < wanted[len(frames)]):
            pts, frame = following()
        if frame is None or pts is None:
            break
        now = pts
        pixels = frame.to_ndarray(format="rgb24")
        if frames and pixels.shape != frames[0].shape:
            refuse(source, "frames of different sizes", "one size")
        check_size(source, len(wanted), *pixels.shape)
        while len(frames) < len(wanted) and wanted[len(frames)] <= now:
            frames.append(pixels)
    if not frames:
        refuse(source, "0 frames that decode", "at least 1")
    return frames
