"""Suites of checks: each compares what users get with the best peer, and says whether its target was met."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

EXAMPLES = """examples:
  python -m bench run --suite cpu --json cpu.json    CPU kernels and encoder against torch and transformers
  python -m bench run --suite cpu --json a.json --only attention --seconds 30

exit codes: 0 done, 1 implementations disagree, 2 bad arguments
"""
SUITES = {"cpu": "bench.cpu"}  # name -> module with main(path, only, seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=list(SUITES), required=True)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--only", default="", metavar="TEXT", help="checks whose name holds this")
    parser.add_argument("--seconds", type=float, default=90.0, help="measuring time, about (default: 90)")


def run(options: argparse.Namespace) -> int:
    if not options.seconds > 0:
        raise ValueError(f"--seconds: has {options.seconds}, expected above 0")
    return int(importlib.import_module(SUITES[options.suite]).main(options.json, options.only, options.seconds))
