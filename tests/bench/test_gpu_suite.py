"""Suite gpu as it is rehearsed without a GPU, what it counts, and ncu's counters beside the static pins."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import counters, gpu, models
from bench.__main__ import main
from bench.results import load_results
from bench.roofline import Ceilings
from bench.static import cuda_rows, pins, triton_rows


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ceilings nor a compiled peer are what is tested."""
    monkeypatch.setattr(gpu.roofline, "measure", lambda device: Ceilings(1e10, {"bfloat16": 1e11, "float32": 1e10}))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_rehearsal_measures_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(path, "", 0.0) == 0
    data, said = load_results(path), capsys.readouterr().out
    assert data["failures"] == {}
    rows = {(r["op"], r["impl"]): r for r in data["rows"]}
    for T in gpu.REHEARSAL.frames:
        for impl in ("cpu", "transformers", "transformers compiled"):
            found = rows[f"encoder_bf16_{T}f", impl]
            assert found["flops"] == models.flops(2, T, 4, gpu.SMALL)
            assert found["median_s"] > 0
    assert rows["train_step_bf16_2f", "cpu"]["flops"] == 3 * models.flops(2, 2, 4, gpu.SMALL)
    assert {(e["batch"], e["part"], e["reduction"]) for e in data["curve"]} == {
        (B, part, r)
        for B, _ in gpu.REHEARSAL.batches
        for part in ("mask", "encoder", "prefill", "first token")
        for r in gpu.REDUCTIONS
        if r or part != "mask"
    }
    assert all(e["gain"] == 1.0 for e in data["curve"] if e["reduction"] == 0)
    assert {m["op"].split(",")[0] for m in data["memory"]} >= {"encoder_bf16_2f", "train_step_bf16_2f", "first token"}
    assert data["profiles"]["encoder_bf16_2f/cpu"]
    assert "gain" in said
    (tmp_path / "stages.json").write_text('{"stages": {}}')  # as a device run leaves it beside
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "first token, batch" in page
    assert "of the matmul" in page
    assert "of the matmul's rate" in said


def test_fewer_tokens_reach_the_decoder() -> None:
    """And as many of each clip, so that none is padded."""
    suite = gpu.Suite(gpu.REHEARSAL, "cpu")
    seen: list[tuple[int, ...]] = []
    suite._whole.model.layers[0].register_forward_pre_hook(lambda _, a: seen.append(tuple(a[0].shape[:2])))
    suite.reduction(2, 6, 0.0)
    cells = 6 * 4
    assert set(seen) == {(2, round((1 - r) * cells) + gpu.PROMPT_TOKENS) for r in gpu.REDUCTIONS}


@pytest.mark.parametrize("theta", [1e30, 3.0], ids=["all but one pair not turned", "other angles"])
def test_a_model_that_computes_something_else_is_not_timed(
    theta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted(*arguments: Any) -> Any:
        ours, theirs = models.encoders(*arguments)
        for layer in ours.encoder.layers:
            layer.self_attn.theta = theta
        return ours, theirs

    monkeypatch.setattr(gpu, "encoders", planted)
    assert gpu.main(tmp_path / "gpu.json", "encoder_2f", 0.0) == 1
    data = load_results(tmp_path / "gpu.json")
    assert data["rows"] == []
    assert "outputs differ" in data["failures"]["encoder_2f"]
    assert "failures: encoder_2f" in capsys.readouterr().out


def test_flops_are_those_that_torch_counts() -> None:
    _, theirs = models.encoders(2, "cpu", gpu.SMALL)
    theirs.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        theirs(models.patches(3, 4), torch.tensor([[3, 4, 4]]), torch.tensor([2]))
    assert models.flops(2, 3, 4, gpu.SMALL) == counted.get_total_flops()


def test_only_what_is_there_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(tmp_path / "gpu.json", "nonsense", 0.0) == 2
    assert "nonsense" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_seven_billion() -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.whole({}, models.DECODER_7B, torch.bfloat16, "meta").parameters())
    assert 7.9e9 < parameters < 8.2e9  # of which 0.43 are the encoder's and the projector's, untied as released
    with pytest.raises(ValueError, match="7b or WIDTHxLAYERS"):
        models.decoder_shape("100x4")


# --- ncu ------------------------------------------------------------------------------------------------------

CUDA = "bias_gelu/bias_gelu_rows<bfloat16, bytes=16, tanh=1, backward=0>"
MANGLED = "_ZN2hk14bias_gelu_rowsILi5ELi16ELb1ELb0EEEvNS_12BiasGeluWalkE"
TRITON = "bias_gelu/tanh/bfloat16/bias_gelu_kernel"


def _ncu(*launches: tuple[str, dict[str, Any]]) -> str:
    """As ncu writes raw pages in base units."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Process ID", "Kernel Name", *counters.COUNTERS])
    writer.writerow(["", "", "", *["unit"] * len(counters.COUNTERS)])
    for i, (name, values) in enumerate(launches):
        writer.writerow([i, 1, name, *[values.get(to, "n/a") for to in counters.COUNTERS.values()]])
    return f"==PROF== Connected to process 1\n{out.getvalue()}"


def _as(pin: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = {
        "registers": pin["registers"],
        "threads": f"{pin['threads']:,}",
        "static_shared_bytes": pin["shared_bytes"],
    }
    return {**values, "dynamic_shared_bytes": 0, "occupancy_percent": 100 * pin["occupancy"], **more}


def test_counters_beside_pins() -> None:
    cuda = pins.load(pins.path_of("cuda", "sm_90a"))[cuda_rows.toolchain(90)][CUDA]
    triton = pins.load(pins.path_of("triton", "sm_90"))[triton_rows.toolchain(90)][TRITON]
    order = [{"kernel": "bias_gelu_kernel", "label": TRITON}]
    text = _ncu(
        (MANGLED, _as(cuda)),
        ("bias_gelu_kernel", _as(triton, registers=triton["registers"] + 8, time_ns="1,500")),
        ("_ZN2at6native13reduce_kernelE", _as(cuda)),
    )
    ours, theirs = counters.compare(text, order, 90)
    assert (ours["backend"], ours["kernel"], ours["differs"]) == ("cuda", CUDA, {})
    assert theirs["differs"] == {"registers": {"pin": triton["registers"], "ncu": triton["registers"] + 8}}
    assert theirs["ncu"]["time_ns"] == 1500
    shown = counters.table([ours, theirs])
    assert "as pinned" in shown
    assert f"registers {triton['registers']} pinned" in shown


def test_pins_of_another_compiler_judge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = pins.load(pins.path_of("cuda", "sm_90a"))[cuda_rows.toolchain(90)][CUDA]
    monkeypatch.setattr(counters.cuda_rows, "toolchain", lambda _: "nvcc 14")
    (found,) = counters.compare(_ncu((MANGLED, _as(cuda))), [], 90)
    assert (found["pinned"], found["differs"]) == (False, {})
    assert "no pin" in counters.table([found])


def test_a_line_that_was_cut_is_left_out() -> None:
    text = _ncu((MANGLED, {"registers": 80}), (MANGLED, {"registers": 81}))
    assert [c["registers"] for _, c in counters.read(text)] == [80, 81]
    assert [c["registers"] for _, c in counters.read(text[: text.rindex('"81"')])] == [80]


def test_what_ncu_could_not_do_is_said() -> None:
    with pytest.raises(ValueError, match="ncu: has no table"):
        counters.compare("==ERROR== LibraryNotLoaded\n", [], 90)


def test_launches_of_one_name_are_told_apart() -> None:
    class Kernel:
        def __init__(self, name: str) -> None:
            self.metadata = type("Meta", (), {"name": name})

    a, b, c = Kernel("sum"), Kernel("sum"), Kernel("rows")
    assert [row for _, row in counters._numbered([a, c, b, a])] == ["sum", "rows", "sum#2", "sum"]
