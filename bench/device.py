"""Everything that needs a GPU, in stages: op tests on every backend, compute-sanitizer, suite ops against every peer,
the model (suite gpu), the tuning sweep, and ncu against the static pins. Each stage has its share of the time, so that
the whole ends within 8 minutes; what one leaves is named, and ``--stage`` gives one all of it.

Uses what a bare machine with torch has: no matplotlib, no plugin of pytest, no readers of medical files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import hulukern
from bench import counters, ops, sweep
from bench.baselines import BASELINES
from bench.results import load_results, write_text
from hulukern.backends import unavailable
from hulukern.testing import harness

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  bench/device.sh                            build for this GPU, then all of it, under 8 minutes
  bench/device.sh --out bench/results/h100   where device.json, gpu.json, tests.txt and others go
  bench/device.sh --stage ops --limit 540    one stage in full
  python -m bench device --device cpu        a rehearsal where there is no GPU
  python -m bench device --stage ops --op rope_attention --baseline flex --baseline torch.compile

Rows of the sweep go to tuning.json in the folder of the results. Copied over hulukern/tuning.json they take effect.

exit codes: 0 done, 1 a test, the sanitizer, an op or a step failed (the JSON is written all the same), 2 bad arguments
"""
# Seconds of the default limit; another limit is shared out alike among the stages that run. Tests and sanitizer run
# side by side. Building for one architecture comes before (a minute), and a group or kernel that has begun takes up to
# half a minute more.
STAGES = {"tests": 120.0, "sanitizer": 120.0, "ops": 100.0, "model": 110.0, "sweep": 30.0, "counters": 30.0}
LIMIT_S = 390.0


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


def run_tests(device: str, out: Path, limit_s: float) -> dict[str, Any]:
    """The op tests on ``device``, in parallel where pytest-xdist is; their whole output goes to tests.txt."""
    environment = {**os.environ, "HULUKERN_DEVICE": device}
    workers = max(1, (os.cpu_count() or 2) // 2)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *parallel]
    command = [*pytest, "tests/ops/test_ops.py"]
    text, code = _capture(command, limit_s, environment)
    write_text(out / "tests.txt", text)
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text[-400:])}
    return {"command": " ".join(command[1:]), "exit_code": code, **found}


def run_sanitizer(check_name: str, device: str, out: Path, limit_s: float) -> dict[str, Any]:
    """memcheck or racecheck over the smallest case of every CUDA kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"absent": "no compute-sanitizer on PATH"}
    if unavailable("cuda"):
        return {"absent": unavailable("cuda")}
    command = [tool, "--tool", check_name, "--error-exitcode", "9", sys.executable, "-m", "bench.device", device]
    # Every tensor an allocation of its own, or what lies beyond one is another's and no error.
    text, code = _capture(command, limit_s, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    write_text(out / f"{check_name}.txt", text)
    return {"exit_code": code}


def _capture(command: list[str], limit_s: float, environment: dict[str, str]) -> tuple[str, int]:
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        return process.communicate(timeout=limit_s)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: what comes next is timed
        return f"{process.communicate()[0]}\nstopped after {limit_s:.0f} s", 124


def run_model(out: Path, limit_s: float) -> dict[str, Any]:
    """Suite gpu in a process of its own, which writes its file step by step."""
    seconds = limit_s / 4  # of measuring; building models, compiling and warming up take the rest
    command = [sys.executable, "-m", "bench", "run", "--suite", "gpu", "--json", str(out / "gpu.json")]
    text, code = _capture([*command, "--seconds", str(seconds)], limit_s, dict(os.environ))
    write_text(out / "gpu.txt", text)
    return {"exit_code": code}


def run_counters(out: Path, limit_s: float) -> dict[str, Any]:
    """ncu over every kernel once, beside the static pins."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"absent": "no ncu on PATH"}
    launched, log = out / "launched.json", out / "ncu.csv"
    text, code = _capture(counters.command(tool, launched, log), limit_s, dict(os.environ))
    if code or not log.exists():
        write_text(out / "ncu.txt", text)
        return {"exit_code": code or 1}
    major, minor = torch.cuda.get_device_capability()
    found = counters.compare(log.read_text(), json.loads(launched.read_text()), 10 * major + minor)
    write_text(out / "counters.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "ncu.txt", counters.table(found) + "\n")
    pinned = [entry for entry in found if entry["pinned"]]
    return {"kernels": len(found), "pinned": len(pinned), "differ": sum(bool(e["differs"]) for e in pinned)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("OUT") or ROOT / "bench/out/device")
    parser.add_argument("--out", type=Path, default=default, help="folder for the results (default: $OUT)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal")
    parser.add_argument("--stage", action="append", default=[], choices=list(STAGES), help="this one (default: all)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help=f"for all (default: {LIMIT_S:g})")
    parser.add_argument("--op", action="append", default=[], help="time these ops only", choices=list(hulukern.OPS))
    parser.add_argument(
        "--baseline", action="append", default=[], help="this peer (default: all that need not compile)"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring a group of suite ops (default: 0.3)")


def shares(stages: list[str], limit_s: float) -> dict[str, float]:
    """Seconds of each stage."""
    side_by_side = {"tests", "sanitizer"} <= set(stages)
    total = sum(STAGES[name] for name in stages) - (STAGES["sanitizer"] if side_by_side else 0.0)
    return {name: STAGES[name] / total * limit_s for name in stages}


def run(options: argparse.Namespace) -> int:
    for name in ("seconds", "limit"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name}: has {getattr(options, name)}, expected above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch: has no CUDA device, expected one; --device cpu is a rehearsal")
    begin, cuda, out = time.monotonic(), options.device == "cuda", options.out
    share = shares(options.stage or list(STAGES), options.limit)
    quick = [peer.name for peer in BASELINES if not peer.compiles]
    wanted = ops.Filter(ops=options.op, baselines=options.baseline or quick)
    wanted.check()
    done: dict[str, Any] = {}
    failures: list[str] = []
    suite: ops.Suite | None = None

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)

    with ThreadPoolExecutor() as pool:
        checks = {}
        if "tests" in share:
            checks["tests"] = pool.submit(run_tests, options.device, out, share["tests"])
        for name in ("memcheck", "racecheck") if "sanitizer" in share and cuda else ():
            checks[name] = pool.submit(run_sanitizer, name, options.device, out, share["sanitizer"])
        say(", ".join(checks) or "no checks")
        done |= {name: found.result() for name, found in checks.items()}
    if "ops" in share:
        suite = ops.Suite(out / "device.json", wanted, options.device)
        say(f"{len(suite.groups)} groups of suite ops, main dtypes first")
        for group in suite.run(options.seconds, time.monotonic() + share["ops"]):
            say(str(group))
        failures += suite.wrong
    if "model" in share:
        say("model: encoder, training step, reduction")
        if cuda:
            torch.cuda.empty_cache()  # what suite ops freed is the other process's
        done["model"] = run_model(out, share["model"])
    if "sweep" in share and cuda and not unavailable("triton"):
        say("tuning sweep")
        try:
            done["not_swept"] = sweep.on_gpu(options.op, options.seconds, share["sweep"], out, out / "tuning.json")
        except Exception as error:  # what was timed is worth its table
            failures.append(f"sweep: {type(error).__name__}: {error}")
    if "counters" in share and cuda:
        say("ncu")
        try:
            done["counters"] = run_counters(out, share["counters"])
        except Exception as error:
            failures.append(f"counters: {type(error).__name__}: {error}")
    failures += [f"{name}: exit code {found['exit_code']}" for name, found in done.items()
                 if isinstance(found, dict) and found.get("exit_code")]  # fmt: skip
    summary = done | {"failures": failures, "seconds": time.monotonic() - begin}
    write_text(out / f"{'-'.join(['stages', *options.stage])}.json", json.dumps(summary, indent=1) + "\n")
    if suite is not None:
        suite.extra = summary
        suite.save()
        print(ops.table(suite.rows, load_results(suite.path)["roofline"]))
    for name, text in (("model", out / "gpu.txt"), ("counters", out / "ncu.txt")):
        if name in done and text.exists():
            print(text.read_text())
    print("\n".join(f"{name}: {found}" for name, found in done.items()))
    if suite is not None and suite.left:
        print(f"no time for: {', '.join(map(str, suite.left))}")
    print(f"\n{out}" + "".join(f"\nfailed: {f}" for f in failures))
    return 1 if failures else 0


if __name__ == "__main__":  # python -m bench.device cuda: under compute-sanitizer
    smallest_of_each(sys.argv[1])
