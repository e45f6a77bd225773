"""Verdicts: their error rates by simulation, the files they read, and what they write."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from bisect import bisect_right
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import gate
from bench.__main__ import main
from bench.compare import compare, load
from bench.results import row, write_results
from bench.stats import AMBIGUOUS, FASTER, SAME, SLOWER, _resampled_median, of_intervals, unpaired
from bench.timing import Timing, summarize

ROOT = Path(__file__).parents[2]
THRESHOLD = 0.03


class Machine:
    """Block medians of a shared machine: a level that wanders by tens of percent, scatter of a few percent, now and
    then a block that takes much longer, and what a process keeps for its life from where its memory lies."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.level = 0.0
        self.launch()

    def launch(self) -> None:
        self.kept = [math.exp(self.random.gauss(0, 0.01)) for _ in range(2)]

    def pair(self, slowdown: float) -> tuple[float, float]:
        self.level = 0.95 * self.level + self.random.gauss(0, 0.05)
        return self.block(self.kept[0]), self.block(self.kept[1] * (1 + slowdown))

    def block(self, seconds: float) -> float:
        spike = math.exp(abs(self.random.gauss(0, 1))) if self.random.random() < 0.1 else 1.0
        return seconds * math.exp(self.level + self.random.gauss(0, 0.03)) * spike


def simulated(slowdown: float, seed: int, pairs: int = 30) -> str:
    """What the gate would say."""
    machine, found = Machine(seed), gate.Pairs()
    for _ in range(gate.ROUNDS):
        for _ in range(gate.LAUNCHES):
            machine.launch()
            base, head = zip(*(machine.pair(slowdown) for _ in range(pairs)), strict=True)
            found.base.append(list(base))
            found.head.append(list(head))
        verdict = found.ratio().verdict(THRESHOLD)
        if verdict != AMBIGUOUS:
            break
    return verdict


def rate(slowdown: float, verdict: str, runs: int = 300) -> float:
    return sum(simulated(slowdown, seed) == verdict for seed in range(runs)) / runs


def test_false_alarms_and_misses_in_simulation() -> None:
    assert rate(0.0, SLOWER) <= 0.005
    assert rate(0.0, AMBIGUOUS) <= 0.10
    assert rate(0.05, SLOWER) >= 0.60
    assert rate(0.10, SLOWER) >= 0.98
    assert rate(0.20, SLOWER) == 1.0
    assert rate(-0.10, FASTER) >= 0.95


def test_intervals_cover_what_they_claim() -> None:
    inside = 0
    for seed in range(300):
        machine, found = Machine(seed), gate.Pairs()
        for _ in range(gate.LAUNCHES):
            machine.launch()
            base, head = zip(*(machine.pair(0.05) for _ in range(40)), strict=True)
            found.base.append(list(base))
            found.head.append(list(head))
        r = found.ratio()
        inside += r.low <= 1.05 <= r.high
    assert inside / 300 >= 0.93


@pytest.mark.parametrize("n", [5, 6, 20])
def test_medians_are_resampled_as_by_drawing(n: int) -> None:
    draw = random.Random(n)
    values = sorted(draw.lognormvariate(0, 1) for _ in range(n))
    times = 20_000
    drawn = sorted(statistics.median(draw.choices(values, k=n)) for _ in range(times))
    short = sorted(_resampled_median(values, draw) for _ in range(times))
    # Kolmogorov and Smirnov's distance of two samples, one in a million by chance.
    at = sorted(set(drawn))
    distance = max(abs(bisect_right(drawn, x) - bisect_right(short, x)) / times for x in at)
    assert distance < 2.7 * (2 / times) ** 0.5


def test_unpaired_ratios_and_intervals() -> None:
    draw = random.Random(0)
    base = [1 + 0.02 * draw.random() for _ in range(30)]
    r = unpaired(base, [1.2 * x for x in base])
    assert r.value == pytest.approx(1.2)
    assert r.low < 1.2 < r.high
    assert r.verdict(0.1) == SLOWER
    assert unpaired(base, base).verdict(0.03) == SAME
    with pytest.raises(ValueError, match="at least 5 each"):
        unpaired(base[:4], base)
    wide = of_intervals(Timing(1.0, 0.9, 1.2, 9), Timing(1.0, 0.8, 1.1, 9))
    assert (wide.low, wide.high) == (0.8 / 1.2, 1.1 / 0.9)
    assert wide.verdict(0.03) == AMBIGUOUS


def own(path: Path, scale: float, name: str = "a", samples: bool = True) -> Path:
    draw = random.Random(1)
    values = [scale * (1 + 0.01 * draw.random()) for _ in range(20)]
    more = {"samples": [values]} if samples else {}
    write_results(path, [row(name, "case", "f32", "fwd", "cpu", summarize(values))], [], **more)
    return path


def foreign(path: Path, scale: float, *, data: bool, cpu: str = "a CPU") -> Path:
    """As pytest-benchmark writes it, with or without its samples."""
    draw = random.Random(2)
    values = sorted(scale * (1 + 0.01 * draw.random()) for _ in range(25))
    stats = {
        "min": values[0], "max": values[-1], "median": statistics.median(values), "q1": values[6], "q3": values[18],
        "rounds": 25, "mean": statistics.mean(values), **({"data": values} if data else {}),
    }  # fmt: skip
    content = {
        "machine_info": {"cpu": {"brand_raw": cpu, "count": 2}, "machine": "x86_64"},
        "benchmarks": [{"name": "t", "fullname": "tests/t.py::t", "stats": stats}],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1.3, 1), (0.7, 0), (1.027, 2)])
def test_own_files_and_exit_codes(scale: float, code: int, tmp_path: Path) -> None:
    base, head = own(tmp_path / "base.json", 1.0), own(tmp_path / "head.json", scale)
    assert main(["compare", str(base), str(head)]) == code


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1.3, 1)])
def test_foreign_files(scale: float, code: int, data: bool, tmp_path: Path) -> None:
    base = foreign(tmp_path / "b.json", 1.0, data=data)
    head = foreign(tmp_path / "h.json", scale, data=data)
    assert main(["compare", str(base), str(head)]) == code


def test_a_real_pytest_benchmark_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(benchmark):\n    benchmark(sum, range(1000))\n")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--benchmark-json", str(out), "test_it.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not as a worker of this run
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    run = load(out)
    assert list(run.measurements) == ["test_it.py::test_it"]
    assert {f.verdict for f in compare(run, run, THRESHOLD)} <= {SAME, AMBIGUOUS}


def test_markdown_and_junit(tmp_path: Path) -> None:
    base, head = own(tmp_path / "base.json", 1.0), own(tmp_path / "head.json", 1.3)
    md, xml = tmp_path / "pr.md", tmp_path / "junit.xml"
    assert main(["compare", str(base), str(head), "--markdown", str(md), "--junit", str(xml)]) == 1
    assert "| `a/case/f32/fwd/cpu` | 1.300 |" in md.read_text()
    assert "1 SLOWER at a threshold of 3 %" in md.read_text()
    suite = ElementTree.parse(xml).getroot()
    assert suite.attrib["failures"] == "1"
    assert "SLOWER: head/base 1.300" in suite[0][0].attrib["message"]


def pytest_benchmark(path: Path, *benchmarks: tuple[str, dict[str, object]]) -> Path:
    stats = {"min": 1.0, "median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 20}
    entries = [{"fullname": name, "stats": {**stats, **more}} for name, more in benchmarks]
    path.write_text(json.dumps({"machine_info": {"machine": "m"}, "benchmarks": entries}))
    return path


def test_any_name_is_one_cell(tmp_path: Path) -> None:
    name = "t.py::a[x|y`<img src=x>``\x1b]"
    slower = {"min": 2.0, "median": 2.0, "q1": 2.0, "q3": 2.0}
    base = pytest_benchmark(tmp_path / "b.json", (name, {}))
    head = pytest_benchmark(tmp_path / "h.json", (name, slower))
    assert (
        main(["compare", str(base), str(head), "--markdown", str(tmp_path / "m"), "--junit", str(tmp_path / "j")]) == 1
    )
    (line,) = [line for line in (tmp_path / "m").read_text().splitlines() if "t.py" in line]
    assert line.replace("\\|", "").count("|") == 5
    assert line.startswith("| ``` t.py::a[x\\|y`<img src=x>``\N{REPLACEMENT CHARACTER}] ``` |")
    assert ElementTree.parse(tmp_path / "j").getroot()[0].attrib["name"].startswith("t.py::a[x|y`")


@pytest.mark.parametrize(("rounds", "code"), [(1, 2), (5, 2), (6, 1)])
def test_few_samples_judge_nothing(rounds: int, code: int, tmp_path: Path) -> None:
    slower = {"min": 2.0, "median": 2.0, "q1": 2.0, "q3": 2.0, "rounds": rounds}
    base, head = (pytest_benchmark(tmp_path / f"{k}.json", ("t", more)) for k, more in enumerate(({}, slower)))
    assert main(["compare", str(base), str(head)]) == code
    for path, scale in ((base, 1.0), (head, 2.0)):
        write_results(path, [row("a", "c", "f32", "fwd", "cpu", Timing(scale, scale, scale, rounds))], [])
    assert main(["compare", str(base), str(head)]) == code


@pytest.mark.parametrize(
    ("benchmarks", "says"),
    [
        ([("t", {}), ("t", {})], "has t more than once"),
        ([("t", {"data": [1.0, math.nan, 1.0, 1.0, 1.0]})], "has a time of nan"),
        ([("t", {"data": [-1.0] * 9})], "has a time of -1.0"),
        ([("t", {"data": ["1"] * 9})], "has a time of '1'"),
        ([("t", {"median": 0.0})], "has a time of 0.0"),
    ],
)
def test_what_are_no_times_is_refused(
    benchmarks: list[tuple[str, dict[str, object]]], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pytest_benchmark(tmp_path / "b.json", *benchmarks)
    assert main(["compare", str(path), str(path)]) == 2
    assert f"{path}: " in (error := capsys.readouterr().err)
    assert says in error


def test_what_the_head_no_longer_measures_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = pytest_benchmark(tmp_path / "b.json", ("kept", {}), ("lost", {}))
    head = pytest_benchmark(tmp_path / "h.json", ("kept", {}))
    assert main(["compare", str(base), str(head), "--markdown", str(tmp_path / "m")]) == 0
    said = "easured at the base and not at the head: "
    assert said + "lost" in capsys.readouterr().out
    assert said + "`lost`" in (tmp_path / "m").read_text()


def test_other_experiments_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, layers in ((tmp_path / "b.json", 2), (tmp_path / "h.json", 27)):
        rows = [row("a", "c", "f32", "fwd", "cpu", Timing(1.0, 1.0, 1.0, 9))]
        write_results(path, rows, [], suite="e2e", model={"encoder_layers": layers})
    assert main(["compare", str(tmp_path / "b.json"), str(tmp_path / "h.json")]) == 2
    assert "has model {'encoder_layers': 27}, expected {'encoder_layers': 2}" in capsys.readouterr().err


def test_reports_go_through_links_and_into_pipes(tmp_path: Path) -> None:
    base, target, link, pipe = (tmp_path / name for name in ("b.json", "target", "link", "pipe"))
    own(base, 1.0)
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        assert main(["compare", str(base), str(base), "--markdown", str(link), "--junit", str(pipe)]) == 0
        assert "<testsuite" in reader.communicate(timeout=60)[0]
    assert link.is_symlink()
    assert "Performance" in target.read_text()
    assert pipe.is_fifo()


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = own(tmp_path / "base.json", 1.0)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "half.json").write_text(json.dumps({"machine_info": {}, "benchmarks": [{"fullname": "x"}]}))
    cases = {
        "cannot be read": [base, tmp_path / "broken.json"],
        "pytest-benchmark writes it": [base, tmp_path / "half.json"],
        "expected some in common": [base, own(tmp_path / "other.json", 1.0, "b")],
        "expected 'another CPU, 2 cores'": [
            foreign(tmp_path / "x.json", 1.0, data=True, cpu="another CPU"),
            foreign(tmp_path / "y.json", 1.0, data=True),
        ],
        "No such file": [base, tmp_path / "none.json"],
    }  # fmt: skip
    for says, files in cases.items():
        assert main(["compare", *map(str, files), "--junit", str(tmp_path / "j.xml")]) == 2, says
        assert says in capsys.readouterr().err
    assert not (tmp_path / "j.xml").exists()
    assert main(["compare", str(base), str(base), "--threshold", "0"]) == 2


def test_gate_refuses_what_it_cannot_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert main(["gate", "--base", "no-such-ref", "--worktrees", str(tmp_path)]) == 2
    assert "expected a commit here" in capsys.readouterr().err
    assert main(["gate", "--base", "HEAD", "--seconds", "-1"]) == 2
    assert not list(tmp_path.iterdir())


def test_gate_pairs_two_sides_of_the_same_build() -> None:
    found = gate.measure(ROOT, ROOT, "cpu", ["token_score_frames"], 0.2, THRESHOLD)
    (pairs,) = found.values()
    assert len(pairs.base) == len(pairs.head) >= gate.LAUNCHES
    assert all(len(b) == len(h) >= gate.MIN_PAIRS for b, h in zip(pairs.base, pairs.head, strict=True))
    slow = gate.judge(gate.measure(ROOT, ROOT, "cpu", ["token_score_frames"], 0.2, THRESHOLD, slower=1.0), THRESHOLD)
    assert slow[0].verdict == SLOWER
    with pytest.raises(ValueError, match="--op: has no_such_op, expected ops that can be measured"):
        gate.measure(ROOT, ROOT, "cpu", ["no_such_op"], 0.1, THRESHOLD)


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    (tmp_path / "hulukern").mkdir()
    (tmp_path / "hulukern" / "__init__.py").write_text("raise RuntimeError('broken build')\n")
    with gate.Side(tmp_path, "cpu") as side, pytest.raises(ValueError, match=r"worker that died \(.*broken build"):
        side.ask(list=None)
