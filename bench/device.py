"""Everything that needs a GPU: op tests on every backend, compute-sanitizer, timings; one JSON and a table.

Uses what a bare machine with torch has: no rich, no matplotlib, no plugin of pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hulukern
from bench import sweep
from bench.results import check, row, write_results, write_text
from bench.timing import Rounds, cold_arguments, interleave, interleave_cuda
from hulukern.backends import BACKENDS, runs_on, unavailable
from hulukern.spec import Op
from hulukern.testing import harness
from hulukern.validation import dtype_name

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  bench/device.sh                            build for this GPU, then all of it, under 8 minutes
  bench/device.sh --out bench/results/h100   where device.json and tests.txt go
  python -m bench device --device cpu        a rehearsal where there is no GPU
  python -m bench device --op token_score --no-tests --no-sanitizer
  python -m bench device --no-sweep

The tuning sweep takes what is left of 8 minutes; its rows go to tuning.json in the folder of the results. Copied over
hulukern/tuning.json they take effect.

exit codes: 0 done, 1 a test, the sanitizer or an op failed (the JSON is written all the same), 2 bad arguments
"""
COPY_TARGET = 0.85
TESTS_LIMIT_S = 240
SANITIZER_LIMIT_S = 90
# A sweep begins no kernel after this, of the 8 minutes that a run has; one kernel takes up to a minute.
SWEEP_UNTIL_S = 400


@dataclass
class Run:
    """What one run collects."""

    device: str
    seconds: float  # per op and direction
    rows: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    copy_bytes_per_s: float = 0.0

    def interleave(self, runs: dict[str, Callable[[int], Any]], sets: int) -> Rounds:
        if self.device == "cuda":
            return interleave_cuda(runs, sets=sets, seconds=self.seconds)
        on_cpu: dict[str, Callable[[], Any]] = {name: (lambda run=run: run(0)) for name, run in runs.items()}  # type: ignore[misc]
        return interleave(on_cpu, seconds=self.seconds, min_rounds=3, warmups=1)


def copy_bandwidth(run: Run) -> None:
    """Bytes read plus written per second, far beyond any cache."""
    n = 1 << (30 if run.device == "cuda" else 26)
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    t = run.interleave({"torch": lambda _: target.copy_(source)}, 1).timing("torch")
    run.copy_bytes_per_s = 2 * n / t.median
    run.rows.append(row("copy", f"{n >> 20}MiB", "uint8", "fwd", "torch", t, 2 * n))


def backends(op: Op, device: str) -> list[str]:
    return [b for b in BACKENDS if b in op.backends and runs_on(b, device) and not unavailable(b)]


def time_op(run: Run, op: Op, direction: str) -> None:
    """Every backend and the plain formulation, on every performance case, cold: argument sets are rotated
    that together are larger than the last-level cache."""
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    for case in op.perf_cases:
        arguments = cold_arguments(op, case, dtype, run.device)
        if direction == "bwd" and not harness.differentiable(op, arguments[0]):
            continue
        cost = op.cost(arguments[0])
        runs: dict[str, Callable[[int], Any]] = {}
        for impl in [*backends(op, run.device), *(["torch"] if op.plain is not None else [])]:
            prepare = _forward if direction == "fwd" else _backward
            runs[impl] = prepare(op, arguments, impl)
        rounds = run.interleave(runs, len(arguments))
        for impl in runs:
            t = rounds.timing(impl)
            counted = (cost.bytes, cost.flops) if direction == "fwd" else ()
            run.rows.append(row(op.name, case.name, dtype_name(dtype), direction, impl, t, *counted))
            if direction == "fwd" and impl in ("cpu", "triton", "cuda") and cost.flops < 20 * cost.bytes:
                share, low, high = (cost.bytes / s / run.copy_bytes_per_s for s in (t.median, t.high, t.low))
                run.checks.append(check(f"copy_share_{op.name}_{case.name}_{impl}", share, low, high, COPY_TARGET))


def _callable(op: Op, impl: str) -> Callable[[dict[str, Any]], Any]:
    if impl == "torch":
        plain = op.plain
        assert plain is not None
        return lambda a: plain(*(a[name] for name in op.argument_names))
    return lambda a: harness.call(op, a, impl)


def _forward(op: Op, arguments: list[dict[str, Any]], impl: str) -> Callable[[int], Any]:
    function = _callable(op, impl)
    return lambda k: function(arguments[k])


def _backward(op: Op, arguments: list[dict[str, Any]], impl: str) -> Callable[[int], Any]:
    """Only the backward: forwards ran before, and keep their graphs."""
    graphs = [harness.graph(op, a, _callable(op, impl)) for a in arguments]
    return lambda k: torch.autograd.grad(
        graphs[k].outputs, graphs[k].leaves, graphs[k].upstream, allow_unused=True, retain_graph=True
    )


def smallest_of_each(device: str) -> None:
    """Every op once on its native backend, first case: what compute-sanitizer looks at."""
    backend = "cuda" if device == "cuda" else "cpu"
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        if backend in op.backends:
            for dtype in op.dtypes:
                harness.call(op, harness.sample(op, op.cases[0], dtype, device), backend)
            print(name)
    if device == "cuda":
        torch.cuda.synchronize()


def run_tests(device: str, out: Path) -> dict[str, Any]:
    """The op tests on ``device``; their whole output goes to tests.txt."""
    environment = {**os.environ, "HULUKERN_DEVICE": device}
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [*pytest, "tests/ops/test_ops.py"]
    text, code = _capture(command, TESTS_LIMIT_S, environment)
    write_text(out / "tests.txt", text)
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text[-400:])}
    return {"command": " ".join(command[1:]), "exit_code": code, **found}


def run_sanitizer(device: str, out: Path) -> dict[str, Any]:
    """memcheck and racecheck over the smallest case of every CUDA kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"absent": "no compute-sanitizer on PATH"}
    found: dict[str, Any] = {}
    for check_name in ("memcheck", "racecheck"):
        command = [tool, "--tool", check_name, "--error-exitcode", "9", sys.executable, "-m", "bench.device", device]
        text, code = _capture(command, SANITIZER_LIMIT_S, dict(os.environ))
        write_text(out / f"{check_name}.txt", text)
        found[check_name] = code
    return found


def _capture(command: list[str], limit_s: float, environment: dict[str, str]) -> tuple[str, int]:
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=limit_s, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return f"{text.decode() if isinstance(text, bytes) else text}\nstopped after {limit_s} s", 124
    return done.stdout, done.returncode


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi has them; empty without a GPU."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return dict(zip(fields.split(","), values, strict=False))


def print_table(run: Run) -> None:
    head = ("op", "case", "direction", "impl", "median us", "95 % interval", "of copy", "x torch")
    lines = [head]
    for r in run.rows:
        group = [o for o in run.rows if all(o[k] == r[k] for k in ("op", "case", "direction"))]
        base = [o for o in group if o["impl"] == "torch"] or [o for o in group if o["impl"] == "reference"]
        share = f"{100 * r['bytes'] / r['median_s'] / run.copy_bytes_per_s:.0f} %" if r["bytes"] else ""
        interval = f"{r['low_s'] * 1e6:.1f} .. {r['high_s'] * 1e6:.1f}"
        faster = f"{base[0]['median_s'] / r['median_s']:.2f}" if base else ""
        lines.append(
            (r["op"], r["case"], r["direction"], r["impl"], f"{r['median_s'] * 1e6:.1f}", interval, share, faster)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("OUT") or ROOT / "bench/out/device")
    parser.add_argument("--out", type=Path, default=default, help="folder for the results (default: $OUT)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal")
    parser.add_argument("--op", action="append", default=[], help="time these ops only", choices=list(hulukern.OPS))
    parser.add_argument("--seconds", type=float, default=0.5, help="per op and direction (default: 0.5)")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-sweep", action="store_true")


def run(options: argparse.Namespace) -> int:
    if not options.seconds > 0:
        raise ValueError(f"--seconds: has {options.seconds}, expected above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch: has no CUDA device, expected one; --device cpu is a rehearsal")
    begin, failures = time.monotonic(), []

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)

    more: dict[str, Any] = {"gpu_before": gpu_state()}
    if not options.no_tests:
        say("op tests")
        more["tests"] = run_tests(options.device, options.out)
        say(str(more["tests"]))
        if more["tests"]["exit_code"]:
            failures.append("tests")
    if not options.no_sanitizer and options.device == "cuda":
        say("compute-sanitizer")
        more["sanitizer"] = run_sanitizer(options.device, options.out)
        say(str(more["sanitizer"]))
        if any(code for code in more["sanitizer"].values()):
            failures.append("sanitizer")
    job = Run(options.device, options.seconds, [], [])
    copy_bandwidth(job)
    for name in options.op or hulukern.OPS:
        say(name)
        for direction in ("fwd", "bwd"):
            try:
                time_op(job, hulukern.OPS[name].spec, direction)
            except Exception as error:  # one op's failure must not cost the lease the rest
                failures.append(f"{name} {direction}: {type(error).__name__}: {error}")
                say(failures[-1])
    more |= {"gpu_after": gpu_state(), "copy_bytes_per_s": job.copy_bytes_per_s, "failures": failures}
    write_results(options.out / "device.json", job.rows, job.checks, **more)
    if options.device == "cuda" and not options.no_sweep and not unavailable("triton"):
        say("tuning sweep")
        limit_s = SWEEP_UNTIL_S - (time.monotonic() - begin)
        try:
            left = sweep.on_gpu(options.op, options.seconds, limit_s, options.out, options.out / "tuning.json")
            say(f"left out, for want of time: {', '.join(left) or 'nothing'}")
        except Exception as error:  # what was timed is worth its table
            failures.append(f"sweep: {type(error).__name__}: {error}")
    print_table(job)
    print(f"\n{options.out / 'device.json'}" + "".join(f"\nfailed: {f}" for f in failures))
    return 1 if failures else 0


if __name__ == "__main__":  # python -m bench.device cuda: under compute-sanitizer
    smallest_of_each(sys.argv[1])
