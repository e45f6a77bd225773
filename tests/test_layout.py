"""One op, one name, one folder: what stands where, and what may know what."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import hulukern

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(p.name for p in (ROOT / "hulukern/ops").iterdir() if (p / "spec.py").exists())


def sources(folder: str, *suffixes: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]


# What is native so far: the other ops have a reference only.
NATIVE = sorted({o.package.rsplit(".", 1)[1] for o in hulukern.OPS.values() if "cpu" in o.spec.backends})


@pytest.mark.parametrize("op", FOLDERS)
def test_an_op_has_its_files(op: str) -> None:
    for name in ("__init__.py", "spec.py", "reference.py"):
        assert (ROOT / "hulukern/ops" / op / name).exists(), name


@pytest.mark.parametrize("op", NATIVE)
def test_a_native_op_has_its_files_on_both_sides(op: str) -> None:
    assert (ROOT / "hulukern/ops" / op / "native.py").exists()
    for name in (f"{op}.h", f"{op}.cpp", f"{op}_cpu.cpp"):
        assert (ROOT / "csrc/ops" / op / name).exists(), name
    assert f"int hk_{op}" in (ROOT / "csrc/include/hulukern/hulukern.h").read_text()
    assert f"{op}" in (ROOT / "CMakeLists.txt").read_text()


def test_both_sides_have_the_same_ops() -> None:
    assert sorted(p.name for p in (ROOT / "csrc/ops").iterdir()) == FOLDERS


def test_entry_points_are_named_after_their_folder() -> None:
    for name, op in hulukern.OPS.items():
        folder = op.package.rsplit(".", 1)[1]
        assert name == folder or name.startswith(folder + "_"), f"{name} lives in {folder}"
        for backend, where in op.spec.backends.items():
            module, function = where.split(":")
            text = (ROOT / "hulukern/ops" / folder / f"{module}.py").read_text()
            assert re.search(rf"^def {function}\(", text, re.M), f"{name}: no {where} for backend {backend}"
            assert function == name, f"{name} is called {function} in {module}.py"


def test_the_core_knows_no_framework() -> None:
    for path in sources("csrc", ".h", ".cpp", ".cu", ".cuh"):
        if "bindings" in path.parts:
            continue
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        assert not [i for i in includes if re.match(r"torch|ATen|c10|pybind11|Python", i)], path


def test_kernels_reach_memory_and_threads_through_device_wrappers_only() -> None:
    """What goes around csrc/device the simulator cannot check."""
    around = r"__shfl|__sync|__ldg|__reduce|__ballot|\basm\b|<<<|extern __shared__|\batomic[A-Z]|cudaMalloc|Synchronize"
    for path in sources("csrc/ops", ".cuh", ".cu"):
        assert not re.findall(around, path.read_text()), path


def test_kernels_per_cpu_level_include_c_headers_only() -> None:
    """An inline C++ library function compiled with AVX-512 may be kept for all levels by the linker."""
    allowed = {"stdint.h", "string.h", "stdlib.h", "immintrin.h"}
    for path in [*sources("csrc/ops", ".cpp"), *sources("csrc/cpu", ".h"), ROOT / "csrc/ops/token_score/cell_diff.h"]:
        if path.name.endswith("_cpu.cpp") or path.name in ("half.h", "vec.h", "row_norm.h", "cell_diff.h"):
            system = set(re.findall(r"#include <([^>]+)>", path.read_text()))
            assert system <= allowed, f"{path}: {system - allowed}"


def test_arrows_point_one_way() -> None:
    forbidden = {"hulukern": ("model", "bench", "tests", "transformers"), "model": ("bench", "tests")}
    for folder, names in forbidden.items():
        for path in sources(folder, ".py"):
            imports = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)
            assert not set(imports) & set(names), path


def test_backends_allocate_with_torch_empty_only() -> None:
    """The harness poisons what torch.empty returns; another allocation would hide an unwritten element."""
    for path in (ROOT / "hulukern/ops").rglob("*.py"):
        if path.name == "native.py" or path.name.startswith("triton_"):
            found = re.findall(
                r"(?<!tl)\.(zeros|ones|full|empty_like|zeros_like|new_empty|new_zeros)\(", path.read_text()
            )
            assert not found, f"{path}: {found}"


def test_the_header_compiles_alone_as_c(tmp_path: Path) -> None:
    program = tmp_path / "alone.c"
    program.write_text(
        '#include "hulukern/hulukern.h"\nint main(void) { return hk_abi_version() != HK_ABI_VERSION; }\n'
    )
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", f"-I{ROOT}/csrc/include"]
    subprocess.run([*command, str(program)], check=True)


def test_no_committed_file_is_over_five_megabytes() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    big = [f for f in listed.stdout.split("\0") if f and (ROOT / f).exists() and (ROOT / f).stat().st_size > 5e6]
    assert not big
