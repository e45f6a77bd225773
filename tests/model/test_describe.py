"""``python -m model describe``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from writers import write_nifti, write_video

from model import describe
from model.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "totalsegmentator"


def test_the_numbers_of_a_volume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(DATA / "example_ct_sm.nii.gz"), "--window", "soft_tissue", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["form"], found["plane"]) == ("volume", "NIfTI", "axial")
    assert found["size"] == [101, 122]
    assert found["spacing_mm"] == pytest.approx([3, 3, 3])
    assert found["grid"] == [30, found["resized"][0] // 14, found["resized"][1] // 14]
    assert found["tokens"] == found["grid"][0] * found["grid"][1] * found["grid"][2] // 4
    kept = {rule["rule"]: rule["tokens"] for rule in found["rules"]}
    assert list(kept) == ["released", "videollama3", "previous", "bounded", "budget"]
    assert kept["released"] < kept["previous"] < kept["videollama3"] <= found["tokens"]
    assert kept["budget"] == round(0.45 * found["tokens"])


def test_a_sheet_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_video(tmp_path / "v.mp4", frames=30, rate=10)
    Image.new("L", (64, 48)).save(tmp_path / "x.png")
    sheet = tmp_path / "sheet.png"
    files = [str(video), str(tmp_path / "x.png")]
    assert main(["describe", *files, "--fps", "2", "--rule", "previous", "--out", str(sheet)]) == 0
    shown = capsys.readouterr().out
    assert "video, video" in shown
    assert "times      0.0 .. 2.5 s" in shown
    assert "released" not in shown
    with Image.open(sheet) as image:
        assert image.format == "PNG"


def test_dropped_cells_are_red(tmp_path: Path) -> None:
    values = np.zeros((112, 112, 2), np.int16)
    values[:56, :56] = 100  # the same in both slices
    path = write_nifti(tmp_path / "a.nii", values)
    _, (sheet,) = describe.describe(str(path), describe.Reading(), ["previous"])
    pixels = np.asarray(sheet)[-200:].astype(int)
    red = (pixels[..., 0] - pixels[..., 1]) > 40
    assert not red[:, : red.shape[1] // 2 - 8].any()
    assert red[:, red.shape[1] // 2 + 8 :].mean() > 0.8


def test_rows_and_columns_of_different_mm_become_square(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", np.zeros((140, 140, 40), np.int16), np.diag([1.0, 1, 3.5, 1]))
    found, _ = describe.describe(str(path), describe.Reading(axis="coronal"), [])
    assert found.size == (40, 140)
    assert found.resized == (140, 140)
    as_stored, _ = describe.describe(str(path), describe.Reading(axis="coronal", released=True), [])
    assert as_stored.resized[0] / as_stored.resized[1] > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.dcm"], "none.dcm: has nothing there, expected a file or a folder"),
        ([str(ROOT / "README.md")], "has an unknown type"),
        ([str(DATA / "example_ct_sm.nii.gz"), "--out", "none/a.png"], "has no folder none"),
        (["x", "--fps", "0"], "expected a number above 0, or all"),
        (["x", "--fps", "fast"], "expected a number above 0, or all"),
        (["x", "--window", "5:5"], "LO below HI"),
        (["x", "--axis", "oblique"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["describe", *arguments])
    except SystemExit as stop:  # argparse's own
        code = int(str(stop.code))
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_takes_long_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(describe, "SLOW_S", 0.0)
    assert main(["describe", str(DATA / "example_ct_sm.nii.gz"), "--json"]) == 0
    out, error = capsys.readouterr()
    assert "reading" in error
    json.loads(out)


def test_help_has_examples_and_loads_nothing_else() -> None:
    run = [sys.executable, "-m", "model"]
    shown = subprocess.run([*run, "describe", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown
    probe = "import sys, model.__main__ as m; m.main(['--help'])"
    lazy = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {probe}"
    listed = subprocess.run([sys.executable, "-c", lazy], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed.endswith("False\n")
    assert all(name in listed for name in COMMANDS)
