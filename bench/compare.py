"""Compare two result files: ours, or any project's pytest-benchmark JSON.

A ratio is head / base, above 1 is slower. A verdict needs a whole 95 % interval on one side of the threshold.
Two files were not measured in turns, so a drift of the machine between them is in the ratio. CI should trust what was:
at least 6 pairs of files, base head base head …, whose ratios of medians give the interval, or `gate`, which does so
with builds of this library.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.results import load_results, write_text
from bench.stats import AMBIGUOUS, ENOUGH, SLOWER, Ratio, of_intervals, paired, unpaired
from bench.timing import Timing

EXAMPLES = """examples:
  python -m bench compare base.json head.json
  python -m bench compare base.json head.json --threshold 0.05 --markdown pr.md --junit junit.xml
  python -m bench compare base-1.json head-1.json base-2.json head-2.json …       6 pairs or more, measured in turns
  pytest --benchmark-json head.json && python -m bench compare base.json head.json    any project's

exit codes: 0 none slower, 1 some slower, 2 cannot judge: ambiguous, other devices, nothing in common, bad files
"""
THRESHOLD = 0.03
MIN_PAIRS = ENOUGH  # of files
SAME_EXPERIMENT = ("suite", "device", "warm", "scale", "model")  # what our files say of what they measured


@dataclass(frozen=True)
class Measurement:
    """Samples in seconds where the file holds them, else median and interval."""

    timing: Timing
    samples: Sequence[float] = ()


@dataclass(frozen=True)
class Run:
    """One file. ``device`` and ``experiment``: what two runs must share for their times to be comparable."""

    source: str
    device: str
    measurements: Mapping[str, Measurement]
    experiment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    name: str
    ratio: Ratio
    verdict: str


def load(path: Path) -> Run:
    """Raises ValueError naming the file when it is neither form."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: has content that cannot be read ({error}), expected results JSON") from None
    if isinstance(data, dict) and "benchmarks" in data and "machine_info" in data:
        return _foreign(path, data)
    return _own(path, load_results(path))


def _own(path: Path, data: dict[str, Any]) -> Run:
    meta = data.get("meta", {})
    gpu, cpu = meta.get("gpu") or [], meta.get("cpu", {})
    device = ", ".join(gpu) or f"{cpu.get('model')}, {cpu.get('torch_threads')} threads"
    samples = data.get("samples") or [()] * len(data["rows"])
    if not isinstance(samples, list) or len(samples) != len(data["rows"]):
        raise ValueError(f"{path}: has samples that are not of its rows, expected {len(data['rows'])} lists of them")
    found: dict[str, Measurement] = {}
    for row, values in zip(data["rows"], samples, strict=True):
        name = "/".join(str(row[k]) for k in ("op", "case", "dtype", "direction", "impl"))
        n = len(values) or row.get("n", 0)
        _add(path, found, name, Measurement(Timing(row["median_s"], row["low_s"], row["high_s"], n), values))
    return Run(str(path), device, found, {key: data[key] for key in SAME_EXPERIMENT if key in data})


def _add(path: Path, found: dict[str, Measurement], name: str, measurement: Measurement) -> None:
    """Raises ValueError for a name that is there already, and for what are no seconds."""
    if name in found:
        raise ValueError(f"{path}: has {name} more than once, expected one measurement of a name")
    t = measurement.timing
    for seconds in (t.median, t.low, t.high, *measurement.samples):
        if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise ValueError(f"{path}: {name} has a time of {seconds!r}, expected seconds above 0")
    found[name] = measurement


def _foreign(path: Path, data: dict[str, Any]) -> Run:
    """pytest-benchmark's, with or without --benchmark-save-data: then the quartiles stand for the interval of
    the median, narrowed by the root of the number of rounds."""
    try:
        cpu = data["machine_info"].get("cpu") or {}
        device = f"{cpu.get('brand_raw') or data['machine_info'].get('machine')}, {cpu.get('count')} cores"
        found: dict[str, Measurement] = {}
        for entry in data["benchmarks"]:
            s = entry["stats"]
            spread = 1.57 * (s["q3"] - s["q1"]) / max(s["rounds"], 1) ** 0.5  # a boxplot's notch: 95 % of a median
            timing = Timing(s["median"], max(s["median"] - spread, s["min"]), s["median"] + spread, s["rounds"])
            _add(path, found, entry["fullname"], Measurement(timing, s.get("data") or ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: has no {error} where pytest-benchmark writes it, expected its JSON") from None
    return Run(str(path), device, found)


def common(runs: Sequence[Run]) -> list[str]:
    """What all of them measured, in the order of the last.

    Raises:
        ValueError: the devices or what was measured differ, or nothing is in all.
    """
    first, last = runs[0], runs[-1]
    for run_ in runs:
        if run_.device != first.device:
            raise ValueError(
                f"{run_.source}: has times of {run_.device!r}, expected {first.device!r} as {first.source}"
            )
        for key in {*first.experiment} & {*run_.experiment}:
            came, expected = run_.experiment[key], first.experiment[key]
            if came != expected:
                raise ValueError(f"{run_.source}: has {key} {came!r}, expected {expected!r} as {first.source}")
    names = [name for name in last.measurements if all(name in run_.measurements for run_ in runs)]
    if not names:
        others = first.source if len(runs) == 2 else "all others"
        raise ValueError(f"{last.source}: has no measurement that {others} has, expected some in common")
    return names


def compare(base: Run, head: Run, threshold: float) -> list[Finding]:
    """Every measurement that both have. Raises as :func:`common`."""
    found = []
    for name in common([base, head]):
        a, b = base.measurements[name], head.measurements[name]
        enough = min(len(a.samples), len(b.samples)) >= 5
        ratio = unpaired(a.samples, b.samples) if enough else of_intervals(a.timing, b.timing)
        found.append(Finding(name, ratio, ratio.verdict(threshold)))
    return found


def compare_pairs(runs: Sequence[Run], threshold: float) -> list[Finding]:
    """Base, head, base, head …, taken in turns: every measurement that all have, from the pairs' ratios of medians.

    Raises:
        ValueError: as :func:`common`, and for fewer than 6 pairs.
    """
    if len(runs) // 2 < MIN_PAIRS:
        raise ValueError(f"files: have {len(runs) // 2} pairs of base and head, expected 1 or at least {MIN_PAIRS}")
    found = []
    for name in common(runs):
        medians = [run_.measurements[name].timing.median for run_ in runs]
        ratio = paired(medians[::2], medians[1::2])
        found.append(Finding(name, ratio, ratio.verdict(threshold)))
    return found


def exit_code(findings: Sequence[Finding]) -> int:
    verdicts = {f.verdict for f in findings}
    return 1 if SLOWER in verdicts else 2 if AMBIGUOUS in verdicts else 0


# --- what people and CI read --------------------------------------------------------------------------------


def table(findings: Sequence[Finding]) -> str:
    width = max(len(f.name) for f in findings)
    lines = [f"{'measurement':<{width}}  head/base  95 % interval    n    verdict"]
    for f in findings:
        r = f.ratio
        lines.append(f"{f.name:<{width}}  {r.value:9.3f}  {r.low:.3f} .. {r.high:.3f}  {r.n:4d}  {f.verdict}")
    return "\n".join(lines)


def summary(findings: Sequence[Finding], threshold: float) -> str:
    counts = {v: sum(f.verdict == v for f in findings) for v in ("SLOWER", "AMBIGUOUS", "FASTER", "SAME")}
    return ", ".join(f"{n} {v}" for v, n in counts.items() if n) + f" at a threshold of {100 * threshold:g} %"


def code(name: str) -> str:
    """A code span for a cell of a Markdown table, whatever is in the name."""
    name = printable(name).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run_) for run_ in re.findall("`+", name)), default=0))
    return f"{ticks} {name} {ticks}" if len(ticks) > 1 else f"`{name}`"


def printable(name: str) -> str:
    """Without control characters, which XML does not have."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def markdown(findings: Sequence[Finding], threshold: float, gone: Sequence[str] = ()) -> str:
    """For a pull request: what is not SAME in sight, the rest folded."""
    head = ["| measurement | head / base | 95 % interval | verdict |", "|---|---:|---:|---|"]

    def rows(chosen: Sequence[Finding]) -> list[str]:
        return [
            f"| {code(f.name)} | {f.ratio.value:.3f} | {f.ratio.low:.3f} – {f.ratio.high:.3f} | {f.verdict} |"
            for f in chosen
        ]

    loud = [f for f in findings if f.verdict != "SAME"]
    quiet = [f for f in findings if f.verdict == "SAME"]
    lines = [f"### Performance: {summary(findings, threshold)}", ""]
    if loud:
        lines += [*head, *rows(loud), ""]
    if quiet:
        lines += [f"<details><summary>{len(quiet)} unchanged</summary>", "", *head, *rows(quiet), "", "</details>", ""]
    if gone:
        lines += [f"Measured at the base and not at the head: {', '.join(code(name) for name in gone)}", ""]
    return "\n".join(lines)


def junit(findings: Sequence[Finding], threshold: float) -> str:
    """A failure for SLOWER, an error for AMBIGUOUS: CI shows both, each under its name."""
    verdicts = [f.verdict for f in findings]
    suite = ElementTree.Element(
        "testsuite", name="performance", tests=str(len(findings)), failures=str(verdicts.count(SLOWER)),
        errors=str(verdicts.count(AMBIGUOUS)),
    )  # fmt: skip
    for f in findings:
        case = ElementTree.SubElement(suite, "testcase", classname="performance", name=printable(f.name))
        text = f"head/base {f.ratio.value:.3f} ({f.ratio.low:.3f} .. {f.ratio.high:.3f}), threshold {threshold:g}"
        if f.verdict in (SLOWER, AMBIGUOUS):
            kind = "failure" if f.verdict == SLOWER else "error"
            ElementTree.SubElement(case, kind, message=f"{f.verdict}: {text}", type=f.verdict)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=f"share (default: {THRESHOLD})")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write Markdown for a pull request")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML")


def check_threshold(threshold: float) -> None:
    if not 0 < threshold < 10:
        raise ValueError(f"--threshold: has {threshold}, expected a share above 0, such as 0.03")


def report(findings: Sequence[Finding], options: argparse.Namespace, gone: Sequence[str] = ()) -> int:
    """Writes the Markdown last: the action takes it for the sign of a judgement that is complete."""
    print(table(findings))
    print(summary(findings, options.threshold))
    if gone:
        print(f"measured at the base and not at the head: {', '.join(gone)}")
    if options.junit is not None:
        write_text(options.junit, junit(findings, options.threshold))
    if options.markdown is not None:
        write_text(options.markdown, markdown(findings, options.threshold, gone))
    return exit_code(findings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="base and head, once or 6 times and more")
    add_output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check_threshold(options.threshold)
    if len(options.files) % 2:
        raise ValueError(f"files: have {len(options.files)}, expected a base and a head for each pair")
    loaded = [load(path) for path in options.files]
    if len(loaded) == 2:
        findings = compare(loaded[0], loaded[1], options.threshold)
    else:
        findings = compare_pairs(loaded, options.threshold)
    judged = {f.name for f in findings}
    for run_ in loaded:
        alone = [n for n in run_.measurements if n not in judged]
        if alone:
            print(f"{run_.source}: {len(alone)} measurements that not all files have", file=sys.stderr)
    gone = [name for name in loaded[0].measurements if name not in loaded[-1].measurements]
    return report(findings, options, gone)
