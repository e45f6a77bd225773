"""The static gate: planted faults are named, pins hold both ways, waivers end, and what is missing is said."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hulukern
from bench import static
from bench.__main__ import main
from bench.static import cuda_rows, light, machine_code, pins, triton_rows
from bench.static.row import Finding, Row, limits
from hulukern.testing import offline

ROOT = Path(__file__).parents[2]
ARCH = 120
ROW = Row(
    backend="cuda", target="sm_90a", op="layer_norm", name="layer_norm/rows<bfloat16>", dtype="bfloat16", threads=128,
    registers=40, spills=0, stack_bytes=0, shared_bytes=0, occupancy=0.75, loads={16: 8, 4: 1}, stores={16: 4},
    tensor={}, tensor_ratio=None, fma=64, code_bytes=4096, light_us=22.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _tools() -> None:
    pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
    if offline.tool("cuobjdump") is None:
        pytest.skip("this triton ships no cuobjdump")


# --- planted faults ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """rope_attention's kernel as compiled with a plant and a dtype."""
    folder = tmp_path_factory.mktemp("planted")

    @functools.cache
    def compiled(plant: str, dtype: str = "bfloat16") -> Row:
        out = folder / f"{plant}.{dtype}"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
        command = [sys.executable, str(Path(__file__).with_name("planted.py")), str(ARCH), str(out), plant, dtype]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        for entry in json.loads((out / "kernels.json").read_text()):
            if entry["kernel"] == "rope_attention_kernel":
                return triton_rows.row(ARCH, offline.Compiled(**entry), out / entry["file"])
        raise AssertionError("no attention kernel")

    return compiled


@pytest.mark.parametrize(
    ("plant", "dtype", "quantity", "says"),
    [
        ("spill", "bfloat16", "spills", r"spills: 0 -> [1-9]\d* accesses"),
        ("narrow", "bfloat16", "loads", r"16-byte loads: \d+ -> \d+"),
        ("padded", "bfloat16", "tensor_ratio", r"tensor work x 1.056 -> x 1.778 \(head_dim 72 padded\)"),
        ("fma", "float32", "tensor",
         r"tensor instructions HMMA.1688: [1-9]\d* -> 0, the products run on FFMA \([1-9]\d* of them\)"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(attention: Any, plant: str, dtype: str, quantity: str, says: str) -> None:
    healthy, planted = attention("healthy", dtype), attention(plant, dtype)
    pin = {healthy.name: healthy.quantities()}
    assert list(pins.judge([healthy], pin, "triton sm_120", [])) == []
    findings = {f.quantity: f for f in pins.judge([planted], pin, "triton sm_120", [])}
    assert findings[quantity].verdict == "worse"
    assert findings[quantity].label == f"triton sm_120 rope_attention/hw/{dtype}/rope_attention_kernel"
    assert re.fullmatch(says, findings[quantity].text), findings[quantity].text
    if plant == "narrow":
        lost, left = re.findall(r"\d+ -> \d+", findings[quantity].text)[0].split(" -> ")
        assert int(left) < int(lost)
    gains = {f.quantity: f.verdict for f in pins.judge([healthy], {planted.name: planted.quantities()}, "", [])}
    assert gains[quantity] == "better"


def test_padding_is_beyond_a_limit_under_any_toolchain(attention: Any) -> None:
    assert list(limits(attention("healthy"))) == []
    assert "tensor_ratio" in {f.quantity for f in limits(attention("padded"))}


PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry turn(.param .u64 to) .maxntid 256, 1, 1 {
  .reg .b32 %r<4>;
  .reg .b64 %rd<4>;
  .shared .align 16 .b8 tiles[BYTES];
  ld.param.u64 %rd1, [to];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  mov.u32 %r3, tiles;
  add.u32 %r3, %r3, %r2;
  st.shared.u32 [%r3], %r1;
  bar.sync 0;
  ld.shared.u32 %r1, [tiles];
  st.global.u32 [%rd1], %r1;
  ret;
}
"""


def test_a_buffer_that_halves_occupancy_is_named(tmp_path: Path) -> None:
    rows = []
    for n_buffers in (1, 2):
        source, cubin = tmp_path / f"{n_buffers}.ptx", tmp_path / f"{n_buffers}.cubin"
        source.write_text(PTX.replace("BYTES", str(n_buffers * 24576)))
        subprocess.run([str(offline.tool("ptxas")), "-arch=sm_90", str(source), "-o", str(cubin)], check=True)
        code = machine_code.read_one(cubin)
        assert code.threads == 256
        shared = machine_code.static_shared(code, 90)
        occupancy = machine_code.occupancy(90, code.threads, code.registers, shared)
        rows.append(dataclasses.replace(ROW, threads=256, shared_bytes=shared, occupancy=occupancy))
    findings = {f.quantity: f.text for f in pins.compare(rows[0].quantities(), rows[1])}
    assert findings["occupancy"] == "occupancy 1.00 -> 0.50 (shared memory 24 -> 48 KiB)"


# --- the ratchet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "verdict", "text"),
    [
        ({"spills": 12}, "worse", "spills: 0 -> 12 accesses"),
        ({"registers": 32}, "better", "registers: 40 -> 32"),
        ({"loads": {4: 33}}, "worse", "16-byte loads: 8 -> 0, now 4-byte"),
        ({"loads": {16: 8, 4: 3}}, "worse", "loads (times bytes): 8 x 16 + 1 x 4 -> 8 x 16 + 3 x 4"),
        ({"loads": {16: 16, 4: 2}}, "", "unrolled: as wide as before"),
        ({"tensor": {"HMMA.16816": 36}}, "better", "tensor instructions HMMA.16816: 0 -> 36"),
        ({"code_bytes": 4128}, "", "a few instructions"),
        ({"code_bytes": 8192}, "worse", "code: 4096 -> 8192 bytes"),
        ({"light_us": 30.0}, "changed", "speed-of-light time: 22.5 -> 30.0 us, the spec counts otherwise"),
    ],
)  # fmt: skip
def test_both_ways(changes: dict[str, Any], verdict: str, text: str) -> None:
    pin = json.loads(json.dumps(ROW.quantities()))  # as a file has it
    found = list(pins.compare(pin, dataclasses.replace(ROW, **changes)))
    expected = [Finding(ROW.label, next(iter(changes)), verdict, text)] if verdict else []
    assert found == expected


def test_new_and_lost_kernels_fail() -> None:
    pinned = {"layer_norm/gone": ROW.quantities(), "bias_gelu/other": ROW.quantities()}
    found = [(f.label, f.text) for f in pins.judge([ROW], pinned, "cuda sm_90a", ["layer_norm"])]
    assert found == [
        (ROW.label, "is not pinned"), ("cuda sm_90a layer_norm/gone", "is pinned, and no longer there"),
    ]  # fmt: skip


def test_pins_are_kept_by_toolchain_and_op(tmp_path: Path) -> None:
    path, other = tmp_path / "cuda-sm_90a.json", dataclasses.replace(ROW, op="bias_gelu", name="bias_gelu/x")
    pins.save(path, [ROW, other], "nvcc 1", [])
    pins.save(path, [dataclasses.replace(other, registers=9)], "nvcc 1", ["bias_gelu"])
    pins.save(path, [ROW], "nvcc 2", [])
    found = pins.load(path)
    assert {k: list(v) for k, v in found.items()} == {"nvcc 1": ["bias_gelu/x", ROW.name], "nvcc 2": [ROW.name]}
    assert found["nvcc 1"]["bias_gelu/x"]["registers"] == 9
    assert len(path.read_text().splitlines()) == 2 + 2 * 2 + 3  # a line per kernel
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"cuda-sm_90a\.json: cannot be read as pins"):
        pins.load(path)


def measured(*rows: Row, toolchain: str = "nvcc 1") -> list[static.Measured]:
    return [static.Measured("cuda", 90, toolchain, list(rows))]


def test_another_toolchain_leaves_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pins.save(tmp_path / "cuda-sm_90a.json", [ROW], "nvcc 1", [])
    slower = dataclasses.replace(ROW, registers=255)
    assert len(static.judge(measured(slower), [], tmp_path)) == 1
    assert static.judge(measured(slower, toolchain="nvcc 2"), [], tmp_path) == []
    assert "cuda sm_90a: no pins for this toolchain (nvcc 2), but for nvcc 1" in capsys.readouterr().err
    spilling = dataclasses.replace(ROW, spills=4)
    assert [f.verdict for f in static.judge(measured(spilling, toolchain="nvcc 2"), [], tmp_path)] == ["limit"]


def test_waivers_end_and_idle_ones_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    today = datetime.date.today()
    path = tmp_path / "waivers.toml"

    def judged(until: datetime.date, quantity: str = "registers") -> int:
        path.write_text(
            f'[[waiver]]\nkernel = "cuda sm_90a layer_norm/*"\nquantity = "{quantity}"\nreason = "new ptxas"\n'
            f"until = {until}\n"
        )
        finding = Finding(ROW.label, "registers", "worse", "registers: 40 -> 48")
        return static.verdict([finding], measured(ROW), pins.load_waivers(path), False)

    assert judged(today) == 0
    assert f"waived until {today}: new ptxas" in capsys.readouterr().err
    assert judged(today - datetime.timedelta(days=1)) == 1
    assert "waiver expired on" in capsys.readouterr().err
    assert judged(today, "spills") == 1
    said = capsys.readouterr().err
    assert "spares nothing" in said
    assert "python -m bench static --pin --backend cuda --arch 90" in said
    path.write_text("[[waiver]]\nkernel = '*'\nquantity = 'speed'\nreason = 'x'\nuntil = 2030-01-01\n")
    with pytest.raises(ValueError, match=r"waivers\.toml: cannot be read"):
        pins.load_waivers(path)


def test_diff_shows_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(static.as_json(measured(ROW, dataclasses.replace(ROW, name="layer_norm/same"))))
    base = pins.of_base(str(path), "cuda", "sm_90a", "nvcc 1")
    head = [dataclasses.replace(ROW, registers=48, occupancy=0.625), dataclasses.replace(ROW, name="layer_norm/same")]
    assert list(pins.diff(base, head, "cuda sm_90a")) == [
        f"| `{ROW.label}` | 40 → 48 |  |  | 0.750 → 0.625 |  |  |",
    ]
    with pytest.raises(ValueError, match="no-such-revision"):
        pins.of_base("no-such-revision", "cuda", "sm_90a", "nvcc 1")
    path.write_text("{}")
    with pytest.raises(ValueError, match="--json"):
        pins.of_base(str(path), "cuda", "sm_90a", "nvcc 1")


# --- the command ------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["static", "--op", "nonsense"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["static", "--arch", "75"])
    assert stopped.value.code == 2
    monkeypatch.setattr(cuda_rows, "LIBRARY", Path("nowhere/libhulukern.so"))
    assert main(["static", "--backend", "cuda"]) == 2
    assert "nowhere/libhulukern.so, expected a build" in capsys.readouterr().err
    monkeypatch.setattr(offline, "tool", lambda _: None)
    assert main(["static"]) == 2
    assert "has no cuobjdump beside it" in capsys.readouterr().err


def test_occupancy_and_light() -> None:
    assert machine_code.occupancy(90, 256, 104, 0) == 0.25  # 4 warps a partition, not 19 in all
    assert machine_code.occupancy(80, 128, 64, 100 << 10) == 4 / 64
    assert machine_code.occupancy(120, 128, 64, 100 << 10) == 0  # one block is too large
    assert machine_code.occupancy(100, 128, 64, 0, tensor_columns=256) == 8 / 64
    n_bytes, flops, dtype = light._cost("token_compact_backward", "bfloat16")
    assert (flops, dtype) == (0, "bfloat16")
    assert light.time_us("token_compact_backward", "bfloat16", 90) == pytest.approx(1e6 * n_bytes / 3.35e12, rel=1e-3)


# --- CUDA -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda() -> list[Row]:
    native = ctypes.CDLL(str(Path(hulukern.__file__).parent / "lib/libhulukern.so"))
    native.hk_cuda_archs.restype = ctypes.c_char_p
    if "80-real" not in native.hk_cuda_archs().decode():
        pytest.skip("the library has no kernels for sm_80")
    return cuda_rows.rows(80, [])


def test_no_cuda_kernel_spills_or_pads(cuda: list[Row]) -> None:
    assert {row.name.split("/")[1].split("<")[0].split("#")[0] for row in cuda} == set(cuda_rows.KERNELS)
    assert {row.op for row in cuda} <= {*hulukern.OPS, "several"}
    assert [finding for row in cuda for finding in limits(row)] == []
    assert cuda_rows.toolchain(80).startswith("nvcc 1")


def test_products_at_72_are_what_the_shape_needs(cuda: list[Row]) -> None:
    """4 products of k = 16 and 1 of k = 8 along D; 9 wide along values: no 80, no 96."""
    of_72 = [row for row in cuda if re.search(r"/attention_forward<.*D=72", row.name)]
    assert len(of_72) == 2
    for row in of_72:
        columns, steps, tiles = 8, 4, 2  # of 64 keys, of 16 keys, of 16 rows
        assert row.tensor == {"HMMA.16816": tiles * (columns * 4 + steps * 9), "HMMA.1688": tiles * columns}
        assert row.tensor_ratio == 1
        assert 16 in row.loads


@pytest.mark.parametrize(
    ("mangled", "kernel"),
    [
        ("_ZN2hk17attention_forwardILi5ELi72EEEvNS_13AttentionWalkE",
         ("attention_forward", {"dtype": "bfloat16", "D": 72})),
        ("_ZN2hk18attention_backwardILi4ELi64ELb1EEEvNS_21AttentionBackwardWalkE",
         ("attention_backward", {"dtype": "float16", "D": 64, "own_keys": 1})),
        ("_ZN2hk23patch_embed_cut_patchesIhLi5ELi4EEEvNS_7CutWalkE",
         ("patch_embed_cut_patches", {"in": "uint8", "dtype": "bfloat16", "values": 4})),
    ],
)  # fmt: skip
def test_names_of_kernels(mangled: str, kernel: tuple[str, dict[str, Any]]) -> None:
    assert cuda_rows.kernel_of(mangled) == kernel


@pytest.mark.parametrize("path", sorted(pins.PINS.glob("*.json")), ids=lambda p: p.stem)
def test_committed_pins_are_readable_and_have_no_spills(path: Path) -> None:
    for kernels in pins.load(path).values():
        spilling = [name for name, pin in kernels.items() if pin["spills"]]
        assert "sm_80" not in path.stem or spilling == []
