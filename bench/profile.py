"""Where an op's time goes: a trace for a viewer, the longest kernels in words, and ncu's sections where it is there."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import hulukern
from bench.listing import why_not
from bench.results import write_text
from hulukern.backends import BACKENDS
from hulukern.testing import harness
from hulukern.validation import dtype_name

EXAMPLES = """examples:
  python -m bench profile rope_attention
  python -m bench profile token_score --backend triton --case clip_32x36x36 --out prof/

exit codes: 0 done, 2 bad arguments, or a backend that cannot run here
"""
CALLS = 20
# Time against the ceilings, what memory and caches moved, why warps waited, how many there were.
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=list(hulukern.OPS), metavar="OP", help="see python -m bench list")
    parser.add_argument("--case", help="a performance case (default: the first)")
    parser.add_argument("--backend", choices=BACKENDS, help="default: by device")
    parser.add_argument("--out", type=Path, default=Path("bench/out/profile"), metavar="DIR")


def run(options: argparse.Namespace) -> int:
    op, device = hulukern.OPS[options.op].spec, "cuda" if torch.cuda.is_available() else "cpu"
    cases = {case.name: case for case in (*op.perf_cases, *op.gpu_cases)}
    if options.case is not None and options.case not in cases:
        raise ValueError(f"--case: has {options.case!r}, expected one of {', '.join(cases)}")
    case = cases[options.case] if options.case else op.perf_cases[0]
    order = ("cpu",) if device == "cpu" else ("cuda", "triton")
    backend = options.backend or next((b for b in order if not why_not(op, b, device)), "reference")
    reason = why_not(op, backend, device)
    if reason:
        raise ValueError(f"{op.name}: backend {backend!r} cannot run: {reason}")
    dtype = op.main_dtype
    arguments = harness.sample(op, case, dtype, device)
    for _ in range(3):
        harness.call(op, arguments, backend)

    label = f"{op.name}/{case.name}/{dtype_name(dtype)}/{backend}"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(CALLS):
            if device == "cuda":
                torch.cuda.nvtx.range_push(label)
            with record_function(label):
                harness.call(op, arguments, backend)
            if device == "cuda":
                torch.cuda.nvtx.range_pop()
                torch.cuda.synchronize()
    options.out.mkdir(parents=True, exist_ok=True)
    trace = options.out / f"{label.replace('/', '-')}.json"
    found.export_chrome_trace(str(trace))
    print(f"{label}, {CALLS} calls on {device}")
    print(words(longest(found, device, label, CALLS)))
    cost = op.cost(arguments)
    print(f"must move {cost.bytes / 1e6:.2f} MB and do {cost.flops / 1e9:.3f} GFLOP a call")
    print(trace)
    if device == "cuda":
        print(_ncu(options, case.name, backend))
    return 0


def longest(found: profile, device: str, label: str = "", calls: int = 1) -> list[dict[str, Any]]:
    """The own time of what ran, largest first: name, share of all, us and count of a call."""
    kernels = device == "cuda"

    def own(event: object) -> float:
        return float(getattr(event, "self_device_time_total" if kernels else "self_cpu_time_total"))

    # Of a GPU, its kernels: what launched them has their time too.
    events = [
        e for e in found.key_averages()
        if own(e) > 0 and (not kernels or (e.device_type.name == "CUDA" and not e.is_user_annotation))
    ]  # fmt: skip
    total = sum(map(own, events)) or 1.0
    return [
        {
            "name": "python and launch" if e.key == label else e.key,
            "share": own(e) / total, "us": own(e) / calls, "count": e.count / calls,
        }
        for e in sorted(events, key=own, reverse=True)
    ]  # fmt: skip


def words(entries: list[dict[str, Any]]) -> str:
    total = entries[0]["us"] / entries[0]["share"] if entries else 0.0
    lines = [f"{total:.1f} us a call, of which:"]
    for e in entries[:8]:
        lines.append(f"  {100 * e['share']:5.1f} %  {e['us']:9.1f} us  x{e['count']:g}  {e['name'][:90]}")
    return "\n".join(lines)


def _ncu(options: argparse.Namespace, case: str, backend: str) -> str:
    """ncu's prepared sections of one launch, in a process of its own."""
    tool = shutil.which("ncu")
    if tool is None:
        return "ncu is not on PATH: no hardware counters"
    code = (
        "import torch; from hulukern.testing import harness; import hulukern; "
        f"op = hulukern.OPS[{options.op!r}].spec; case = op.timed_case({case!r}); "
        "a = harness.sample(op, case, op.main_dtype, 'cuda'); "
        f"harness.call(op, a, {backend!r}); torch.cuda.synchronize()"
    )
    sections = [x for s in NCU_SECTIONS for x in ("--section", s)]
    done = subprocess.run([tool, *sections, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    target = options.out / f"{options.op}-{case}-{backend}.ncu.txt"
    write_text(target, done.stdout + done.stderr)
    return f"{target}" if done.returncode == 0 else f"{target}: ncu ended with {done.returncode}"
