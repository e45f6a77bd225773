"""Times launch configurations of the Triton kernels on a GPU, and writes the fastest to the tuning table.

A kernel's candidates are its rows of all architectures and the neighbours of its own: each size halved and doubled.
One counts if a correctness case passes with it, and it compiles without spills. Candidates take turns within a round,
on the performance cases of the op where the kernel's share is largest; what wins by more than noise replaces the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import hulukern
from bench.results import folder_of, row, write_results, write_text
from bench.timing import Rounds, interleave_cuda, n_cold
from hulukern.spec import Arguments, Case, Op
from hulukern.testing import harness, offline
from hulukern.tuning import ARCHITECTURES, MEASURED, TABLE, Row, candidates, read_rows, trial
from hulukern.validation import dtype_name

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  python -m bench sweep                          every kernel: results to bench/results/<device>, rows to the table
  python -m bench sweep --op rope_attention --limit 120

exit codes: 0 done (what the limit left out is named), 2 no GPU, or bad arguments
"""
# Performance cases of a head_dim that has rows of its own.
WIDE = Case("4x1024_d128", {"lengths": (1024,) * 4, "A": 16, "D": 128})
MORE = {"rope_attention": (WIDE,), "rope_attention_backward": (WIDE,)}

# (candidates by label taking an argument set, sets) -> their seconds
Timer = Callable[[Mapping[str, Callable[[int], Any]], int], Rounds]


@dataclass(frozen=True)
class Job:
    """What a kernel is timed on, and a correctness case that uses it."""

    kernel: str
    architecture: int
    op: Op
    cases: tuple[Case, ...]
    dtype: torch.dtype
    check: Case


def asks_for(op: Op, case: Case, dtype: torch.dtype, device: str) -> dict[str, int]:
    """The tuned kernels of a call, with the architecture."""
    with trial({}) as asked:
        harness.call(op, harness.sample(op, case, dtype, device), "triton")
    return asked


def find_jobs(ops: list[str], device: str) -> Iterator[Job]:
    """Every tuned kernel once, with the op that uses the fewest others."""
    best: dict[str, tuple[int, Job]] = {}
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        if "triton" not in op.backends or (ops and name not in ops):
            continue
        main = op.main_dtype
        for dtype in dict.fromkeys((main, torch.float32)):
            if dtype not in op.dtypes:
                continue
            cases: dict[str, list[Case]] = {}
            others: dict[str, dict[str, int]] = {}
            for case in (*op.perf_cases, *MORE.get(name, ())):
                asked = asks_for(op, case, dtype, device)
                for kernel in asked:
                    cases.setdefault(kernel, []).append(case)
                    others[kernel] = asked
            for kernel, asked in others.items():
                if dtype != main and not kernel.endswith(".fp32"):
                    continue
                check = next(c for c in op.cases if kernel in asks_for(op, c, dtype, device))
                job = Job(kernel, asked[kernel], op, tuple(cases[kernel]), dtype, check)
                if kernel not in best or len(asked) < best[kernel][0]:
                    best[kernel] = (len(asked), job)
    for _, job in best.values():
        yield job


def neighbours(chosen: Row) -> Iterator[Row]:
    """One size halved or doubled, one stage more or less."""
    for name, size in chosen.blocks.items():
        for other in (size // 2, size * 2):
            if other:
                yield dataclasses.replace(chosen, blocks={**chosen.blocks, name: other})
    for warps in (chosen.warps // 2, chosen.warps * 2):
        if 1 <= warps <= 16:
            yield dataclasses.replace(chosen, warps=warps)
    for stages in (chosen.stages - 1, chosen.stages + 1):
        if stages:
            yield dataclasses.replace(chosen, stages=stages)


def refused(job: Job, chosen: Row, device: str, timed_on: list[dict[str, Any]]) -> str:
    """Why a candidate does not count; empty when it does."""
    import triton

    with trial({job.kernel: chosen}), offline.launches() as launched:
        try:
            harness.check_forward(job.op, job.check, job.dtype, "triton", device)
            for arguments in timed_on:
                harness.call(job.op, arguments, "triton")
        except (triton.TritonError, RuntimeError, AssertionError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    spills = max((kernel.n_spills for kernel in launched), default=0)
    return f"{spills} bytes spilled" if spills else ""


def winner(current: str, rounds: list[Rounds]) -> tuple[str, float]:
    """The candidate that gains most over the current one, as the geometric mean over the cases of the ratios of a
    round; the current one unless the low ends of their intervals gain too."""
    best, gain = current, 1.0
    for label in rounds[0].seconds:
        ratios = [r.ratio(current, label) for r in rounds]
        median, low = (math.prod(getattr(t, end) for t in ratios) ** (1 / len(ratios)) for end in ("median", "low"))
        if low > 1 and median > gain:
            best, gain = label, median
    return best, gain


def _call(job: Job, chosen: Row, sets: list[dict[str, Any]], k: int) -> Any:
    with trial({job.kernel: chosen}):
        return harness.call(job.op, sets[k], "triton")


def _cold(job: Job, case: Case, device: str) -> list[Arguments]:
    sample = functools.partial(harness.sample, job.op, case, job.dtype, device)
    first = sample()
    return [first] + [sample(seed=k) for k in range(1, n_cold(job.op.cost(first).bytes, device))]


def sweep_kernel(job: Job, device: str, timer: Timer) -> dict[str, Any]:
    """All candidates of one kernel: rows of results, what was refused and why, and the choice."""
    current = TABLE[job.kernel][job.architecture]
    known = {c.label: c for c in (current, *candidates(job.kernel), *neighbours(current))}
    sets_of = [_cold(job, case, device) for case in job.cases]
    firsts = [sets[0] for sets in sets_of]
    reasons = {label: refused(job, chosen, device, firsts) for label, chosen in known.items()}
    running = {label: chosen for label, chosen in known.items() if not reasons[label]}
    found: dict[str, Any] = {"rows": [], "refused": {label: why for label, why in reasons.items() if why}}
    if current.label not in running:
        return {**found, "chosen": current, "gain": 1.0}
    rounds = []
    for case, sets in zip(job.cases, sets_of, strict=True):
        cost = job.op.cost(sets[0])
        runs = {label: functools.partial(_call, job, chosen, sets) for label, chosen in running.items()}
        rounds.append(timer(runs, len(sets)))
        for label in running:
            t, impl = rounds[-1].timing(label), f"{job.kernel}: {label}"
            found["rows"].append(
                row(job.op.name, case.name, dtype_name(job.dtype), "fwd", impl, t, cost.bytes, cost.flops)
            )
    best, gain = winner(current.label, rounds)
    return {**found, "chosen": running[best], "gain": gain}


def write_table(path: Path, chosen: Mapping[tuple[str, int], Row]) -> None:
    """Measured rows beside those that are there already."""
    rows = read_rows(path)
    for (kernel, architecture), best in chosen.items():
        rows.setdefault(kernel, {})[architecture] = best
    text = {kernel: {str(arch): asdict(best) for arch, best in sorted(of.items())} for kernel, of in rows.items()}
    write_text(path, json.dumps(text, indent=1) + "\n")


def sweep(jobs: list[Job], device: str, timer: Timer, out: Path, table: Path, why: str, deadline: float) -> list[str]:
    """Kernel by kernel until the deadline (time.monotonic), written after each. Returns what was left out."""
    rows: list[dict[str, Any]] = []
    reports: dict[str, Any] = {}
    chosen: dict[tuple[str, int], Row] = {}
    left = [job.kernel for job in jobs]
    for job in jobs:
        if time.monotonic() >= deadline:
            break
        found = sweep_kernel(job, device, timer)
        left.remove(job.kernel)
        rows += found["rows"]
        best = dataclasses.replace(found["chosen"], why=why)
        reports[job.kernel] = {
            "architecture": job.architecture, "chosen": best.label, "gain": found["gain"], "refused": found["refused"],
        }  # fmt: skip
        if found["rows"]:
            chosen[job.kernel, job.architecture] = best
        print(f"{job.kernel:<28} {found['gain']:5.2f} x  {best.label}", flush=True)
        write_results(out / "sweep.json", rows, [], kernels=reports, left_out=left)
        write_table(table, chosen)
    return left


def on_gpu(ops: list[str], seconds: float, limit_s: float, out: Path | None, table: Path) -> list[str]:
    """The sweep on the current GPU; ValueError where there is none."""
    begin = time.monotonic()
    if not torch.cuda.is_available():
        raise ValueError("torch: has no CUDA device, expected one: a sweep times kernels")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in ARCHITECTURES:
        names = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise ValueError(f"torch: has a device of sm_{major}{minor}, expected one that has rows: {names}")
    home = Path("bench/results") / folder_of(torch.cuda.get_device_name())

    def timer(runs: Mapping[str, Callable[[int], Any]], sets: int) -> Rounds:
        return interleave_cuda(runs, sets=sets, seconds=seconds)

    jobs = list(find_jobs(ops, "cuda"))
    where = out or ROOT / home
    return sweep(jobs, "cuda", timer, where, table, str(home / "sweep.json"), begin + limit_s)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], choices=list(hulukern.OPS), metavar="OP", help="only this")
    parser.add_argument("--out", type=Path, help="folder for sweep.json (default: bench/results/<device>)")
    parser.add_argument("--table", type=Path, default=MEASURED, help=f"where rows go (default: {MEASURED.name})")
    parser.add_argument("--seconds", type=float, default=0.5, help="per kernel and case (default: 0.5)")
    parser.add_argument("--limit", type=float, default=1200.0, metavar="S", help="begin no kernel after (1200)")


def run(options: argparse.Namespace) -> int:
    for name in ("seconds", "limit"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name}: has {getattr(options, name)}, expected above 0")
    left = on_gpu(options.op, options.seconds, options.limit, options.out, options.table)
    if left:
        print(f"left out, for want of time: {', '.join(left)}")
    return 0
