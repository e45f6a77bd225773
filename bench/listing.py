"""What can be measured here: ops, cases, bytes, FLOPs, which backends and peers run, or why not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

import hulukern
from bench.baselines import BASELINES
from hulukern.backends import BACKENDS, runs_on, unavailable
from hulukern.spec import Op
from hulukern.testing import harness
from hulukern.validation import dtype_name

EXAMPLES = """examples:
  python -m bench list
  python -m bench list --op rope_attention --json

exit codes: 0 done, 2 bad arguments
"""


def entries(ops: list[str]) -> Iterator[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ops or list(hulukern.OPS):
        op = hulukern.OPS[name].spec
        dtype = op.main_dtype
        for case in op.perf_cases:
            cost = op.cost(harness.sample(op, case, dtype, "cpu"))
            yield {
                "op": name, "case": case.name, "dtype": dtype_name(dtype), "bytes": cost.bytes, "flops": cost.flops,
                "backends": {b: why_not(op, b, device) or "runs" for b in BACKENDS},
                "peers": {p.name: p.absent(device) or "runs" for p in BASELINES if name in p.ops},
            }  # fmt: skip


def why_not(op: Op, backend: str, device: str) -> str:
    """Why a backend cannot run an op on a device's tensors; empty when it can."""
    if backend not in op.backends:
        return op.absent.get(backend, "not written yet")
    return unavailable(backend) or ("" if runs_on(backend, device) else f"takes no {device} tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], choices=list(hulukern.OPS), metavar="OP")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    found = list(entries(options.op))
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for e in found:
        runs, peers = (", ".join(n for n, state in e[k].items() if state == "runs") for k in ("backends", "peers"))
        size = f"{e['bytes'] / 1e6:9.2f} MB {e['flops'] / 1e9:10.3f} GFLOP"
        print(f"{e['op']:<26} {e['case']:<24} {e['dtype']:<10} {size}  {runs} against {peers or 'nobody'}")
    states = [item for e in found for k in ("backends", "peers") for item in e[k].items()]
    for reason in sorted({f"{name}: {state}" for name, state in states if state != "runs"}):
        print(f"  {reason}")
    return 0
