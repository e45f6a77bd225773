"""Suites: each measures what users get in turns with the best peers, correct first, and writes one results file."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from bench.results import stored_path

EXAMPLES = """examples:
  python -m bench run --suite ops                    every op and dtype against every peer, in turns
  python -m bench run --suite ops --op rope_attention --dtype bfloat16 --backend cpu --json a.json
  python -m bench run --suite ops --json a.json --resume             goes on where it was interrupted
  python -m bench run --suite cpu --json cpu.json    CPU kernels and encoder against torch and transformers
  python -m bench run --suite cpu --json a.json --only attention --seconds 30
  python -m bench run --suite gpu                    encoder at full depth, training step, reduction with a 7B
  python -m bench run --suite e2e                    the 55 % tracker, as python -m bench e2e does it

exit codes: 0 done, 1 implementations disagree, 2 bad arguments, a file that is not the suite's, or interrupted
"""
SECONDS = {"quick": 24.0, "cpu": 90.0, "gpu": 60.0, "ops": 120.0, "e2e": 20.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=list(SECONDS), required=True)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (default: bench/results/DEVICE/SUITE-COMMIT.json)"
    )
    default = ", ".join(f"{name} {seconds:g}" for name, seconds in SECONDS.items())
    parser.add_argument("--seconds", type=float, help=f"measuring time, about (default: {default} per input)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cpu, gpu: steps whose name holds this")
    for name in ("op", "case", "dtype", "backend"):
        parser.add_argument(f"--{name}", action="append", default=[], help="ops: only this; may be repeated")
    parser.add_argument("--baseline", action="append", default=[], help="ops: only this peer; none for none")
    parser.add_argument("--limit", type=float, metavar="S", help="ops: begin nothing after so many seconds")
    parser.add_argument("--warm", action="store_true", help="ops: a GPU's caches may hold the inputs")
    parser.add_argument("--resume", action="store_true", help="ops: go on with the file of an interrupted run")


def run(options: argparse.Namespace) -> int:
    seconds = SECONDS[options.suite] if options.seconds is None else options.seconds
    if not seconds > 0:
        raise ValueError(f"--seconds: has {seconds}, expected above 0")
    path = options.json or stored_path(options.suite)
    filters = (options.op, options.case, options.dtype, options.backend, options.baseline)
    if options.suite != "ops" and (any(filters) or options.resume or options.warm or options.limit is not None):
        raise ValueError(
            f"--suite: has {options.suite!r}, expected ops with --op … --baseline, --limit, --warm, --resume"
        )
    if options.only and options.suite not in ("cpu", "gpu"):
        raise ValueError(f"--suite: has {options.suite!r}, expected cpu or gpu with --only")
    limit_s = float("inf") if options.limit is None else options.limit
    if not limit_s > 0:
        raise ValueError(f"--limit: has {options.limit}, expected above 0")
    if options.suite == "ops":
        from bench import ops
        from bench.contenders import Filter

        return ops.main(path, Filter(*filters), seconds, options.resume, options.warm, limit_s)
    if options.suite in ("cpu", "gpu"):
        suite = importlib.import_module(f"bench.{options.suite}")
        return int(suite.main(path, options.only, seconds))
    from bench.__main__ import main

    where = ["--json", str(path), *(["--out", str(path.parent)] if options.suite == "quick" else [])]
    return main([options.suite, *where, "--seconds", str(seconds)])
