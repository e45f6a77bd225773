"""The GitHub Action, run as a runner would: its step's script with its inputs in the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text())


def run_action(folder: Path, **inputs: str) -> tuple[int, str, dict[str, str]]:
    (step,) = ACTION["runs"]["steps"]
    known = {name: spec.get("default") for name, spec in ACTION["inputs"].items()}
    known |= {name.replace("_", "-"): value for name, value in inputs.items()}
    places = {f"inputs.{name}": value for name, value in known.items()}
    places["github.action_path"] = str(ROOT / ".github/actions/gate")

    def filled(text: str) -> str:
        for place, value in places.items():
            text = text.replace(f"${{{{ {place} }}}}", str(value))
        return text

    environment = {name: filled(value) for name, value in step["env"].items()}
    for file in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        environment[file] = str(folder / file)
        (folder / file).write_text("")
    done = subprocess.run(
        ["bash", "-c", step["run"]], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    written = {file: (folder / file).read_text() for file in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    return done.returncode, done.stdout + done.stderr, written


def benchmark_file(path: Path, seconds: float, spread: float = 0.002) -> None:
    stats = {
        "median": seconds, "q1": seconds * (1 - spread), "q3": seconds * (1 + spread), "min": seconds * (1 - spread),
        "rounds": 20,
    }  # fmt: skip
    entry = {"fullname": "bench/test_x.py::test_x", "stats": stats}
    path.write_text(json.dumps({"machine_info": {"cpu": {"brand_raw": "c", "count": 2}}, "benchmarks": [entry]}))


@pytest.mark.parametrize(
    ("ratios", "code", "verdict"),
    [
        ((1.0, 1.01, 0.99, 1.0, 1.0, 1.0), 0, "pass"),
        ((1.2, 1.1, 1.15, 1.1, 1.3, 1.1), 1, "slower"),
        ((1.2, 1.0, 1.1, 0.9, 1.0, 1.0), 2, "unknown"),
        ((1.1,), 1, "slower"),
    ],
)
def test_files_in_turns(ratios: tuple[float, ...], code: int, verdict: str, tmp_path: Path) -> None:
    for i, ratio in enumerate(ratios):
        drift = 1 + i / 2  # in both of a pair
        benchmark_file(tmp_path / f"base-{i}.json", drift)
        benchmark_file(tmp_path / f"head-{i}.json", drift * ratio)
    found, said, written = run_action(tmp_path, base="base-*.json", head="head-*.json")
    assert found == code, said
    assert written["GITHUB_OUTPUT"] == f"verdict={verdict}\n"
    assert "### Performance" in written["GITHUB_STEP_SUMMARY"]
    assert "test_x" in (tmp_path / "performance.xml").read_text()
    if code == 2:
        assert run_action(tmp_path, base="base-*.json", head="head-*.json", allow_ambiguous="true")[0] == 0


def test_what_cannot_be_judged_never_passes(tmp_path: Path) -> None:
    for i in range(3):
        benchmark_file(tmp_path / f"base-{i}.json", 1.0)
    (tmp_path / "broken.json").write_text("{")
    for head, says in (
        ("head-*.json", "base matches 3 files and head 0"),
        ("base-*.json", "have 3 pairs of base and head, expected 1 or at least 6"),
    ):
        code, said, written = run_action(tmp_path, base="base-*.json", head=head, allow_ambiguous="true")
        assert (code, written["GITHUB_OUTPUT"]) == (2, "verdict=unknown\n")
        assert says in said
    code, said, _ = run_action(tmp_path, base="base-0.json", head="broken.json", allow_ambiguous="true")
    assert code == 2
    assert "broken.json: has content that cannot be read" in said


def test_a_projects_own_bench_folder_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/__init__.py").write_text("raise RuntimeError")
    benchmark_file(tmp_path / "base.json", 1.0)
    code, said, _ = run_action(tmp_path, base="base.json", head="base.json")
    assert code == 0, said


@pytest.mark.parametrize("allow", ["true", "false"])
def test_a_report_that_cannot_be_written_passes_nothing(allow: str, tmp_path: Path) -> None:
    benchmark_file(tmp_path / "base.json", 1.0)
    benchmark_file(tmp_path / "head.json", 1.3)
    (tmp_path / "folder").mkdir()
    inputs = {"base": "base.json", "head": "head.json", "allow_ambiguous": allow}
    assert run_action(tmp_path, junit="", **inputs)[0] == 1
    code, _, written = run_action(tmp_path, junit="folder", **inputs)
    assert (code, written["GITHUB_OUTPUT"]) == (2, "verdict=unknown\n")


def test_a_crash_is_not_called_slower(tmp_path: Path) -> None:
    benchmark_file(tmp_path / "base.json", 1.0)
    benchmark_file(tmp_path / "zero.json", 0.0)
    code, said, written = run_action(tmp_path, base="base.json", head="zero.json")
    assert (code, written["GITHUB_OUTPUT"]) == (2, "verdict=unknown\n")
    assert "zero.json: bench/test_x.py::test_x has a time of 0.0" in said
    code, _, written = run_action(tmp_path, base="base.json", head="base.json", junit="base.json/x.xml")
    assert (code, written["GITHUB_OUTPUT"]) == (2, "verdict=unknown\n")


def test_pairs_of_another_device_are_refused(tmp_path: Path) -> None:
    for i in range(6):
        benchmark_file(tmp_path / f"base-{i}.json", 1.0)
        benchmark_file(tmp_path / f"head-{i}.json", 1.0)
    for name in ("base-5.json", "head-5.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace('"c"', '"another"'))
    code, said, _ = run_action(tmp_path, base="base-*.json", head="head-*.json")
    assert code == 2
    assert "base-5.json: has times of 'another, 2 cores'" in said


def test_comparing_files_needs_python_alone(tmp_path: Path) -> None:
    for name in ("base", "head"):
        benchmark_file(tmp_path / f"{name}.json", 1.0)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "bench", "compare", str(tmp_path / "base.json"), str(tmp_path / "head.json")],
        cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_recipe_names_what_the_action_has() -> None:
    text = (ROOT / "docs/gate.md").read_text()
    blocks = [yaml.safe_load(block.split("```")[0]) for block in text.split("```yaml\n")[1:]]
    steps = [step for block in blocks for step in block if "actions/gate" in step.get("uses", "")]
    assert len(steps) == 2
    for step in steps:
        assert set(step["with"]) <= set(ACTION["inputs"])
        assert {name for name, spec in ACTION["inputs"].items() if spec.get("required")} <= set(step["with"])
