"""Suite ops: every op, performance case, dtype, direction and backend that can run here, in turns with its peers
(bench/contenders.py). It saves as it goes and goes on where it was interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hulukern
from bench import roofline
from bench.contenders import Filter, Group, contenders, line, measure
from bench.results import gpu_state, load_results, meta, write_results
from bench.timing import keep_freed_memory
from hulukern.backends import BACKENDS
from hulukern.validation import dtype_name

SAVE_EVERY_S = 10.0
# What the suite itself writes into a file.
OWN = (
    "meta",
    "rows",
    "checks",
    "suite",
    "device",
    "warm",
    "wanted",
    "complete",
    "reasons",
    "gpu_states",
    "ceilings",
    "roofline",
)


class DeviceLost(RuntimeError):
    """A kernel left the GPU's context unusable: no more can be measured in this process."""


def groups(wanted: Filter, device: str) -> list[Group]:
    """A CPU has the performance cases, and of a GPU's own those that are named."""
    found = []
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        # Backward ops are timed there through the ops that they belong to.
        more = op.gpu_cases if (device == "cuda" and not name.endswith("_backward")) or wanted.cases else ()
        for case in (*op.perf_cases, *more):
            for dtype in op.dtypes:
                if case in more and dtype != op.main_dtype and not wanted.dtypes:
                    continue
                # Gradients exist in floats only, and where a spec names arguments that have one.
                directions = ("fwd", "bwd") if op.differentiable and dtype.is_floating_point else ("fwd",)
                for direction in directions:
                    group = Group(name, case.name, dtype_name(dtype), direction)
                    pairs = ((group.op, wanted.ops), (group.case, wanted.cases), (group.dtype, wanted.dtypes))
                    if all(not names or value in names for value, names in pairs):
                        found.append((dtype != op.main_dtype, name != "rope_attention", case in more, group))
    # A deadline cuts what comes last: first main dtypes, of these attention, then what every machine has.
    found.sort(key=lambda entry: entry[:3])
    if not found:
        raise ValueError("--op, --case, --dtype: have no performance case in common, see python -m bench list")
    return [group for *_, group in found]


def _lost(device: str) -> str:
    """Why nothing can run any more; empty where it can."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return line(error)
    return ""


def wrong_of_ours(reasons: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What a file's reasons say against our backends, or a whole group."""
    return [
        f"{group}/{name}: {reason}" for group, found in reasons.items() for name, reason in found.items()
        if reason.startswith("wrong") and name in (*BACKENDS, "all")
    ]  # fmt: skip


class Suite:
    """A run that saves as it goes: what an interrupted one leaves is whole, and ``resume`` goes on from there."""

    def __init__(self, path: Path, wanted: Filter, device: str, resume: bool = False, warm: bool = False) -> None:
        self.path, self.wanted, self.device, self.warm = path, wanted, device, warm
        self.groups = groups(wanted, device)
        if device == "cpu":  # or every large result's pages cost more than what is written into them
            keep_freed_memory()
        self.against = {"backends": list(wanted.backends), "baselines": list(wanted.baselines)}
        self.rows: list[dict[str, Any]] = []
        self.reasons: dict[str, dict[str, str]] = {}  # group -> implementation -> why it has no row
        self.extra: dict[str, Any] = {}  # what else the file holds
        self.gpu_states: list[dict[str, str]] = []  # clocks, power and throttling at every save
        self._saved = 0.0
        before = _earlier(path) if path.exists() else None
        if resume and before is not None:
            _same_run(path, before, device, warm, self.against)
            self.rows, self.reasons = before["rows"], before["reasons"]
            self.gpu_states = before["gpu_states"]
            self.extra = {k: v for k, v in before.items() if k not in OWN}
            self.ceilings = roofline.Ceilings(**before["ceilings"]["measured"])
        else:
            self.ceilings = roofline.measure(device)

    @property
    def left(self) -> list[Group]:
        return [g for g in self.groups if str(g) not in self.reasons]

    @property
    def refused(self) -> dict[str, list[str]]:
        """Per implementation, the groups in which it could run and failed, with what it said."""
        found: dict[str, list[str]] = {}
        for group, reasons in self.reasons.items():
            for name, reason in reasons.items():
                if reason.startswith("absent: ") and "Error: " in reason:
                    found.setdefault(name, []).append(f"{group}: {reason.removeprefix('absent: ')}")
        return found

    def run(self, seconds: float, deadline: float = float("inf")) -> Iterator[Group]:
        """Measures groups, about ``seconds`` of measuring each; none is begun after ``deadline`` (monotonic)."""
        for group in self.left:
            if time.monotonic() > deadline:
                break
            reasons: dict[str, str] = {}
            try:
                found = contenders(group, self.wanted, self.device, reasons)
                self.rows += measure(group, found, self.device, seconds, reasons, self.warm)
            except Exception as error:  # no group may cost the others their turn
                reasons["all"] = f"wrong: {type(error).__name__}: {line(error)}"
            lost = _lost(self.device)
            if lost:
                reasons["all"] = f"wrong: the device is lost: {lost}"
            self.reasons[str(group)] = reasons
            if lost:
                self.save()
                raise DeviceLost(f"{group}: {lost}")
            if time.monotonic() - self._saved > SAVE_EVERY_S:
                self.save()
            yield group
        self.save()

    def save(self) -> None:
        peaks = roofline.datasheet(self.device)
        if self.device == "cuda":
            self.gpu_states.append(gpu_state())
        checks = roofline.checks(self.rows, self.ceilings) if self.device == "cuda" else []
        write_results(
            self.path, self.rows, checks, suite="ops", device=self.device, warm=self.warm, wanted=self.against,
            complete=not self.left,
            reasons=self.reasons, gpu_states=self.gpu_states,
            **roofline.as_json(self.rows, self.ceilings, peaks), **self.extra,
        )  # fmt: skip
        self._saved = time.monotonic()


def _earlier(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is not a file of this suite: it is not ours to overwrite."""
    data = load_results(path)
    if data.get("suite") != "ops":
        raise ValueError(f"{path}: has results of another suite, expected those of ops or no file")
    return data


def _same_run(path: Path, data: Mapping[str, Any], device: str, warm: bool, wanted: dict[str, list[str]]) -> None:
    now = meta() | {"device": device, "warm": warm, "wanted": wanted}
    missing = [key for key in OWN if key not in data]
    if missing:
        raise ValueError(
            f"{path}: has no {', '.join(missing)}, expected a file of suite ops; without --resume it starts anew"
        )
    for key, was in (data["meta"] | {key: data[key] for key in ("device", "warm", "wanted")}).items():
        if key != "time" and was != now.get(key):
            raise ValueError(f"{path}: has {key} {was}, expected {now[key]} to go on; without --resume it starts anew")


def table(rows: Sequence[Mapping[str, Any]], light: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal, and for a machine with nothing but torch."""
    head = ("op", "case", "dtype", "dir", "impl", "median us", "95 % interval", "of light", "of sheet", "x peer")
    lines = [head]
    for r, n in zip(rows, light, strict=True):
        shares = ["" if n[k] is None else f"{100 * n[k]:.0f} %" for k in ("of_measured", "of_datasheet")]
        lines.append(
            (
                r["op"], r["case"], r["dtype"], r["direction"], r["impl"], f"{r['median_s'] * 1e6:.1f}",
                f"{r['low_s'] * 1e6:.1f} .. {r['high_s'] * 1e6:.1f}", *shares,
                "" if n["faster"] is None else f"{n['faster']:.2f}",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(path: Path, wanted: Filter, seconds: float, resume: bool, warm: bool, limit_s: float = float("inf")) -> int:
    """The suite as a command. Exit code 1 when a result is wrong, 2 when interrupted or the device is lost."""
    wanted.check()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # one core a thread, the same ones throughout
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
    suite = Suite(path, wanted, device, resume, warm)
    left, begin = suite.left, time.monotonic()
    each = seconds / len(suite.groups)
    print(f"{len(left)} of {len(suite.groups)} groups to measure, about {each:.2g} s each and as long for checks")
    try:
        for group in suite.run(each, begin + limit_s):
            print(f"[{time.monotonic() - begin:5.0f} s] {group}", flush=True)
    except KeyboardInterrupt:
        suite.save()
        print(
            f"bench: interrupted with {len(suite.left)} groups left; {path} is whole, --resume goes on", file=sys.stderr
        )
        return 2
    except DeviceLost as error:
        print(f"bench: {error}; {path} is whole, --resume goes on", file=sys.stderr)
        return 2
    print(table(suite.rows, load_results(path)["roofline"]))
    if suite.left:
        print(f"no time for: {', '.join(map(str, suite.left))}")
    for name, found in suite.refused.items():
        print(f"{name}: no row in {len(found)} groups; {found[0]}")
    wrong = wrong_of_ours(suite.reasons)
    print("\n".join([f"wrong  {w}" for w in wrong] + [str(path)]))
    return 1 if wrong else 0
