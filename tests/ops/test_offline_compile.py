"""What the compilers make of every GPU kernel, without a GPU.

Triton: each op's own launch code runs on CPU tensors against a stand-in driver that names an architecture,
so what is compiled is what a launch there would compile. The interpreter and the compiler exclude each
other within a process, hence one subprocess per architecture: ``python test_offline_compile.py 90 DIR``.
CUDA: the library holds machine code for the architectures it says it has.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import hulukern
from hulukern.spec import Case

ARCHITECTURES = (80, 90, 100, 120)
# Cells too large for registers have kernels of their own.
LARGE_CELLS = {
    "token_score": (Case("large", {"grid_thw": [(4, 8, 8)], "L": 588, "merge_size": 8, "reference": "kept"}),),
    "token_score_frames": (Case("large", {"THWC": (4, 144, 144, 3), "patch_size": 24, "merge_size": 6}),),
}
# As CMakeLists.txt lists them when nobody asks for others.
DEFAULT_CUDA_ARCHS = ("80-real", "90a-real", "100a-real", "120")


def tool(name: str) -> str:
    """A CUDA binary tool of the triton wheel."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
    path = pathlib.Path(nvidia.__path__[0]) / "bin" / name
    if not path.exists():
        pytest.skip(f"this triton ships no {name}")
    return str(path)


def spills_of(cuobjdump: str, cubin: pathlib.Path, architecture: int) -> str:
    """What a kernel keeps in local memory; empty when nothing.

    On sm_100 and later ptxas saves a register or two around the subroutine of an IEEE division, once per
    version of a cell; anything more than that frame of 8 bytes is a spill there too.
    """
    if architecture >= 100:
        command = [cuobjdump, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, f"no resource usage in {usage!r}"
        return "" if int(found[1]) <= 8 and found[2] == "0" else usage
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in sass, f"no machine code in {cubin.name}"
    return "; ".join(re.findall(r"\b(?:STL|LDL)\b[^;]*", sass)[:4])


def test_every_triton_kernel_compiles_without_spills(tmp_path: pathlib.Path) -> None:
    """Every kernel, dtype and reference on every architecture, by what the machine code does."""
    cuobjdump = tool("cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(hulukern.__file__).parents[1]), *sys.path[1:]])
    compiled: dict[str, set[str]] = {}
    for architecture in ARCHITECTURES:
        folder = tmp_path / str(architecture)
        environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache" / str(architecture))
        run = subprocess.run(
            [sys.executable, __file__, str(architecture), str(folder)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"sm_{architecture}: {run.stderr[-4000:]}"
        for cubin in sorted(folder.glob("*.cubin")):
            spills = spills_of(cuobjdump, cubin, architecture)
            assert not spills, f"sm_{architecture} {cubin.name} spills: {spills}"
            compiled.setdefault(str(architecture), set()).add(cubin.name)
    kernels = {name for name, registered in hulukern.OPS.items() if "triton" in registered.spec.backends}
    for architecture in ARCHITECTURES:
        names = compiled.get(str(architecture), set())
        assert {n.split(".")[0] for n in names} == kernels, f"sm_{architecture} has {sorted(names)}"
        assert names == compiled[str(ARCHITECTURES[0])]


def test_library_holds_the_architectures_that_it_names() -> None:
    library = pathlib.Path(hulukern.__file__).parent / "lib" / "libhulukern.so"
    native = ctypes.CDLL(str(library))  # itself: hulukern._C may speak to the simulator
    native.hk_cuda_archs.restype = native.hk_cuda_absent_reason.restype = ctypes.c_char_p
    cuda_archs = native.hk_cuda_archs().decode()
    if not cuda_archs:
        pytest.skip(f"the library has no CUDA kernels: {native.hk_cuda_absent_reason().decode()}")
    listed = [
        subprocess.run([tool("cuobjdump"), option, str(library)], capture_output=True, text=True).stdout
        for option in ("--list-elf", "--list-ptx")
    ]
    elf, ptx = (set(re.findall(r"sm_(\d+[af]?)\.", text)) for text in listed)
    archs = re.split(r"[;, ]+", cuda_archs)
    if archs == ["native"]:
        major, minor = torch.cuda.get_device_capability()
        archs = [f"{major}{minor}-real"]
    assert elf == {a.removesuffix("-real") for a in archs if not a.endswith("-virtual")}
    assert ptx == {a.removesuffix("-virtual") for a in archs if not a.endswith("-real")}


# --- the subprocess -----------------------------------------------------------------------------------


class OfflineDriver:
    """What Triton asks of a device in order to compile for it."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def cases(op: hulukern.spec.Op) -> Iterator[Case]:
    """The plain case and the one whose cells depend on each other; the rest compiles to the same."""
    seen: set[str] = set()
    for case in op.cases:
        reference = case.sizes.get("reference", "previous")
        if not case.tags & {"odd", "tiny", "empty"} and reference not in seen:
            seen.add(reference)
            yield case
    yield from LARGE_CELLS.get(op.name, ())


def compile_all(architecture: int, folder: pathlib.Path) -> None:
    """Leave <op>.<case>.<dtype>.<n>.cubin for every kernel that the calls would launch."""
    import triton
    from triton.runtime.jit import JITFunction

    folder.mkdir(parents=True)
    triton.runtime.driver.set_active(OfflineDriver(architecture))
    kernels: list[Any] = []
    real_run = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> None:
        kernels.append(real_run(self, *args, **{**options, "warmup": True}))

    with mock.patch.object(JITFunction, "run", run), mock.patch("hulukern.backends.unavailable", return_value=""):
        for name, registered in hulukern.OPS.items():
            if "triton" not in registered.spec.backends:
                continue
            module, _, attribute = registered.spec.backends["triton"].partition(":")
            function = getattr(__import__(f"{registered.package}.{module}", fromlist=[attribute]), attribute)
            for case in cases(registered.spec):
                for dtype in registered.spec.dtypes:
                    arguments = registered.spec.sample(
                        case, dtype, torch.device("cpu"), torch.Generator().manual_seed(0)
                    )
                    kernels.clear()
                    function(*(arguments[a] for a in registered.spec.argument_names))
                    for n, kernel in enumerate(dict.fromkeys(kernels)):
                        stem = f"{name}.{case.name}.{str(dtype).removeprefix('torch.')}.{n}"
                        (folder / f"{stem}.cubin").write_bytes(kernel.asm["cubin"])


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
