"""``python -m bench``: the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m bench quick                          the main job: bench/out/quick.json and report.html
  python -m bench quick --input scan.nii.gz      your own DICOM, NIfTI, video, image or folder of images too
  python -m bench quick --seconds 10 --out /tmp/b
  python -m bench run --suite cpu --json cpu.json   the CPU kernels and the encoder against torch and transformers
  python -m bench device --help                  on a machine with a GPU

exit codes: 0 done, 1 implementations disagree, 2 bad input or arguments
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["device"]:
        from bench import device

        return device.main(arguments[1:])
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    quick = commands.add_parser("quick", help="the main job on real input", epilog=EXAMPLES, formatter_class=raw)
    quick.add_argument("--input", action="append", default=[], metavar="FILE", help="a file or folder of your own")
    quick.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="default: bench/out")
    quick.add_argument("--seconds", type=float, default=24.0, help="measuring time, about (default: 24)")
    quick.add_argument("--max-frames", type=int, default=64, help="of one input, evenly chosen (default: 64)")
    quick.add_argument("--picture", type=Path, metavar="PNG", help="also write one contact sheet")
    run = commands.add_parser("run", help="a suite of checks, as JSON", formatter_class=raw)
    run.add_argument("--suite", choices=["cpu"], required=True)
    run.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the results go")
    run.add_argument("--only", default="", metavar="TEXT", help="checks whose name holds this")
    run.add_argument("--seconds", type=float, default=90.0, help="measuring time, about (default: 90)")
    commands.add_parser("device", help="everything that needs a GPU", add_help=False)
    options = parser.parse_args(arguments)
    if not options.seconds > 0 or getattr(options, "max_frames", 1) < 1:
        print("bench: --seconds and --max-frames have values not above 0, expected above 0", file=sys.stderr)
        return 2
    if options.command == "run":
        from bench import cpu

        return cpu.main(options.json, options.only, options.seconds)
    return _quick(options)


def _quick(options: argparse.Namespace) -> int:
    from rich.console import Console

    from bench import report
    from bench.quick import Disagreement, Quick, read_inputs
    from bench.results import write_results, write_text

    # Where output goes to a file, rows stay whole; a terminal wraps what it cannot show.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    try:
        inputs = read_inputs(options.input, options.max_frames)
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"{options.out}: has a file there, expected a folder for the results")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    job = Quick(inputs, options.seconds, console)
    try:
        job.run()
    except Disagreement as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    target = options.out / "quick.json"
    write_results(target, job.rows, job.checks, **job.extra())
    write_text(options.out / "report.html", report.html(target, job.inputs, job.masks))
    if options.picture is not None:
        report.save_picture(options.picture, job.inputs[0], job.masks)
    report.print_tables(console, target)
    console.print(f"\n{target}\n{options.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
