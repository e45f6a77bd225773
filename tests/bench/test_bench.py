"""The main job and the device run as commands: what they write, print and refuse."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hulukern
from bench import baselines, report
from bench.__main__ import COMMANDS, main
from bench.results import check, load_results, row, write_results
from bench.timing import Timing, interleave, interleave_cuda, summarize
from hulukern.pruning import RULES, prune_frames

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quick")
    clip = folder / "frames"
    clip.mkdir()
    from PIL import Image

    for t in range(3):
        Image.fromarray(np.random.default_rng(t).integers(0, 256, (60, 90), np.uint8)).save(clip / f"{t}.png")
    out = folder / "out"
    arguments = ("--seconds", "0.2", "--max-frames", "6", "--input", str(clip), "--out", str(out))
    done = bench("quick", *arguments, "--picture", str(folder / "p.png"))
    assert done.returncode == 0, done.stderr
    assert (folder / "p.png").stat().st_size > 1000
    return out, done.stdout


def test_quick_writes_rows_and_checks_for_every_input_rule_and_op(quick: tuple[Path, str]) -> None:
    data = load_results(quick[0] / "quick.json")
    names = {i["name"] for i in data["inputs"]}
    assert names == {"echo", "echo-1fps", "echo-4s-1fps", "mr", "frames"}
    assert {(o["input"], o["rule"]) for o in data["pruning"]} == {(n, r) for n in names for r in (*RULES, "random")}
    checks = {c["name"]: c for c in data["checks"]}
    assert {"frontend_vs_torch", "call_overhead_us", "reduction_mr_previous", "copy_share_token_compact"} <= set(checks)
    for o in data["pruning"]:
        assert o["reduction"] == pytest.approx(1 - o["after"] / o["before"])
        if o["rule"] == "bounded":
            assert o["drift_max"] <= 0.1 + 1e-6
            assert o["lost"] == 0
        if o["rule"] == "budget":
            assert o["after"] == o["before"] * 45 // 100
            assert checks[f"reduction_{o['input']}_budget"]["met"]
    for r in data["rows"]:
        assert 0 < r["low_s"] <= r["median_s"] <= r["high_s"]


def test_quick_prints_every_rule_and_where_it_wrote(quick: tuple[Path, str]) -> None:
    out, text = quick
    for word in (*RULES, "random", "frontend_vs_torch", "55 %", str(out / "quick.json"), str(out / "report.html")):
        assert word in text, word


def test_every_number_in_the_report_is_in_the_json(quick: tuple[Path, str]) -> None:
    page = (quick[0] / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page loads something"
    data = load_results(quick[0] / "quick.json")
    for table in (report.pruning_table(data), report.op_table(data), report.check_table(data)):
        for line in table:
            for cell in line:
                assert f">{cell}</t" in page
    assert page.count("<figure>") == len(data["inputs"]) * len(RULES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quick", "--input", "/nowhere/x.dcm"), "/nowhere/x.dcm: has nothing there, expected"),
        (("quick", "--input", str(ROOT / "README.md")), "an unknown type"),
        (("quick", "--seconds", "0"), "expected above 0"),
        (("quick", "--seconds", "nan"), "expected above 0"),
        (("quick", "--max-frames", "-1"), "expected above 0"),
        (("quick", "--out", str(ROOT / "README.md")), "expected a folder"),
        (("device", "--seconds", "-1"), "expected above 0"),
        (("device", "--limit", "nan"), "expected above 0"),
        (("device", "--device", "cpu", "--baseline", "nobody"), "expected one of"),
        (("run", "--suite", "gpu", "--op", "bias_gelu"), "expected ops"),
        (("nonsense",), "invalid choice"),
        ((), "required"),
    ],
)
def test_bad_arguments_exit_2_without_a_traceback(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    out = () if "--out" in arguments or arguments[:1] != ("quick",) else ("--out", str(tmp_path / "out"))
    done = bench(*arguments, *out)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "half-written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_device_run_without_a_gpu_says_so() -> None:
    done = bench("device", "--stage", "ops")
    assert done.returncode == 2
    assert "has no CUDA device" in done.stderr


def test_device_run_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    quick = ("--stage", "ops", "--stage", "counters", "--seconds", "0.01", "--baseline", "torch")
    done = bench("device", "--device", "cpu", *quick, "--op", "token_score", "--op", "layer_norm", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = load_results(tmp_path / "device.json")
    found = {(r["op"], r["direction"], r["impl"]) for r in data["rows"]}
    assert {("token_score", "fwd", "cpu"), ("layer_norm", "bwd", "cpu"), ("layer_norm", "fwd", "torch")} <= found
    assert data["complete"]
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert (stages["failures"], stages["stopped"], list(stages["stages"])) == ([], [], ["ops"])
    assert "=== device" in (tmp_path / "log.txt").read_text()
    assert "of light" in done.stdout
    from bench.device import smallest_of_each

    smallest_of_each("cpu")


def test_stages_share_the_time() -> None:
    from bench.device import LIMIT_S, ON_DEMAND, STAGES, shares

    whole = [name for name in STAGES if name not in ON_DEMAND]
    assert shares(whole, LIMIT_S) == pytest.approx({name: STAGES[name] for name in whole})
    assert shares(["ops"], 540.0) == {"ops": 540.0}
    found = shares(["tests", "sanitizer", "model"], 230.0)  # the first two side by side
    assert found["tests"] + found["model"] == pytest.approx(230.0)
    assert found["sanitizer"] == found["tests"]


def test_a_stage_goes_on_behind_a_lost_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import device

    said, commands = iter([("bench: the device; --resume goes on", 2), ("done", 0)]), []
    monkeypatch.setattr(device, "capture", lambda command, *_: commands.append(command) or next(said))
    options = argparse.Namespace(op=["token_score"], device="cpu", seconds=0.1)
    log = device.Log(tmp_path / "log.txt")
    assert device.run_ops(options, ["torch"], tmp_path / "device.json", log, 60.0) == {"exit_code": 0}
    assert ["--resume" in command for command in commands] == [False, True]
    assert "the device; --resume" in log.path.read_text()


@pytest.mark.parametrize(("fresh", "code"), [(True, 1), (False, 0)])
def test_what_a_stopped_stage_found_wrong_is_no_success(
    fresh: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import device

    def leave() -> None:
        wrong = {"reasons": {"layer_norm/x/bfloat16/fwd": {"cpu": "wrong: off by 0.9"}}}
        write_results(tmp_path / "device.json", [], [], suite="ops", roofline=[], **wrong)

    def stopped(*_: object) -> tuple[str, int]:
        if fresh:
            leave()
        return "stopped", 124

    if not fresh:  # an earlier run's says nothing of this one
        leave()
        os.utime(tmp_path / "device.json", (0, 0))
    monkeypatch.setattr(device, "capture", stopped)
    assert main(["device", "--device", "cpu", "--stage", "ops", "--out", str(tmp_path)]) == code
    said = capsys.readouterr().out
    assert ("off by 0.9" in said) == fresh
    assert ("of light" in said) == fresh
    assert json.loads((tmp_path / "stages.json").read_text())["stopped"] == ["ops"]


def test_an_interrupted_device_run_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "device", "--device", "cpu", "--stage", "ops", "--out", str(tmp_path)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline().endswith("ops\n")

    def children() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(path.read_text().replace("\0", " "))
        return [line for line in found if "--suite ops" in line and str(tmp_path) in line]

    deadline = time.monotonic() + 30
    while not children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 2
    assert not children()


def test_ncu_beside_the_pins_as_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import counters, device

    def ncu(command: list[str], *_: object) -> tuple[str, int]:
        head = ["ID", "Kernel Name", *counters.COUNTERS]
        lines = [head, ["0", "_ZN2hk9not_thereE", *["1"] * len(counters.COUNTERS)]]
        text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
        Path(command[command.index("--log-file") + 1]).write_text(text)
        return "stopped", 124

    monkeypatch.setattr(device, "capture", ncu)
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = device.run_counters(tmp_path, device.Log(tmp_path / "log.txt"), 1.0)
    assert found == {"exit_code": 124, "kernels": 1, "pinned": 0, "differ": 0}
    assert json.loads((tmp_path / "counters.json").read_text())[0]["ncu"]["registers"] == 1
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert "absent" in device.run_counters(tmp_path, device.Log(tmp_path / "log.txt"), 1.0)


def test_what_runs_too_long_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import device

    monkeypatch.setattr(device, "GRACE_S", 0.5)
    left = tmp_path / "left"
    text, code = device.capture(
        ["bash", "-c", f"trap '' INT; echo begun; (sleep 2; touch {left}) & sleep 60"], 0.5, dict(os.environ)
    )
    assert code == 124
    assert text.splitlines()[0] == "begun"
    assert "stopped after" in text
    time.sleep(2.5)
    assert not left.exists(), "a child went on"


def test_no_two_calls_on_a_gpu_share_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would find in the caches what the first left there."""

    class Event:
        def __init__(self, **_: object) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, _: object) -> float:
            return 1.0

    for name, stand_in in (("Event", Event), ("synchronize", lambda: None), ("_sleep", lambda _: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    sets: list[int] = []
    rounds = interleave_cuda({"a": sets.append, "b": sets.append, "c": sets.append}, sets=4, seconds=0.0)
    timed = sets[-sum(len(v) for v in rounds.seconds.values()) :]
    assert len(timed) == 21
    assert all(x != y for x, y in itertools.pairwise(timed))
    assert set(timed) == {0, 1, 2, 3}


def test_device_script_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "bench/device.sh")], check=True)
    assert os.access(ROOT / "bench/device.sh", os.X_OK)


def test_the_baseline_front_end_is_the_references() -> None:
    frames = torch.randint(0, 256, (4, 56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    patches, keep = baselines.frontend(frames)
    assert torch.equal(keep, prune_frames(frames, rule="previous", backend="reference").keep)
    assert patches.shape == (int(keep.sum()), 4 * 588)


def test_intervals_are_order_statistics() -> None:
    t = summarize([float(i) for i in range(1, 101)])
    assert (t.median, t.low, t.high, t.n) == (50.5, 40, 61, 100)
    assert summarize([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        s = summarize(rng.exponential(size=25).tolist())
        inside += s.low <= math.log(2) <= s.high
    assert inside / 400 > 0.93
    with pytest.raises(ValueError, match="0 entries"):
        summarize([])


def test_implementations_take_turns_and_results_are_not_reused() -> None:
    calls: list[str] = []

    def run(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(4)

    rounds = interleave({n: (lambda n=n: run(n)) for n in "ab"}, seconds=0, min_rounds=9, warmups=1)
    assert len(rounds.seconds["a"]) == len(rounds.seconds["b"]) == 9
    for i in range(0, len(calls), 2):
        assert set(calls[i : i + 2]) == {"a", "b"}
    assert {calls[i] for i in range(2, len(calls), 2)} == {"a", "b"}, "the order never changed"


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    t = Timing(2.0, 1.0, 3.0, 7)
    write_results(path, [row("op", "c", "f32", "fwd", "cpu", t, 8)], [check("x", 1.0, 0.9, 1.1, 1.05)], more=1)
    before = path.read_text()
    assert not load_results(path)["checks"][0]["met"]
    with pytest.raises(ValueError, match=r"rows\[0\]"):
        write_results(path, [{"op": "x"}], [])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, [], [check("x", float("nan"), 0, 0, 1)])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [], "checks": {}}', json.dumps({"rows": [1], "checks": []})])
def test_foreign_result_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json: .*expected"):
        load_results(path)


def test_list_and_profile(tmp_path: Path) -> None:
    listed = json.loads(bench("list", "--json").stdout)
    assert {e["op"] for e in listed} == set(hulukern.OPS)
    for e in listed:
        assert e["backends"]["reference"] == "runs"
        assert all(e["backends"].values())
    done = bench("profile", "token_score_frames", "--backend", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "us a call, of which:" in done.stdout
    assert "hulukern::token_score_frames" in done.stdout
    (trace,) = tmp_path.iterdir()
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(command: str) -> None:
    shown = bench(command, "--help")
    assert shown.returncode == 0
    assert "examples:" in shown.stdout
    assert "exit codes:" in shown.stdout
