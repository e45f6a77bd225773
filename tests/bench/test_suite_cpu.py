"""Suite cpu: what it writes and refuses, and what it measures memory with."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cpu
from bench.__main__ import main
from bench.results import load_results
from bench.timing import peak_memory

ROOT = Path(__file__).parents[2]
ONLY = "copy_fraction_spatial_merge_backward"
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is measured with glibc")


def test_a_check_is_written_with_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "bench", "run", "--suite", "cpu", "--only", ONLY, "--seconds", "0.1", "--json"]
    done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = load_results(out)
    (found,) = data["checks"]
    assert found["name"] == ONLY
    assert 0 < found["low"] <= found["value"] <= found["high"] < 2
    assert f"{found['value']:.2f}" in done.stdout
    assert {r["impl"] for r in data["rows"]} == {"copy", "cpu"}


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = cpu.call

    def wrong(op: Any, arguments: Any, backend: str) -> Any:
        found = honest(op, arguments, backend)
        return tuple(2 * x for x in found) if backend == "cpu" else found

    monkeypatch.setattr(cpu, "call", wrong)
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: None)  # this process has other tests
    monkeypatch.setattr(cpu, "interleave", lambda *_, **__: pytest.fail("timed"))
    out = tmp_path / "cpu.json"
    assert main(["run", "--suite", "cpu", "--only", ONLY, "--json", str(out)]) == 1
    assert f"{ONLY.removeprefix('copy_fraction_')}: outputs differ by" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "says"), [(["--only", "nonsense"], "'nonsense', which names no check"), (["--seconds", "0"], "above 0")]
)
def test_bad_arguments(more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    assert main(["run", "--suite", "cpu", "--json", str(out), *more]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_peak_memory_sees_what_a_call_frees_again() -> None:
    mib = 1 << 20

    def call() -> torch.Tensor:
        held = torch.ones(64 * mib, dtype=torch.uint8)
        return held[:10].clone()

    assert 60 * mib < peak_memory(call) < 80 * mib
    assert peak_memory(lambda: None) < 8 * mib


def test_freed_memory_is_kept() -> None:
    code = """
import resource, torch
from bench.timing import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def cost():
    before = faults()
    torch.ones(64 << 20, dtype=torch.uint8)
    return faults() - before
given_back = min(cost() for _ in range(4))
keep_freed_memory()
# An aligned request does not fit the piece it freed before until the small pieces around it are in use: a few
# rounds take fresh memory first.
print(given_back, min(cost() for _ in range(32)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
