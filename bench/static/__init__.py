"""The static gate: what the compilers make of every kernel, against pins and limits, without a GPU."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hulukern
from bench.results import write_text
from bench.static import cuda_rows, machine_code, pins, triton_rows
from bench.static.row import Finding, Row, limits
from hulukern.tuning import ARCHITECTURES

EXAMPLES = """examples:
  python -m bench static                                    both backends, four architectures
  python -m bench static --backend cuda --arch 80 --op rope_attention --json out.json
  python -m bench static --pin                              agree to what is there now: git diff bench/pins shows it
  python -m bench static --diff main                        a Markdown table of what changed since main's pins
  python -m bench static --diff out.json                    since an earlier --json

Pins hold for one toolchain. Under another the gate says so, and only the limits apply: no spills, no padded product, a
block fits. bench/pins/waivers.toml lets a finding pass for a while: [[waiver]] with kernel (a pattern such as
"triton sm_90 rope_attention/*"), quantity (such as "registers"), reason and until (a date, its last day).

exit codes: 0 as pinned and within the limits (or no pins for this toolchain), 1 worse or better than pinned, beyond a
limit, or a waiver expired, 2 bad arguments, or a tool, library or file that is missing or cannot be read
"""
BACKENDS: dict[str, ModuleType] = {"triton": triton_rows, "cuda": cuda_rows}
AT_ONCE = 2


class Measured(NamedTuple):
    backend: str
    architecture: int
    toolchain: str
    rows: list[Row]

    @property
    def target(self) -> str:
        return str(BACKENDS[self.backend].target(self.architecture))

    @property
    def where(self) -> str:
        return f"{self.backend} {self.target}"


def measure(backends: list[str], architectures: list[int], ops: list[str]) -> list[Measured]:
    """Two at a time, longest first; what was compiled or read before is not again."""
    machine_code.tool()
    jobs = [(b, a) for b in backends for a in architectures]
    toolchains = {(b, a): BACKENDS[b].toolchain(a) for b, a in jobs}
    done: dict[tuple[str, int], Measured] = {}
    begin = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {pool.submit(BACKENDS[b].rows, a, ops): (b, a) for b, a in jobs}
        try:
            for future in as_completed(waiting):
                b, a = waiting[future]
                done[b, a] = Measured(b, a, toolchains[b, a], future.result())
                state = f"[{len(done)}/{len(jobs)}] {done[b, a].where}: {len(done[b, a].rows)} kernels"
                print(f"static: {state}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[job] for job in jobs]


# --- the table --------------------------------------------------------------------------------------------

HEADER = (
    "kernel", "regs", "spill", "stack", "shared", "occ", "loads", "stores", "tensor instructions", "x needed", "code",
    "light us",
)  # fmt: skip


def line(row: Row) -> tuple[str, ...]:
    return (
        row.label, str(row.registers), str(row.spills), str(row.stack_bytes), str(row.shared_bytes),
        f"{row.occupancy:.2f}", _widths(row.loads), _widths(row.stores),
        " ".join(f"{count}x{name}" for name, count in sorted(row.tensor.items())),
        "" if row.tensor_ratio is None else f"{row.tensor_ratio:.3f}", str(row.code_bytes),
        "" if row.light_us is None else f"{row.light_us:g}",
    )  # fmt: skip


def _widths(counts: dict[int, int]) -> str:
    """8x16: eight accesses of 16 bytes."""
    return " ".join(f"{n}x{width}" for width, n in sorted(counts.items(), reverse=True))


def print_table(rows: list[Row]) -> None:
    table = [HEADER, *(line(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADER))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def as_json(found: list[Measured]) -> str:
    def entry(row: Row) -> dict[str, Any]:
        named = {name: getattr(row, name) for name in ("backend", "target", "op", "name", "dtype", "fma", "shape")}
        return {**named, "quantities": row.quantities()}

    rows = [entry(row) for m in found for row in m.rows]
    return json.dumps({"toolchains": {m.where: m.toolchain for m in found}, "rows": rows}, indent=1) + "\n"


# --- the verdict ------------------------------------------------------------------------------------------


def judge(found: list[Measured], ops: list[str], folder: Path = pins.PINS) -> list[Finding]:
    """Beyond a limit, and other than pinned."""
    findings: list[Finding] = []
    for m in found:
        findings += [finding for row in m.rows for finding in limits(row)]
        pinned = pins.load(pins.path_of(m.backend, m.target, folder))
        if m.toolchain in pinned:
            findings += pins.judge(m.rows, pinned[m.toolchain], m.where, ops)
        else:
            others = f", but for {', '.join(pinned)}" if pinned else ""
            say(f"{m.where}: no pins for this toolchain ({m.toolchain}){others}; only the limits apply")
    return findings


def verdict(findings: list[Finding], found: list[Measured], waivers: list[pins.Waiver], everything: bool) -> int:
    """Say all that is wrong, and what to do; the exit code."""
    failed = []
    for finding in findings:
        passes, words = pins.waived(finding, waivers, datetime.date.today())
        say(f"{finding.label}: {finding.verdict}: {finding.text}{f' [{words}]' if words else ''}")
        if not passes:
            failed.append(finding)
    for waiver in pins.unused(waivers, [row.label for m in found for row in m.rows], everything):
        say(f"waiver for {waiver.quantity} of {waiver.kernel} spares nothing and can go")
    n_kernels = sum(len(m.rows) for m in found)
    if not failed:
        say(f"{n_kernels} kernels, nothing to say")
        return 0
    counts = ", ".join(
        f"{n} {name}" for name in ("limit", "worse", "better", "changed")
        if (n := sum(finding.verdict == name for finding in failed))
    )  # fmt: skip
    say(f"{n_kernels} kernels: {counts}")
    movable = [finding for finding in failed if finding.verdict != "limit"]
    if movable:
        named = [m for m in found if any(f.label.startswith(f"{m.where} ") for f in movable)]
        command = ["python", "-m", "bench", "static", "--pin"]
        for flag, values in (
            ("--backend", {m.backend: 0 for m in named}),
            ("--arch", {m.architecture: 0 for m in named}),
        ):
            everyone = len(values) == (len(BACKENDS) if flag == "--backend" else len(ARCHITECTURES))
            command += [] if everyone else [word for value in values for word in (flag, str(value))]
        gains = all(finding.verdict == "better" for finding in movable)
        say(f"{'keep the gain' if gains else 'if all of this is meant'}: {shlex.join(command)}")
    return 1


def say(text: str) -> None:
    print(f"static: {text}", file=sys.stderr, flush=True)


# --- the command ------------------------------------------------------------------------------------------


def _architecture(text: str) -> int:
    """90 and 90a are one."""
    number = text.removeprefix("sm_").rstrip("a")
    if not number.isdecimal() or int(number) not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(f"has {text!r}, expected one of {', '.join(map(str, ARCHITECTURES))}")
    return int(number)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", action="append", choices=list(BACKENDS), help="whose kernels (default: both)")
    parser.add_argument("--op", action="append", default=[], help="only this entry point; may be repeated")
    parser.add_argument("--arch", action="append", type=_architecture, help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--pin", action="store_true", help="pin what is there now, instead of judging it")
    action.add_argument(
        "--diff", metavar="BASE", help="only print what changed since BASE, a revision or a --json file"
    )


def run(options: argparse.Namespace) -> int:
    unknown = [name for name in options.op if name not in hulukern.OPS]
    if unknown:
        raise ValueError(f"--op: has {unknown[0]!r}, expected one of {', '.join(hulukern.OPS)}")
    backends = [b for b in BACKENDS if b in (options.backend or BACKENDS)]
    architectures = [a for a in ARCHITECTURES if a in (options.arch or ARCHITECTURES)]
    waivers = pins.load_waivers()
    found = measure(backends, architectures, options.op)
    if options.json is not None:
        write_text(options.json, as_json(found))
    if options.diff is not None:
        changed = [
            text for m in found
            for text in pins.diff(_of_ops(pins.of_base(options.diff, m.backend, m.target, m.toolchain), options.op),
                                  m.rows, m.where)
        ]  # fmt: skip
        print(pins.diff_header(), *changed, sep="\n")
        return 0
    print_table([row for m in found for row in m.rows])
    if not options.pin:
        everything = not (options.op or options.arch or options.backend)
        return verdict(judge(found, options.op), found, waivers, everything)
    beyond = [finding for m in found for row in m.rows for finding in limits(row)]
    unwaived = [finding for finding in beyond if not pins.waived(finding, waivers, datetime.date.today())[0]]
    if unwaived:
        return verdict(unwaived, found, [], False)
    for m in found:
        path = pins.path_of(m.backend, m.target)
        pins.save(path, m.rows, m.toolchain, options.op)
        say(f"{len(m.rows)} kernels pinned in {path.relative_to(pins.ROOT)}")
    return 0


def _of_ops(base: dict[str, pins.Pin], ops: list[str]) -> dict[str, pins.Pin]:
    return {name: pin for name, pin in base.items() if not ops or name.split("/")[0] in ops}
