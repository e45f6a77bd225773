"""Everything that needs a GPU: op tests on every backend, compute-sanitizer, suite ops against every peer, the 55 %
tracker, the tuning sweep. Each stage has its end, so that the whole ends within 8 minutes; what one leaves is named.

Uses what a bare machine with torch has: no rich, no matplotlib, no plugin of pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from bench import ops, sweep
from bench.baselines import BASELINES
from bench.results import load_results, write_text
from hulukern.backends import unavailable
from hulukern.testing import harness

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  bench/device.sh                            build for this GPU, then all of it, under 8 minutes
  bench/device.sh --out bench/results/h100   where device.json, tests.txt and e2e.json go
  python -m bench device --device cpu        a rehearsal where there is no GPU
  python -m bench device --op token_score --no-tests --no-sanitizer
  python -m bench device --op rope_attention --baseline flex --baseline torch.compile --no-tests --no-sweep

The tuning sweep takes what is left; its rows go to tuning.json in the folder of the results. Copied over
hulukern/tuning.json they take effect.

exit codes: 0 done, 1 a test, the sanitizer or an op failed (the JSON is written all the same), 2 bad arguments
"""
# Seconds from the start by which a stage ends or begins nothing more. Tests and sanitizer share theirs; building for
# one architecture comes before (a minute), and a group or kernel that has begun takes up to half a minute more.
CHECKS_UNTIL_S, OPS_UNTIL_S, E2E_S, SWEEP_UNTIL_S = 140.0, 320.0, 30.0, 390.0


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


def run_e2e(out: Path) -> dict[str, Any]:
    """The 55 % tracker, where the packages are that read its inputs."""
    missing = [name for name in ("rich", "nibabel", "pydicom") if not importlib.util.find_spec(name)]
    if missing:
        return {"absent": f"not installed: {', '.join(missing)}"}
    command = [sys.executable, "-m", "bench", "e2e", "--seconds", "3", "--json", str(out / "e2e.json")]
    text, code = _capture(command, E2E_S, dict(os.environ))
    return {"exit_code": code, "said": text.splitlines()[-1:] if code else []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("OUT") or ROOT / "bench/out/device")
    parser.add_argument("--out", type=Path, default=default, help="folder for the results (default: $OUT)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal")
    parser.add_argument("--op", action="append", default=[], help="time these ops only", choices=list(hulukern.OPS))
    parser.add_argument(
        "--baseline", action="append", default=[], help="this peer (default: all that need not compile)"
    )
    parser.add_argument("--seconds", type=float, default=0.4, help="measuring a group of suite ops (default: 0.4)")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-sweep", action="store_true")


def run(options: argparse.Namespace) -> int:
    if not options.seconds > 0:
        raise ValueError(f"--seconds: has {options.seconds}, expected above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch: has no CUDA device, expected one; --device cpu is a rehearsal")
    begin, failures = time.monotonic(), []
    more: dict[str, Any] = {}

    def left(until: float) -> float:
        return max(until - (time.monotonic() - begin), 1.0)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)

    cuda, out = options.device == "cuda", options.out
    quick = [peer.name for peer in BASELINES if not peer.compiles]
    wanted = ops.Filter(ops=options.op, baselines=options.baseline or quick)
    wanted.check()
    suite = ops.Suite(out / "device.json", wanted, options.device)
    with ThreadPoolExecutor() as pool:
        stages = {}
        if not options.no_tests:
            stages["tests"] = pool.submit(run_tests, options.device, out, CHECKS_UNTIL_S)
        if not options.no_sanitizer and cuda:
            for name in ("memcheck", "racecheck"):
                stages[name] = pool.submit(run_sanitizer, name, options.device, out, CHECKS_UNTIL_S)
        say(f"{', '.join(stages) or 'no checks'}")
        more |= {name: stage.result() for name, stage in stages.items()}
    say(f"{len(suite.groups)} groups of suite ops, main dtypes first")
    suite.extra = more
    for group in suite.run(options.seconds, begin + OPS_UNTIL_S):
        say(str(group))
    if cuda:
        say("e2e")
        more["e2e"] = run_e2e(out)
    if cuda and not options.no_sweep and not unavailable("triton"):
        say("tuning sweep")
        try:
            more["not_swept"] = sweep.on_gpu(
                options.op, options.seconds, left(SWEEP_UNTIL_S), out, out / "tuning.json"
            )  # fmt: skip
        except Exception as error:  # what was timed is worth its table
            failures.append(f"sweep: {type(error).__name__}: {error}")
    failures += [f"{name}: exit code {found['exit_code']}" for name, found in more.items()
                 if isinstance(found, dict) and found.get("exit_code")] + suite.wrong  # fmt: skip
    more |= {"failures": failures, "seconds": time.monotonic() - begin}
    suite.save()
    print(ops.table(suite.rows, load_results(suite.path)["roofline"]))
    notes = {name: found for name, found in more.items() if name != "failures"}
    print("\n".join(f"{name}: {found}" for name, found in notes.items()))
    if suite.left:
        print(f"no time for: {', '.join(map(str, suite.left))}")
    print(f"\n{suite.path}" + "".join(f"\nfailed: {f}" for f in failures))
    return 1 if failures else 0


if __name__ == "__main__":  # python -m bench.device cuda: under compute-sanitizer
    smallest_of_each(sys.argv[1])
