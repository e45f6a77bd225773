"""Pins: what each kernel was when somebody last agreed. One file per backend and target, one line per kernel, by
toolchain: another compiler makes other code, which no pin can judge."""

from __future__ import annotations

import datetime
import json
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.compare import code
from bench.results import write_text
from bench.static.machine_code import generation, multiply_adds
from bench.static.row import QUANTITIES, Finding, Row

ROOT = Path(__file__).parents[2]
PINS = ROOT / "bench/pins"

Pin = dict[str, Any]  # Row.quantities()

# An edit shifts a few instructions in many kernels; what it costs shows elsewhere.
CODE_SLACK = 0.05


def path_of(backend: str, target: str, folder: Path = PINS) -> Path:
    return folder / f"{backend}-{target}.json"


def parse(text: str, source: str) -> dict[str, dict[str, Pin]]:
    """Toolchain -> kernel -> pin; ValueError naming the source."""
    try:
        data = json.loads(text)
        for toolchain, kernels in data.items():
            for name, pin in kernels.items():
                if set(pin) != set(QUANTITIES):
                    raise ValueError(f"{toolchain}, {name}: has {sorted(pin)}, expected {sorted(QUANTITIES)}")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{source}: cannot be read as pins ({error}), expected what --pin writes") from None
    return dict(data)


def load(path: Path) -> dict[str, dict[str, Pin]]:
    """Nothing pinned yet is an empty one."""
    return parse(path.read_text(), str(path)) if path.exists() else {}


def save(path: Path, rows: Iterable[Row], toolchain: str, ops: list[str]) -> None:
    """Replace what this toolchain's rows say; of ``ops`` only, unless empty. Whole or not at all."""
    pins = load(path)
    kept = {name: pin for name, pin in pins.get(toolchain, {}).items() if ops and name.split("/")[0] not in ops}
    pins[toolchain] = {**kept, **{row.name: row.quantities() for row in rows}}
    blocks = []
    for key in sorted(pins):
        lines = [f"{json.dumps(name)}: {json.dumps(pins[key][name])}" for name in sorted(pins[key])]
        blocks.append(f"{json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n}")
    write_text(path, "{\n" + ",\n".join(blocks) + "\n}\n")


def of_base(base: str, backend: str, target: str, toolchain: str) -> dict[str, Pin]:
    """Pins of a file that --json wrote, or of a git revision."""
    if Path(base).exists():
        try:
            rows = json.loads(Path(base).read_text())["rows"]
            return {r["name"]: r["quantities"] for r in rows if (r["backend"], r["target"]) == (backend, target)}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--diff: {base} cannot be read ({error!r}), expected what --json writes") from None
    file = path_of(backend, target).relative_to(ROOT)
    command = ["git", "show", f"{base}:{file}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise ValueError(f"--diff: {base!r} is no file, and git has no pins there ({shown.stderr.strip()})")
    pins = parse(shown.stdout, f"{base}:{file}")
    if toolchain not in pins:
        raise ValueError(f"--diff: {base}:{file} has pins for {', '.join(pins)}, expected {toolchain}")
    return pins[toolchain]


# --- judging ----------------------------------------------------------------------------------------------


def judge(rows: Iterable[Row], pins: dict[str, Pin], where: str, ops: list[str]) -> Iterator[Finding]:
    """Both ways: worse fails, and better fails until it is pinned, so that no gain is lost unseen."""
    names = set()
    for row in rows:
        names.add(row.name)
        if row.name in pins:
            yield from compare(pins[row.name], row)
        else:
            yield Finding(row.label, "kernel", "changed", "is not pinned")
    for name in pins:
        if name not in names and (not ops or name.split("/")[0] in ops):
            yield Finding(f"{where} {name}", "kernel", "changed", "is pinned, and no longer there")


def compare(pin: Pin, row: Row) -> Iterator[Finding]:
    new = row.quantities()

    def finding(quantity: str, is_worse: bool, text: str) -> Finding:
        return Finding(row.label, quantity, "worse" if is_worse else "better", text)

    def change(quantity: str, form: str = "{}") -> str:
        return f"{form.format(pin[quantity])} -> {form.format(new[quantity])}"

    if pin["spills"] != new["spills"]:
        yield finding("spills", new["spills"] > pin["spills"], f"spills: {change('spills')} accesses")
    if pin["stack_bytes"] != new["stack_bytes"]:
        yield finding("stack_bytes", new["stack_bytes"] > pin["stack_bytes"], f"stack: {change('stack_bytes')} bytes")
    if pin["registers"] != new["registers"]:
        yield finding("registers", new["registers"] > pin["registers"], f"registers: {change('registers')}")
    shared = f"shared memory {pin['shared_bytes'] / 1024:.4g} -> {new['shared_bytes'] / 1024:.4g} KiB"
    if pin["shared_bytes"] != new["shared_bytes"]:
        yield finding("shared_bytes", new["shared_bytes"] > pin["shared_bytes"], shared)
    if pin["occupancy"] != new["occupancy"]:
        causes = [f"{name} {change(name)}" for name in ("registers", "threads") if pin[name] != new[name]]
        causes += [shared] if pin["shared_bytes"] != new["shared_bytes"] else []
        because = f" ({', '.join(causes)})" if causes else ""
        text = f"occupancy {change('occupancy', '{:.2f}')}{because}"
        yield finding("occupancy", new["occupancy"] < pin["occupancy"], text)
    for kind in ("loads", "stores"):
        if _mean(pin[kind]) != _mean(new[kind]):
            text = _widths_changed(kind, pin[kind], new[kind])
            yield finding(kind, _mean(new[kind]) < _mean(pin[kind]), text)
    before, after = _tensor_rank(pin["tensor"]), _tensor_rank(new["tensor"])
    if before != after:
        names = sorted({*pin["tensor"], *new["tensor"]})
        counts = ", ".join(f"{n}: {pin['tensor'].get(n, 0)} -> {new['tensor'].get(n, 0)}" for n in names)
        lost = f", the products run on FFMA ({row.fma} of them)" if not new["tensor"] else ""
        yield finding("tensor", after < before, f"tensor instructions {counts}{lost}")
    old_ratio, ratio = pin["tensor_ratio"], new["tensor_ratio"]
    if old_ratio is not None and ratio is not None and abs(ratio - old_ratio) > 5e-4:
        padded = f" ({row.shape} padded)" if ratio > old_ratio and row.shape else ""
        text = f"tensor work x {old_ratio:.3f} -> x {ratio:.3f}{padded}"
        yield finding("tensor_ratio", ratio > old_ratio, text)
    if abs(new["code_bytes"] - pin["code_bytes"]) > CODE_SLACK * pin["code_bytes"]:
        yield finding("code_bytes", new["code_bytes"] > pin["code_bytes"], f"code: {change('code_bytes')} bytes")
    if pin["light_us"] != new["light_us"]:
        text = f"speed-of-light time: {change('light_us')} us, the spec counts otherwise"
        yield Finding(row.label, "light_us", "changed", text)


def _mean(counts: dict[str, int]) -> float:
    """Bytes an access: unrolling alone does not change it, narrower accesses do."""
    total = sum(counts.values())
    return sum(int(width) * n for width, n in counts.items()) / total if total else 0.0


def _widths_changed(kind: str, old: dict[str, int], new: dict[str, int]) -> str:
    widest = max((*old, *new), key=int)
    if old.get(widest, 0) == new.get(widest, 0):
        shown = (" + ".join(f"{n} x {width}" for width, n in counts.items()) or "none" for counts in (old, new))
        return f"{kind} (times bytes): {' -> '.join(shown)}"
    now = "" if widest in new or not new else f", now {max(new, key=int)}-byte"
    return f"{widest}-byte {kind}: {old.get(widest, 0)} -> {new.get(widest, 0)}{now}"


def _tensor_rank(tensor: dict[str, int]) -> tuple[int, float]:
    """A newer kind of instruction, then a larger one."""
    work = sum(count * multiply_adds(name) for name, count in tensor.items())
    return generation(tensor), work / max(sum(tensor.values()), 1)


# --- waivers ----------------------------------------------------------------------------------------------


@dataclass
class Waiver:
    kernel: str  # pattern of a label such as "triton sm_90 rope_attention/hw/*"
    quantity: str
    reason: str
    until: datetime.date  # the last day
    used: bool = field(default=False)


def load_waivers(path: Path = PINS / "waivers.toml") -> list[Waiver]:
    if not path.exists():
        return []
    try:
        data = tomllib.loads(path.read_text())
        if set(data) - {"waiver"}:
            raise ValueError(f"has {sorted(data)}")
        waivers = [Waiver(**entry) for entry in data.get("waiver", [])]
        for waiver in waivers:
            if waiver.quantity not in QUANTITIES or not waiver.reason or type(waiver.until) is not datetime.date:
                raise ValueError(f"{waiver.kernel}: quantity {waiver.quantity!r}, until {waiver.until!r}")
    except (ValueError, TypeError) as error:
        expected = f"[[waiver]] with kernel, quantity ({', '.join(QUANTITIES)}), reason, until = YYYY-MM-DD"
        raise ValueError(f"{path}: cannot be read ({error}), expected {expected}") from None
    return waivers


def waived(finding: Finding, waivers: list[Waiver], today: datetime.date) -> tuple[bool, str]:
    """Whether a finding passes, and what the waiver says of it."""
    for waiver in waivers:
        if waiver.quantity == finding.quantity and fnmatchcase(finding.label, waiver.kernel):
            waiver.used = True
            if today > waiver.until:
                return False, f"waiver expired on {waiver.until}: {waiver.reason}"
            return True, f"waived until {waiver.until}: {waiver.reason}"
    return False, ""


def unused(waivers: list[Waiver], labels: Iterable[str], everything: bool) -> list[Waiver]:
    """Waivers that spared nothing although what they name was looked at."""
    seen = list(labels)
    return [
        w for w in waivers if not w.used and (everything or any(fnmatchcase(label, w.kernel) for label in seen))
    ]  # fmt: skip


# --- diff -------------------------------------------------------------------------------------------------

DIFFED = {
    "registers": "registers", "spills": "spills", "shared_bytes": "shared bytes", "occupancy": "occupancy",
    "tensor_ratio": "tensor ratio", "code_bytes": "code bytes",
}  # fmt: skip


def diff(base: dict[str, Pin], rows: Iterable[Row], where: str) -> Iterator[str]:
    """Rows of a Markdown table: kernels that differ, and in them what does."""
    new = {row.name: row.quantities() for row in rows}
    for name in sorted({*base, *new}):
        kernel = code(f"{where} {name}")
        if name not in new or name not in base:
            yield f"| {kernel} | {'new' if name in new else 'gone'} |" + " |" * (len(DIFFED) - 1)
            continue
        pairs = [(base[name].get(quantity), new[name][quantity]) for quantity in DIFFED]
        if any(a != b for a, b in pairs):
            cells = ["" if a == b else f"{_shown(a)} → {_shown(b)}" for a, b in pairs]
            yield f"| {kernel} | {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "none" if value is None else str(value)


def diff_header() -> str:
    return f"| kernel | {' | '.join(DIFFED.values())} |\n|---|{'---:|' * len(DIFFED)}"
