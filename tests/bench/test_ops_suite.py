"""Suite ops: cheats are found, runs resume, foreign files are refused; the page shows what the JSON holds."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import hulukern
from bench import contenders, ops, report, roofline
from bench.__main__ import main
from bench.baselines import BASELINES, compiled, eager
from bench.results import load_results
from hulukern.spec import Arguments
from hulukern.testing import harness

OP = hulukern.OPS["token_score_frames"].spec
GROUP = contenders.Group("token_score_frames", OP.perf_cases[0].name, "uint8", "fwd")
CEILINGS = roofline.Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e12, "float16": 1e12})


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda device: CEILINGS)


def honest(a: Arguments) -> Any:
    return harness.call(OP, a, "cpu")


def by_address() -> Callable[[Arguments], Any]:
    known: dict[int, Any] = {}

    def run(a: Arguments) -> Any:
        key = a["frames"].data_ptr()
        if key not in known:
            known[key] = honest(a)
        return known[key]

    return run


def one_buffer() -> Callable[[Arguments], Any]:
    buffer: list[Any] = []

    def run(a: Arguments) -> Any:
        found = honest(a)
        if not buffer:
            buffer.append(found.clone())
        return buffer[0].copy_(found)

    return run


def skips() -> Callable[[Arguments], Any]:
    calls: list[Any] = []

    def run(a: Arguments) -> Any:
        calls.append(a)
        return honest(a) if len(calls) <= 2 else torch.zeros(len(honest(a)))

    return run


@pytest.mark.parametrize(
    ("cheat", "says"),
    [(by_address, "fresh inputs"), (one_buffer, "before timing"), (skips, "after timing")],
)
def test_cheats_are_found(cheat: Callable[[], Any], says: str) -> None:
    reasons: dict[str, str] = {}
    found = [contenders.Contender(n, OP, "fwd", run) for n, run in (("honest", honest), ("cheat", cheat()))]
    rows = contenders.measure(GROUP, found, "cpu", 0.01, reasons)
    assert [r["impl"] for r in rows] == ["honest"]
    assert reasons["cheat"].startswith("wrong")
    assert says in reasons["cheat"]


def test_a_peer_that_computes_something_else_is_found() -> None:
    attention = hulukern.OPS["rope_attention"].spec
    group = contenders.Group("rope_attention", "16x256_d72", "bfloat16", "fwd")
    peer = BASELINES[0].prepare(attention, {})

    def scaled(a: Arguments) -> Any:
        return peer(a | {"scale": 1.5 * a["scale"]})

    def unrotated(a: Arguments) -> Any:
        return peer(a | {"positions_q": torch.zeros_like(a["positions_q"])})

    reasons: dict[str, str] = {}
    found = [
        contenders.Contender(n, attention, "fwd", run) for n, run in (("good", peer), ("a", scaled), ("b", unrotated))
    ]
    rows = contenders.measure(group, found, "cpu", 0.01, reasons)
    assert [r["impl"] for r in rows] == ["good"]
    assert all(reasons[name].startswith("wrong: before timing") for name in "ab"), reasons


@pytest.mark.parametrize("name", ["layer_norm", "spatial_merge", "rope_attention"])
def test_the_careful_user_computes_the_same(name: str) -> None:
    op = hulukern.OPS[name].spec
    run = eager(op)
    assert run is not None
    for case in (c for c in op.cases if "empty" not in c.tags):
        a = harness.sample(op, case, torch.float32, "cpu")
        got, expected = (pytree.tree_leaves(x) for x in (run(a), harness.call(op, a, "reference")))
        for x, y in zip(got, expected, strict=False):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-4, msg=lambda m, case=case: f"{case.name}: {m}")
    assert eager(hulukern.OPS[f"{name}_backward"].spec) is None  # it would run the forward first


def test_compiled_peers_can_be_differentiated_again_and_again() -> None:
    x = torch.randn(8, requires_grad=True)
    y = compiled(lambda x: (x.exp() * x.sin()).sum(), backend="aot_eager")(x)
    for _ in range(2):
        torch.autograd.grad(y, x, retain_graph=True)


def test_a_busy_machine_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    delayed = itertools.count()

    def seconds(call: Callable[[], Any], _: str) -> float:
        call()
        return 1.0 if next(delayed) < 9 else 1e-6

    monkeypatch.setattr(contenders, "_seconds", seconds)
    op = hulukern.OPS["layer_norm"].spec
    group = contenders.Group("layer_norm", "n8192_e1152_residual", "bfloat16", "fwd")
    reasons: dict[str, str] = {}
    run = functools.partial(contenders._through, op, "cpu")
    assert len(contenders.measure(group, [contenders.Contender("cpu", op, "fwd", run)], "cpu", 0.01, reasons)) == 1
    assert reasons == {}


def test_an_interrupted_run_is_whole_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.json"
    wanted = contenders.Filter(
        ops=["token_score_frames"], dtypes=["uint8", "int16"], backends=["cpu"], baselines=["torch"]
    )
    suite = ops.Suite(path, wanted, "cpu")
    run = suite.run(0.01)
    first = next(run)
    run.close()
    suite.save()
    data = load_results(path)
    assert not data["complete"]
    assert {r["dtype"] for r in data["rows"]} == {first.dtype}
    again = ops.Suite(path, wanted, "cpu", resume=True)
    assert len(again.left) == len(suite.groups) - 1
    list(again.run(0.01))
    data = load_results(path)
    assert data["complete"]
    assert len(data["rows"]) == len(data["roofline"]) == 4

    text = path.read_text()
    path.write_text(json.dumps(data | {"meta": data["meta"] | {"torch": "1.0"}}))
    with pytest.raises(ValueError, match=r"o\.json: has torch 1\.0, expected"):
        ops.Suite(path, wanted, "cpu", resume=True)
    for foreign, says in ((text[:50], "cannot be read"), (text.replace('"ops"', '"e2e"'), "another suite")):
        path.write_text(foreign)
        assert main(["run", "--suite", "ops", "--op", "token_score", "--json", str(path)]) == 2
        assert says in capsys.readouterr().err
        assert path.read_text() == foreign


@pytest.mark.parametrize("option", ["--op", "--case", "--dtype", "--backend", "--baseline"])
def test_unknown_names_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.json"
    assert main(["run", "--suite", "ops", option, "nonsense", "--json", str(path)]) == 2
    assert f"{option}: has 'nonsense', expected one of" in capsys.readouterr().err
    assert not path.exists()


def test_gap_and_light() -> None:
    common = {"op": "x", "case": "c", "dtype": "float32", "direction": "fwd", "bytes": 10**7, "flops": 0}
    rows = [common | {"impl": "cpu", "median_s": 2e-3}, common | {"impl": "torch", "median_s": 5e-3}]
    ours, peer = roofline.annotate(rows, CEILINGS, None)
    assert ours == pytest.approx(
        {"light_s": 1e-3, "of_measured": 0.5, "of_datasheet": None, "faster": 2.5, "gap_closed": 0.75}
    )
    assert peer["gap_closed"] is None


# --- the page ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "measure", lambda device: CEILINGS)
        wanted = contenders.Filter(ops=["token_score_frames"], dtypes=["uint8"], backends=["cpu"], baselines=["torch"])
        list(ops.Suite(folder / "a.json", wanted, "cpu").run(0.01))
    data = json.loads((folder / "a.json").read_text())
    later = data["meta"] | {"commit": "later", "time": "2999"}
    (folder / "b.json").write_text(json.dumps(data | {"meta": later}))
    points = [
        {
            "input": "mr",
            "rule": "budget",
            "reduction": r,
            "median_s": 1 - r,
            "gain": 1 / (1.1 - r),
            "ideal": 1 / (1 - r),
        }
        for r in (0.0, 0.55, 0.9)
    ]  # fmt: skip
    gain = {"name": "e2e_gain_at_55_mr", "value": 1.8, "low": 1.7, "high": 1.9, "target": 1.0, "met": True}
    e2e = {"meta": data["meta"], "rows": [], "checks": [gain], "suite": "e2e", "curve": points}
    (folder / "c.json").write_text(json.dumps(e2e))
    assert main(["report", str(folder), "-o", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_every_number_of_the_page_is_in_the_json(page: Path) -> None:
    text, numbers, words = page.read_text(), set(), set()

    def walk(x: Any) -> None:
        if isinstance(x, dict | list):
            for v in x.values() if isinstance(x, dict) else x:
                walk(v)
        elif isinstance(x, int | float):
            numbers.add(float(x))
        else:
            words.add(str(x))

    for name in ("a", "b", "c"):
        walk(json.loads((page.parent / f"{name}.json").read_text()))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text) + re.findall(r"<b>([\d.]+) ms</b>", text)
    assert len(cells) > 30
    for part in (p for cell in cells for p in re.sub(r" %$", "", cell).split(" .. ")):
        if re.fullmatch(r"-?\d+(\.\d+)?", part):
            places = len(part.partition(".")[2])
            scaled = (x * s for x in numbers for s in (1, 1e3, 100, 1e-9, 1e-12))
            assert any(f"{x:.{places}f}" == part for x in scaled), part
        else:
            assert part in words | {"", "yes", "no", "measured", "datasheet"}, part
    assert "History" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "the page loads something"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on PATH")
def test_the_page_fits_phone_and_desktop_in_light_and_dark(page: Path, tmp_path: Path) -> None:
    """In frames, since a headless window has a least width of its own."""
    inner = page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{inner}"></iframe>' for w in (420, 1200))
    script = (
        "onload=()=>{document.title=[...document.querySelectorAll('iframe')].map(f=>{const d=f.contentDocument;"
        "return d.documentElement.scrollWidth<=d.documentElement.clientWidth?'fits':'wide'}).join(' ')"
        "+' '+getComputedStyle(document.querySelector('iframe').contentDocument.body).backgroundColor}"
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<meta charset=utf-8><title></title>{frames}<script>{script}</script>")
    titles = []
    for scheme in (1, 0):  # light, dark
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
             f"--blink-settings=preferredColorScheme={scheme}",
             "--virtual-time-budget=3000", "--dump-dom", wrapper.as_uri()],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        found = re.search(r"<title>(.*?)</title>", done.stdout)
        assert found
        titles.append(found[1])
    assert all(title.startswith("fits fits rgb") for title in titles), titles
    assert titles[0] != titles[1]


def test_the_report_refuses_what_is_not_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, out = tmp_path / "bad.json", tmp_path / "page.html"
    bad.write_text("{")
    assert main(["report", str(bad), "-o", str(out)]) == 2
    assert "bad.json: has content that cannot be read" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing"), "-o", str(out)]) == 2
    assert not out.exists()
    assert report.significant(0.00123) == "0.00123"


def test_a_lost_device_ends_a_run_that_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, seen = tmp_path / "a.json", iter(["", "an illegal memory access"])
    monkeypatch.setattr(ops, "measure", lambda *_: [])
    with monkeypatch.context() as context:
        context.setattr(ops, "_lost", lambda _: next(seen))
        command = ["run", "--suite", "ops", "--op", "token_score_frames", "--op", "token_score", "--json", str(path)]
        assert main(command) == 2
    assert "an illegal memory access" in capsys.readouterr().err
    data = load_results(path)
    assert not data["complete"]
    assert list(data["reasons"].values())[1]["all"].startswith("wrong: the device is lost")
    assert main([*command, "--resume"]) == 1  # that group stays wrong
    assert load_results(path)["complete"]


def test_no_group_begins_after_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "measure", lambda *_: [])
    path = tmp_path / "a.json"
    assert main(["run", "--suite", "ops", "--op", "token_score", "--json", str(path), "--limit", "1e-9"]) == 0
    assert load_results(path)["reasons"] == {}
    assert "no time for: token_score/" in capsys.readouterr().out
    assert main(["run", "--suite", "ops", "--op", "token_score", "--json", str(path), "--limit", "0"]) == 2
