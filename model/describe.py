"""What the processor makes of files: kind, size, spacing, frames, grid, and tokens under each pruning rule."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from hulukern.pruning import RULES, prune_frames
from model.image_processor import HuluMedImageProcessor
from model.media import IMAGE, WINDOWS, Clip, Reading, Window, load_frames
from model.media.nifti import PLANES
from model.pictures import captioned, contact_sheet, stack
from model.sizing import resize_frames

EXAMPLES = """examples:
  python -m model describe scan.nii.gz
  python -m model describe chest.nii.gz --window lung --axis coronal --out sheet.png
  python -m model describe liver.nii.gz --window=-100:200
  python -m model describe echo.dcm --fps all --rule previous --rule bounded
  python -m model describe series_folder/ video.mp4 xray.dcm --json

exit codes: 0 done, 2 bad input or arguments
"""

KEEP = 0.45  # of the tokens, for rule budget
SLOW_S = 2.0  # what takes longer says so


@dataclass(frozen=True)
class Kept:
    """What one rule leaves of a file's tokens."""

    rule: str
    tokens: int
    reduction: float


@dataclass(frozen=True)
class Description:
    """One file. size: rows and columns as stored; spacing in mm between frames' slices, rows, columns;
    grid: frames and patches down and across; times: seconds of the first and the last frame."""

    file: str
    form: str
    kind: str
    plane: str | None
    frames: int
    size: tuple[int, int]
    spacing_mm: tuple[float, float, float] | None
    times_s: tuple[float, float] | None
    values: tuple[int, int] | None
    resized: tuple[int, int]
    grid: tuple[int, int, int]
    merge_size: int
    tokens: int
    rules: list[Kept]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="DICOM, NIfTI, video, image, or a folder of them")
    parser.add_argument("--out", type=Path, metavar="PNG", help="also write a contact sheet, dropped cells red")
    parser.add_argument("--rule", action="append", choices=list(RULES), help="may be repeated (default: all)")
    parser.add_argument("--fps", type=_fps, default=1.0, help="frames per second of a clip, or all (default: 1)")
    parser.add_argument("--axis", choices=list(PLANES), help="plane of a volume (default: axial, or as acquired)")
    parser.add_argument(
        "--window", type=_window, metavar="NAME|LO:HI", help=f"{', '.join(WINDOWS)}, or LO:HI; --window=-100:200"
    )
    parser.add_argument("--released", action="store_true", help="read and resize as the released code does")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    how = Reading(fps=options.fps, axis=options.axis, window=options.window, released=options.released)
    rules = options.rule or list(RULES)
    if options.out is not None and not options.out.parent.is_dir():
        raise ValueError(f"{options.out}: has no folder {options.out.parent}, expected one that exists")
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise ValueError(f"{options.out}: has another ending, expected .png")
    if options.out is not None and options.out.is_dir():
        raise ValueError(f"{options.out}: has a folder there, expected a file name")
    found, sheets = [], []
    for file in options.files:
        description, pictures = describe(file, how, rules)
        found.append(description)
        sheets += pictures
        if not options.json:
            print(text(description) + "\n")
    if options.json:
        print(json.dumps([asdict(d) for d in found], indent=2))
    if options.out is not None:
        whole = io.BytesIO()
        stack(sheets).save(whole, "PNG")
        options.out.write_bytes(whole.getvalue())
        print(options.out, file=sys.stderr if options.json else sys.stdout)
    return 0


def describe(file: str, how: Reading, rules: Sequence[str]) -> tuple[Description, list[Image.Image]]:
    """The description, and one contact sheet per rule."""
    processor = HuluMedImageProcessor(released=how.released)
    with _telling(f"reading {file}"):
        clip = load_frames(file, how)
        merge = 1 if clip.kind == IMAGE else 2
        ((height, width),) = processor.sizes([clip], [merge])
        frames = torch.from_numpy(resize_frames(clip, (height, width)))
    cell = processor.patch_size * merge
    kept, sheets = [], []
    for rule in rules:
        with _telling(f"{rule} on {file}"):
            keep = KEEP if rule == "budget" else None
            pruned = prune_frames(frames, rule=rule, merge_size=merge, keep=keep)
        kept.append(Kept(rule, int(pruned.keep.sum()), pruned.reduction))
        caption = f"{Path(file).name}: {rule}, {kept[-1].tokens} of {pruned.keep.numel()} tokens"
        sheets.append(captioned(contact_sheet(frames, pruned.keep, cell), caption))
    return _described(file, clip, (height, width), processor.patch_size, merge, kept), sheets


def _described(
    file: str, clip: Clip, resized: tuple[int, int], patch: int, merge: int, kept: list[Kept]
) -> Description:  # fmt: skip
    T, H, W, _ = clip.frames.shape
    grid = (T, resized[0] // patch, resized[1] // patch)
    values = clip.values
    return Description(
        file, clip.form, clip.kind, clip.plane, T, (H, W), clip.spacing,
        None if clip.times is None else (clip.times[0], clip.times[-1]),
        None if values is None else (int(values.min()), int(values.max())),
        resized, grid, merge, math.prod(grid) // merge**2, kept,
    )  # fmt: skip


def text(d: Description) -> str:
    frames = "slices" if d.kind == "volume" else "frames"
    size = f"{d.size[0]}x{d.size[1]}"
    lines = [f"{d.file}: {d.plane + ' ' if d.plane else ''}{d.kind}, {d.form}"]
    lines.append(f"  {'read':<10} {size if d.kind == IMAGE else f'{d.frames} {frames} of {size}'}")
    if d.spacing_mm is not None:
        between, row, column = d.spacing_mm
        lines.append(
            f"  {'spacing':<10} {row:.3g} x {column:.3g} mm" + (f", {between:.3g} mm apart" if between else "")
        )
    if d.times_s is not None:
        lines.append(f"  {'times':<10} {d.times_s[0]:.1f} .. {d.times_s[1]:.1f} s")
    if d.values is not None:
        lines.append(f"  {'values':<10} {d.values[0]} .. {d.values[1]}")
    lines.append(
        f"  {'resized':<10} {d.resized[0]}x{d.resized[1]}, grid {' x '.join(map(str, d.grid))}, merge {d.merge_size}"
    )
    lines.append(f"  {'tokens':<10} {d.tokens}")
    lines += [f"    {k.rule:<12} {k.tokens:>6}  {100 * k.reduction:5.1f} % dropped" for k in d.rules]
    return "\n".join(lines)


def _fps(given: str) -> float | None:
    if given == "all":
        return None
    try:
        fps = float(given)
    except ValueError:
        fps = 0.0
    if not (fps > 0 and math.isfinite(fps)):
        raise argparse.ArgumentTypeError(f"has {given}, expected a number above 0, or all")
    return fps


def _window(given: str) -> Window:
    if given in WINDOWS:
        return given
    try:
        lo, hi = (float(x) for x in given.split(":"))
    except ValueError:
        lo = hi = 0.0
    if not lo < hi:
        raise argparse.ArgumentTypeError(f"has {given}, expected {', '.join(WINDOWS)}, or LO:HI with LO below HI")
    return lo, hi


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Says what goes on, on stderr, once it takes longer than :data:`SLOW_S`."""
    timer = threading.Timer(SLOW_S, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
