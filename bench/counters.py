"""The static pins against hardware: registers, shared memory and occupancy as ncu reports them for a real launch of
every op's first case, beside what was pinned without a GPU, with the time and the warps that ran.

``python -m bench.counters FILE`` is what runs under ncu: it launches each op's first case once on each backend, and
leaves in FILE which Triton kernels those calls launched, in order.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hulukern
from bench.static import cuda_rows, pins, triton_rows
from hulukern.backends import unavailable
from hulukern.testing import harness, offline
from hulukern.validation import dtype_name

# As ncu calls them -> as pins do, or as the table does. Units are base units (--print-units base).
COUNTERS = {
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block_static": "static_shared_bytes",
    "launch__shared_mem_per_block_dynamic": "dynamic_shared_bytes",
    "launch__block_size": "threads",
    "sm__maximum_warps_per_active_cycle_pct": "occupancy_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "active_warps_percent",
    "gpu__time_duration.sum": "time_ns",
}
COMPARED = ("registers", "threads", "shared_bytes", "occupancy")
SECTIONS = ("LaunchStats", "Occupancy")  # which have all but the time


def command(tool: str, launched: Path, log: Path) -> list[str]:
    """ncu over our own kernels, mangled as the static rows have them."""
    sections = [*(x for section in SECTIONS for x in ("--section", section)), "--metrics", "gpu__time_duration.sum"]
    base = ["--kernel-name-base", "mangled", "--print-kernel-base", "mangled"]
    names = [*base, "--kernel-name", "regex:^_ZN2hk|_kernel$"]
    form = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    ncu = [tool, "--clock-control", "none", *sections, *names, *form]  # clocks as users have them
    return [*ncu, sys.executable, "-m", "bench.counters", str(launched)]


def launch_all(record: Path) -> None:
    """Every op's first case in its main dtype, once on each backend of a GPU."""
    order: list[dict[str, str]] = []
    with offline.launches() as launched:
        for name, registered in hulukern.OPS.items():
            op = registered.spec
            a = harness.sample(op, op.cases[0], op.main_dtype, "cuda")
            for backend in ("cuda", "triton"):
                if backend not in op.backends or unavailable(backend):
                    continue
                launched.clear()
                harness.call(op, a, backend)
                where = f"{name}/{op.cases[0].name}/{dtype_name(op.main_dtype)}"
                order += [
                    {"kernel": kernel, "label": f"{where}/{numbered}"} for kernel, numbered in _numbered(launched)
                ]
            record.write_text(json.dumps(order))  # what is stopped leaves what it launched
    torch.cuda.synchronize()


def _numbered(launched: list[Any]) -> Iterator[tuple[str, str]]:
    """Every launch's kernel, and that name as rows have it: what else is compiled under the same one has a number."""
    compiled: dict[str, list[int]] = {}
    for kernel in launched:
        name = kernel.metadata.name
        same = compiled.setdefault(name, [])
        if id(kernel) not in same:
            same.append(id(kernel))
        number = same.index(id(kernel)) + 1
        yield name, f"{name}#{number}" if number > 1 else name


def read(text: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Kernel names and counters of ncu's CSV in the order of the launches. Raises ValueError for what is none."""
    lines = list(csv.reader(io.StringIO("\n".join(s for s in text.splitlines() if not s.startswith("==")))))
    head = next((i for i, line in enumerate(lines) if line[:1] == ["ID"]), None)
    if head is None:
        raise ValueError(f"ncu: has no table in its output ({text.strip()[-200:]!r}), expected CSV")
    for line in lines[head + 1 :]:
        entry = dict(zip(lines[head], line, strict=False))
        if entry["ID"].isdigit() and len(line) == len(lines[head]):  # nor units, nor a last line that was cut
            numbers = {to: _number(entry.get(name, "")) for name, to in COUNTERS.items()}
            yield entry["Kernel Name"], {k: v for k, v in numbers.items() if not math.isnan(v)}


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan


def compare(text: str, order: list[dict[str, str]], architecture: int) -> list[dict[str, Any]]:
    """One entry per kernel that is ours: its counters, its pin where there is one, and what differs."""
    pinned = {
        "cuda": _pins("cuda", cuda_rows.target(architecture), lambda: cuda_rows.toolchain(architecture)),
        "triton": _pins("triton", triton_rows.target(architecture), lambda: triton_rows.toolchain(architecture)),
    }
    names, found = {e["kernel"] for e in order}, []
    waiting = list(order)
    for name, counters in read(text):
        kernel = cuda_rows.label_of(name)
        if kernel is not None:
            backend, label = "cuda", kernel[1]
        elif name in names:
            backend = "triton"
            mine = next((e for e in waiting if e["kernel"] == name), None)
            if mine is None:
                continue
            waiting.remove(mine)
            label = mine["label"]
        else:
            continue
        seen: dict[str, Any] = dict(counters)
        if "static_shared_bytes" in counters or "dynamic_shared_bytes" in counters:
            shared = counters.get("static_shared_bytes", 0) + counters.get("dynamic_shared_bytes", 0)
            seen["shared_bytes"] = shared
        if "occupancy_percent" in counters:
            seen["occupancy"] = counters["occupancy_percent"] / 100
        pin = pinned[backend].get(label)
        differs = {} if pin is None else dict(_differing(pin, seen))
        found.append({"backend": backend, "kernel": label, "ncu": seen, "pinned": pin is not None, "differs": differs})
    return found


def _differing(pin: pins.Pin, seen: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pinned threads are the most that a launch may have; one of fewer has another occupancy."""
    fewer = seen.get("threads", 0) < pin["threads"]
    for quantity in COMPARED:
        if quantity not in seen or (fewer and quantity in ("threads", "occupancy")):
            continue
        if not math.isclose(pin[quantity], seen[quantity], abs_tol=5e-3):
            yield quantity, {"pin": pin[quantity], "ncu": seen[quantity]}


def _pins(backend: str, target: str, toolchain: Callable[[], str]) -> dict[str, pins.Pin]:
    """Those of the compilers that are here: others make other code."""
    return pins.load(pins.path_of(backend, target)).get(toolchain(), {})


def table(found: list[dict[str, Any]]) -> str:
    lines = []
    for e in found:
        what = ", ".join(f"{k} {d['pin']:g} pinned, {d['ncu']:g} in ncu" for k, d in e["differs"].items())
        state = what or ("as pinned" if e["pinned"] else "no pin")
        took, warps = e["ncu"].get("time_ns", math.nan) / 1e3, e["ncu"].get("active_warps_percent", math.nan)
        lines.append(f"{e['backend']:<6} {took:8.1f} us  warps {warps:3.0f} %  {e['kernel'][:90]}: {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    launch_all(Path(sys.argv[1]))
