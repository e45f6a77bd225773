"""The tuning sweep without a GPU: candidates run under the interpreter, a fake clock says how long they took."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hulukern
from bench import sweep
from bench.__main__ import main
from bench.results import load_results
from bench.timing import Rounds
from hulukern import tuning
from hulukern.backends import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable("triton")), reason=unavailable("triton"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """bias_gelu's performance cases are too much for the interpreter."""
    registered = hulukern.OPS["bias_gelu"]
    case = next(c for c in registered.spec.cases if c.name == "erf")
    monkeypatch.setattr(registered, "spec", dataclasses.replace(registered.spec, perf_cases=(case,), cases=(case,)))


def clock(seconds: Callable[[str], float]) -> sweep.Timer:
    """Runs every candidate once, and says what ``seconds`` says of its label."""

    def timer(runs: Mapping[str, Callable[[int], Any]], sets: int) -> Rounds:
        for call in runs.values():
            call(sets - 1)
        return Rounds({label: [seconds(label)] * 9 for label in runs})

    return timer


@pytest.mark.usefixtures("small")
def test_the_fastest_that_is_right_goes_to_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = list(sweep.find_jobs(["bias_gelu"], DEVICE))
    assert [(j.kernel, j.op.name, j.dtype) for j in jobs] == [("bias_gelu", "bias_gelu", torch.bfloat16)]
    real = sweep.harness.check_forward

    def check_forward(*arguments: Any) -> None:
        assert tuning.row("bias_gelu", 90).warps != 8, "a wrong result"
        real(*arguments)

    monkeypatch.setattr(sweep.harness, "check_forward", check_forward)
    # 8 warps would be fastest, and are refused.
    timer = clock(lambda label: 1.0 if "warps=8" in label else 2.0 if "TILE=8192" in label else 3.0)
    table = tmp_path / "tuning.json"
    assert sweep.sweep(jobs, DEVICE, timer, tmp_path, table, "bench/results/x/sweep.json", math.inf) == []
    (rows,) = tuning.read_rows(table).values()
    (chosen,) = rows.values()
    assert chosen.blocks["TILE"] == 8192
    assert chosen.warps == 4
    assert chosen.why == "bench/results/x/sweep.json"
    report = load_results(tmp_path / "sweep.json")["kernels"]["bias_gelu"]
    assert report["gain"] == pytest.approx(1.5)
    assert [why for label, why in report["refused"].items() if "warps=8" in label] == ["AssertionError: a wrong result"]


@pytest.mark.usefixtures("small")
def test_what_the_time_does_not_allow_is_named(tmp_path: Path) -> None:
    jobs = list(sweep.find_jobs(["bias_gelu"], DEVICE))
    assert sweep.sweep(jobs, DEVICE, clock(len), tmp_path, tmp_path / "t.json", "", -math.inf) == ["bias_gelu"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"now": [2.0] * 9, "other": [1.0] * 9}, ("other", 2.0)),
        ({"now": [2.0] * 9, "other": [2.5] * 9}, ("now", 1.0)),
        ({"now": [2.0] * 9, "other": [1.5, 2.5, 1.5, 2.5, 1.9, 2.5, 1.5, 2.5, 1.9]}, ("now", 1.0)),  # noise
    ],
)
def test_only_what_is_faster_beyond_noise_wins(seconds: dict[str, list[float]], best: tuple[str, float]) -> None:
    assert sweep.winner("now", [Rounds(seconds), Rounds(seconds)]) == pytest.approx(best)


def test_a_table_keeps_what_was_measured_elsewhere(tmp_path: Path) -> None:
    path, row = tmp_path / "t.json", tuning.TABLE["layer_norm"][90]
    sweep.write_table(path, {("layer_norm", 90): row})
    sweep.write_table(path, {("layer_norm", 100): row, ("bias_gelu", 90): row})
    assert tuning.read_rows(path) == {"layer_norm": {90: row, 100: row}, "bias_gelu": {90: row}}
    assert list(json.loads(path.read_text())["layer_norm"]) == ["90", "100"]


ROW = {"blocks": {"TILE": 2048, "PROGRAMS": 1056}, "warps": 4, "stages": 1, "why": "x"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "has no table of rows"),
        ("[]", "has no table of rows"),
        (json.dumps({"layer_norm": {"90": {"warps": 4}}}), "has no table of rows"),
        (json.dumps({"layer_norm": {"90": {**ROW, "blocks": 1}}}), "has no table of rows"),
        (json.dumps({"layer_nrom": {"90": ROW}}), "has a kernel 'layer_nrom', expected one of rope_attention"),
        (json.dumps({"layer_norm": {"91": ROW}}), "has sm_91 for layer_norm"),
        (json.dumps({"layer_norm": {"90": {**ROW, "blocks": {"TILE": 2048}}}}), "has 'TILE=2048 num_warps=4"),
        (json.dumps({"layer_norm": {"90": {**ROW, "warps": "4"}}}), "expected numbers above 0"),
    ],
)
def test_a_table_of_other_kernels_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        tuning.read_rows(path)
    assert str(path) in str(error.value)


def test_rows_in_the_table_name_a_measurement_that_is_there() -> None:
    for kernel, rows in tuning.read_rows(tuning.MEASURED).items():
        for architecture, row in rows.items():
            assert (sweep.ROOT / row.why).exists(), f"{kernel} sm_{architecture}: {row.why}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_sweep_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 2
    assert "has no CUDA device" in capsys.readouterr().err


def test_autotune_settles_a_kernel_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HULUKERN_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_timed", set())
    registered = hulukern.OPS["rope_attention_rotate"]
    monkeypatch.setattr(registered, "implementations", {})
    monkeypatch.setattr(registered, "_resolved", {})
    slow, fast = tuning.Row({"BLOCK_N": 32}, 4, 1, ""), tuning.Row({"BLOCK_N": 8}, 4, 1, "")
    monkeypatch.setitem(tuning.TABLE, "rope_attention_rotate", dict.fromkeys(tuning.ARCHITECTURES, slow) | {80: fast})
    timed = []

    def seconds(kernel: str, chosen: tuning.Row, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        with tuning.trial({kernel: chosen}):
            function(*arguments)
        timed.append(chosen)
        return float(chosen.blocks["BLOCK_N"])

    monkeypatch.setattr(tuning, "_seconds", seconds)
    x, positions = torch.randn(40, 2, 64, device=DEVICE), torch.zeros(40, 2, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        got = hulukern.rope_attention_rotate(x, positions, backend="triton")
        assert torch.allclose(got, x)
    assert timed == [fast, slow]
    architecture = 90 if DEVICE == "cpu" else tuning.nearest(10 * torch.cuda.get_device_capability()[0])
    assert tuning.TABLE["rope_attention_rotate"][architecture] is fast
