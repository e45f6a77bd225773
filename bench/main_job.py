"""The main job: what each pruning rule removes on real medical input, what that costs, how fast each op is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m bench quick                          bench/out/quick.json and report.html
  python -m bench quick --input scan.nii.gz      your own DICOM, NIfTI, video, image or folder of images too
  python -m bench quick --seconds 10 --out /tmp/b

exit codes: 0 done, 1 implementations disagree, 2 bad input or arguments
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", action="append", default=[], metavar="FILE", help="a file or folder of your own")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="default: bench/out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: quick.json in it")
    parser.add_argument("--seconds", type=float, default=24.0, help="measuring time, about (default: 24)")
    parser.add_argument("--max-frames", type=int, default=64, help="of one input, evenly chosen (default: 64)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="also write one contact sheet")


def run(options: argparse.Namespace) -> int:
    if not options.seconds > 0 or options.max_frames < 1:
        raise ValueError("--seconds and --max-frames: have values not above 0, expected above 0")
    from rich.console import Console

    from bench import report
    from bench.agreement import Disagreement
    from bench.quick import Quick, read_inputs
    from bench.results import write_results, write_text
    from bench.timing import keep_freed_memory

    # Where output goes to a file, rows stay whole; a terminal wraps what it cannot show.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    inputs = read_inputs(options.input, options.max_frames)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out}: has a file there, expected a folder for the results")
    options.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is said before measuring
    kept = keep_freed_memory()
    job = Quick(inputs, options.seconds, console)
    try:
        job.run()
    except Disagreement as error:
        print(f"bench quick: {error}", file=sys.stderr)
        return 1
    target = options.json or options.out / "quick.json"
    write_results(target, job.rows, job.checks, freed_memory_kept=kept, **job.extra())
    write_text(options.out / "report.html", report.html([target]))
    if options.picture is not None:
        report.save_picture(options.picture, job.inputs[0], job.masks)
    report.print_tables(console, target)
    console.print(f"\n{target}\n{options.out / 'report.html'}")
    return 0
