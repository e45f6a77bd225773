"""README.md says what is true: its tables come from the specs, its code runs, its paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hulukern
from hulukern.backends import BACKENDS
from hulukern.pruning import RULES
from hulukern.validation import dtype_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def op_table() -> str:
    lines = ["| op | what it computes | dtypes | gradient of | backends |", "|---|---|---|---|---|"]
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        dtypes = ", ".join(dtype_name(d) for d in op.dtypes)
        backends = ", ".join(b for b in BACKENDS if b in op.backends)
        lines.append(f"| `{name}` | {op.summary} | {dtypes} | {', '.join(op.differentiable)} | {backends} |")
    return "\n".join(lines)


def rule_table() -> str:
    lines = ["| rule | keeps | threshold | unit |", "|---|---|---|---|"]
    for rule in RULES.values():
        threshold = "" if rule.threshold is None else rule.threshold
        lines.append(f"| `{rule.name}` | {rule.summary} | {threshold} | {rule.units} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("name", "expected"), [("ops", op_table()), ("rules", rule_table())])
def test_tables_are_what_the_specs_say(name: str, expected: str) -> None:
    found = re.search(rf"<!-- {name}:[^>]*-->\n(.*?)\n?<!-- /{name} -->", README, re.S)
    assert found, f"README.md has no section {name}"
    assert found[1] == expected, f"README.md, section {name}, must be:\n{expected}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_python_examples_run(page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    codes = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    names = {"checkpoint": tmp_path / "tiny", "scan": ROOT / "tests/data/totalsegmentator/example_ct_sm.nii.gz"}
    if any("checkpoint" in code for code in codes):
        from model import tiny

        tiny.write(names["checkpoint"])
    for code in codes:
        exec(compile(code, page, "exec"), dict(names))
        if "print(" in code:
            assert capsys.readouterr().out


def test_make_targets_and_files_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        for target in re.findall(r"`make (\w+)", text) + re.findall(r"^    make (\w+)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / link).exists(), link
