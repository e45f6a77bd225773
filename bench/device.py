"""Everything that needs a GPU, in stages: op tests on every backend, compute-sanitizer, suite ops against every peer,
the model (suite gpu), ncu against the static pins, and the tuning sweep. Each stage is a process of its own that is
stopped when its share of the time is over, and writes its file as it goes: what one loses the others keep.

Uses what a bare machine with torch has: no matplotlib, no plugin of pytest, no readers of medical files. Where the tree
has no repository, HULUKERN_COMMIT names its commit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

import hulukern
from bench import counters, gpu, ops
from bench.baselines import BASELINES
from bench.contenders import Filter
from bench.results import load_results, write_text
from hulukern.backends import unavailable
from hulukern.testing import harness

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  bench/device.sh                            build for this GPU, then all of it, in 8 minutes: what they are too short
                                             for is named
  bench/device.sh --out bench/results/h100   where log.txt and the JSON files go
  bench/device.sh --stage ops --limit 450    all of one stage
  bench/device.sh --stage model --stage compiled --stage sweep --limit 500
  python -m bench device --device cpu        a rehearsal where there is no GPU
  python -m bench device --stage ops --op rope_attention --baseline flex --baseline torch.compile

Rows of the sweep go to tuning.json in the folder of the results. Copied over hulukern/tuning.json they take effect.

exit codes: 0 done, 1 a test, the sanitizer, an op or a step failed, or what a GPU machine has is not there (the JSON is
written all the same), 2 bad arguments
"""
# Seconds of the default limit; another limit is shared out alike among the stages that run. Tests and sanitizer run
# side by side. Building for one architecture comes before: a minute.
STAGES = {
    "tests": 95.0, "sanitizer": 95.0, "ops": 100.0, "model": 140.0, "counters": 35.0, "sweep": 30.0, "compiled": 120.0,
}  # fmt: skip
ON_DEMAND = ("compiled",)  # suite ops against the peers that compile, some 10 s a case
LIMIT_S = 400.0
GRACE_S = 10.0  # between being told to stop and being stopped
ATTEMPTS = 4  # at suite ops, each from behind the kernel that took the device with it


def smallest_of_each(device: str) -> None:
    """Every op once on its native backend, first case: what compute-sanitizer looks at. Arguments are made on the host:
    a tool is to see our kernels, not torch's."""
    backend = "cuda" if device == "cuda" else "cpu"
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        if backend in op.backends:
            for dtype in op.dtypes:
                arguments = harness.sample(op, op.cases[0], dtype, "cpu")
                harness.call(op, pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), arguments), backend)
            print(name)
    if device == "cuda":
        torch.cuda.synchronize()


def run_tests(device: str, log: Log, limit_s: float) -> dict[str, Any]:
    """The op tests on ``device``, in parallel where pytest-xdist is; the reference on a GPU needs no proof there."""
    environment = {**os.environ, "HULUKERN_DEVICE": device}
    parallel = (
        ["-n", str(min(16, len(os.sched_getaffinity(0)))), "--dist=worksteal"]
        if importlib.util.find_spec("xdist")
        else []
    )
    pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *parallel]
    text, code = capture([*pytest, "-k", "not reference", "tests/ops/test_ops.py"], limit_s, environment)
    log.add("tests", text)
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text[-400:])}
    return {"exit_code": code, "passed": 0, **found}


def run_sanitizer(check_name: str, device: str, log: Log, limit_s: float) -> dict[str, Any]:
    """memcheck or racecheck over the smallest case of every CUDA kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"absent": "no compute-sanitizer on PATH"}
    if unavailable("cuda"):
        return {"absent": unavailable("cuda")}
    command = [tool, "--tool", check_name, "--error-exitcode", "9", sys.executable, "-m", "bench.device", device]
    # Every tensor an allocation of its own, or what lies beyond one is another's and no error.
    text, code = capture(command, limit_s, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    log.add(check_name, text)
    reports = re.findall(r"^========= ((?:Invalid|Error|Program hit|Barrier error|Race reported)\b.*)", text, re.M)
    return {"exit_code": code, **({"wrong": reports[:5]} if reports else {})}


def run_ops(options: argparse.Namespace, peers: list[str], path: Path, log: Log, limit_s: float) -> dict[str, Any]:
    """Suite ops; where a kernel takes the device with it, again from behind that one."""
    end = time.monotonic() + limit_s
    wanted = Filter(ops=options.op, baselines=peers)
    seconds = options.seconds * len(ops.groups(wanted, options.device))
    names = [x for name in options.op for x in ("--op", name)] + [x for peer in peers for x in ("--baseline", peer)]
    command = [sys.executable, "-m", "bench", "run", "--suite", "ops", "--json", str(path), "--seconds", str(seconds)]
    resume: list[str] = []
    begun = time.time()
    for _ in range(ATTEMPTS):
        left = max(end - time.monotonic(), 1.0)
        text, code = capture([*command, *names, *resume, "--limit", str(max(left - 15, 1.0))], left, dict(os.environ))
        log.add(path.stem, text)
        resume = ["--resume"]
        lost = code < 0 or (code == 2 and "--resume goes on" in text)  # killed by a signal, or by what it says
        if not lost or time.monotonic() > end:
            break
    found = written_since(path, begun) or {"reasons": {}}
    wrong = ops.wrong_of_ours(found["reasons"])
    return {"exit_code": code, **({"wrong": wrong} if wrong else {})}


def written_since(path: Path, begun: float) -> dict[str, Any] | None:
    """Results that a stage has left, though it was stopped; None for those of an earlier run."""
    return load_results(path) if path.exists() and path.stat().st_mtime >= begun - 1 else None


def run_model(path: Path, log: Log, limit_s: float) -> dict[str, Any]:
    """Suite gpu."""
    seconds = limit_s / 5  # of measuring; building models, compiling and warming up take the rest
    command = [sys.executable, "-m", "bench", "run", "--suite", "gpu", "--json", str(path), "--seconds", str(seconds)]
    begun = time.time()
    text, code = capture(command, limit_s, dict(os.environ))
    log.add("model", text)
    failures = (written_since(path, begun) or {}).get("failures")
    return {"exit_code": code, **({"wrong": failures} if failures else {})}


def run_counters(out: Path, log: Log, limit_s: float) -> dict[str, Any]:
    """ncu over our kernels, beside the static pins; of what it had seen when it was stopped, too."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"absent": "no ncu on PATH"}
    with tempfile.TemporaryDirectory() as folder:
        launched, table = Path(folder) / "launched.json", Path(folder) / "ncu.csv"
        text, code = capture(counters.command(tool, launched, table), limit_s, dict(os.environ))
        log.add("ncu", text)
        seen = table.read_text() if table.exists() else ""
        order = json.loads(launched.read_text()) if launched.exists() else []
    major, minor = torch.cuda.get_device_capability()
    found = counters.compare(seen, order, 10 * major + minor)
    write_text(out / "counters.json", json.dumps(found, indent=1) + "\n")
    log.add("counters", counters.table(found))
    pinned = [entry for entry in found if entry["pinned"]]
    differ = sum(bool(entry["differs"]) for entry in pinned)
    return {"exit_code": code, "kernels": len(found), "pinned": len(pinned), "differ": differ}


def run_sweep(options: argparse.Namespace, log: Log, limit_s: float) -> dict[str, Any]:
    """The tuning sweep, which leaves the kernels that it was done with."""
    names = [x for name in options.op for x in ("--op", name)]
    where = ["--out", str(options.out), "--table", str(options.out / "tuning.json")]
    command = [sys.executable, "-m", "bench", "sweep", *names, *where, "--seconds", str(options.seconds)]
    text, code = capture([*command, "--limit", str(limit_s / 2)], limit_s, dict(os.environ))
    log.add("sweep", text)
    return {"exit_code": code}


class Log:
    """What every stage said, in one file that is written whole each time."""

    def __init__(self, path: Path) -> None:
        self.path, self.text, self._lock = path, "", threading.Lock()

    def add(self, stage: str, text: str) -> None:
        with self._lock:
            self.text += f"=== {stage}\n{text.rstrip()}\n\n"
            write_text(self.path, self.text)


def capture(command: list[str], limit_s: float, environment: dict[str, str]) -> tuple[str, int]:
    """What a command said and its exit code, 124 when it was stopped: it may say what it had before it is killed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    try:
        return process.communicate(timeout=limit_s)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    except BaseException:
        stop_all()
        raise
    finally:
        _running.discard(process)
    try:
        text = process.communicate(timeout=GRACE_S)[0]
    except subprocess.TimeoutExpired:
        text = ""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: what comes next is timed
    text = text or process.communicate()[0]
    return f"{text}\nstopped after {limit_s:.0f} s", 124


_running: set[subprocess.Popen[str]] = set()


def stop_all() -> None:
    """Whatever runs in a session of its own, which Ctrl-C does not reach."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def stopped_together() -> Iterator[None]:
    """What is interrupted here is stopped everywhere, or the next run is timed beside it."""
    try:
        yield
    except BaseException:
        stop_all()
        raise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("OUT") or ROOT / "bench/out/device")
    parser.add_argument("--out", type=Path, default=default, help="folder for the results (default: $OUT)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal")
    most = ", ".join(ON_DEMAND)
    parser.add_argument(
        "--stage", action="append", default=[], choices=list(STAGES), help=f"this one (default: all but {most})"
    )
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
    options.out = options.out.resolve()  # stages run in the root of the tree
    begin, begun, cuda, out = time.monotonic(), time.time(), options.device == "cuda", options.out
    share = shares(options.stage or [name for name in STAGES if name not in ON_DEMAND], options.limit)
    quick = options.baseline or [peer.name for peer in BASELINES if not peer.compiles]
    Filter(ops=options.op, baselines=quick).check()
    out.mkdir(parents=True, exist_ok=True)
    log, device = Log(out / "log.txt"), options.device
    device_json, compiled_json, gpu_json = (out / f"{name}.json" for name in ("device", "compiled", "gpu"))
    done: dict[str, dict[str, Any]] = {}

    def take(name: str, stage: Callable[[], dict[str, Any]]) -> None:
        """No stage may cost the others their turn."""
        start = time.monotonic()
        print(f"[{start - begin:5.0f} s] {name}", flush=True)
        try:
            done[name] = stage()
        except Exception as error:
            done[name] = {"exit_code": 2, "error": f"{type(error).__name__}: {error}"}
        done[name]["seconds"] = round(time.monotonic() - start, 1)
        write_text(out / "stages.json", json.dumps({"stages": dict(done)}, indent=1) + "\n")

    with stopped_together():
        with ThreadPoolExecutor() as pool:
            if "tests" in share:
                pool.submit(take, "tests", lambda: run_tests(device, log, share["tests"]))
            for name in ("memcheck", "racecheck") if "sanitizer" in share and cuda else ():
                pool.submit(take, name, lambda name=name: run_sanitizer(name, device, log, share["sanitizer"]))  # type: ignore[misc]
        if "ops" in share:
            take("ops", lambda: run_ops(options, quick, device_json, log, share["ops"]))
        if "model" in share:
            take("model", lambda: run_model(gpu_json, log, share["model"]))
        if "counters" in share and cuda:
            take("counters", lambda: run_counters(out, log, share["counters"]))
        if "compiled" in share:
            slow = options.baseline or [peer.name for peer in BASELINES if peer.compiles]
            take("compiled", lambda: run_ops(options, slow, compiled_json, log, share["compiled"]))
        if "sweep" in share and cuda:
            take("sweep", lambda: run_sweep(options, log, share["sweep"]))

    stopped = [name for name, found in done.items() if found.get("exit_code") == 124]
    failures = [f"{name}: {found}" for name, found in done.items()
                if found.get("exit_code", 0) not in (0, 124) or found.get("failed") or found.get("passed") == 0
                or "absent" in found or "wrong" in found]  # fmt: skip
    failures += [f"{name} {why}" for name in ("cuda", "triton") if cuda and (why := unavailable(name))]
    summary = {"stages": done, "stopped": stopped, "failures": failures, "seconds": time.monotonic() - begin}
    write_text(out / "stages.json", json.dumps(summary, indent=1) + "\n")
    for name, path, table in (
        ("ops", device_json, lambda d: ops.table(d["rows"], d["roofline"])),
        ("compiled", compiled_json, lambda d: ops.table(d["rows"], d["roofline"])),
        ("model", gpu_json, gpu.table),
    ):
        results = written_since(path, begun) if name in done else None
        if results is not None:
            print(table(results))
    print("\n".join(f"{name}: {found}" for name, found in done.items()))
    if stopped:
        print(f"stopped before the end: {', '.join(stopped)}; --stage and --limit give one its time")
    print(f"\n{out}" + "".join(f"\nfailed: {f}" for f in failures))
    return 1 if failures else 0


if __name__ == "__main__":  # python -m bench.device cuda: under compute-sanitizer
    smallest_of_each(sys.argv[1])
