"""What the compilers make of every GPU kernel, without a GPU.

Triton: hulukern.testing.offline compiles what each op's own launch code would launch, for every architecture.
CUDA: the library holds machine code for the architectures it says it has.
"""

from __future__ import annotations

import ctypes
import pathlib
import re
import subprocess

import pytest
import torch

import hulukern
from bench.static import machine_code
from hulukern.testing import offline
from hulukern.tuning import ARCHITECTURES

# As CMakeLists.txt lists them when nobody asks for others.
DEFAULT_CUDA_ARCHS = ("80-real", "90a-real", "100a-real", "120")
# ``python -m bench static`` compiles every dtype everywhere.
EVERY_DTYPE_ON = 90
# On sm_100 and later ptxas saves a register or two around the subroutine of an IEEE division or square root.
DIVISION_FRAME_BYTES = 8


def tool(name: str) -> str:
    pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
    path = offline.tool(name)
    if path is None:
        pytest.skip(f"this triton ships no {name}")
    return str(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_triton_kernel_compiles_without_spills(architecture: int, tmp_path: pathlib.Path) -> None:
    """Every kernel and dtype, by what the machine code does."""
    tool("cuobjdump")
    compiled = offline.compile_in_subprocess(architecture, tmp_path, brief=architecture != EVERY_DTYPE_ON)
    expected = {name for name, registered in hulukern.OPS.items() if "triton" in registered.spec.backends}
    assert {c.op for c in compiled} == expected
    for c in compiled:
        code = machine_code.read_one(tmp_path / c.file)
        spills = code.stack_bytes or code.local_accesses
        if architecture >= 100 and code.stack_bytes <= DIVISION_FRAME_BYTES:
            spills = 0
        assert not spills, f"sm_{architecture} {c.file} {c.kernel}: {code}"


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
