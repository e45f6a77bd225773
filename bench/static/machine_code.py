"""What cuobjdump says of compiled kernels, and what follows from it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.results import write_text

# What was read or counted before, by the content that it was read from; ``make clean`` empties it.
CACHE = Path(__file__).parents[2] / "build/static"

# Per multiprocessor: registers, threads, blocks and shared bytes. CUDA C++ Programming Guide 13.0, table "Technical
# Specifications per Compute Capability". Warps get registers by 256 on four partitions, the system keeps 1 KiB a block.
_MULTIPROCESSOR = {
    80: (65536, 2048, 32, 164 << 10),
    90: (65536, 2048, 32, 228 << 10),
    100: (65536, 2048, 32, 228 << 10),
    120: (65536, 1536, 24, 100 << 10),
}
_SYSTEM_SHARED = 1024
_TENSOR_MEMORY_COLUMNS = 512


@dataclass
class MachineCode:
    """One kernel. Widths are in bytes: {16: 8} is eight accesses of 16 bytes."""

    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0  # static; a launch may ask for more. From sm_90 on with the system's share of a block
    threads: int = 0  # __launch_bounds__, 0 without
    local_accesses: int = 0  # loads and stores of local memory: spills, and arrays that left the registers
    code_bytes: int = 0
    fma: int = 0  # multiply-adds outside the tensor units
    loads: dict[int, int] = field(default_factory=dict)  # from global memory, asynchronous copies too
    stores: dict[int, int] = field(default_factory=dict)
    tensor: dict[str, int] = field(default_factory=dict)  # instruction with its shape -> how many


def tool() -> str:
    """cuobjdump, of the triton wheel; ValueError without."""
    try:
        from hulukern.testing import offline

        path = offline.tool("cuobjdump")
    except ImportError as error:
        raise ValueError(f"cuobjdump: comes with triton, which is not installed ({error})") from None
    if path is None:
        raise ValueError("triton: has no cuobjdump beside it, expected one")
    return str(path)


def cuobjdump(*arguments: str, folder: Path | None = None) -> str:
    run = subprocess.run([tool(), *arguments], capture_output=True, text=True, cwd=folder, check=False)
    if run.returncode:
        raise ValueError(f"cuobjdump {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout


def remembered(kind: str, content: Iterable[bytes], compute: Callable[[], Any]) -> Any:
    """``compute()``'s JSON value, computed once per content."""
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in content)).hexdigest()[:24]
    path = CACHE / kind / f"{digest}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        value = compute()
        write_text(path, json.dumps(value))
        return value


def read(file: Path, target: str = "") -> dict[str, MachineCode]:
    """Every kernel of a cubin or, for one ``target`` such as sm_90a, of a library, by its mangled name."""
    content = (file.read_bytes(), target.encode(), Path(__file__).read_bytes())
    found = remembered("code", content, lambda: {k: asdict(c) for k, c in _read(file, target).items()})
    for entry in found.values():
        for kind in ("loads", "stores"):
            entry[kind] = {int(width): count for width, count in entry[kind].items()}
    return {name: MachineCode(**entry) for name, entry in found.items()}


def read_one(cubin: Path) -> MachineCode:
    """The only kernel of a cubin."""
    (code,) = read(cubin).values()
    return code


def _read(file: Path, target: str) -> dict[str, MachineCode]:
    select = ("-arch", target) if target else ()
    found = {}
    usage = cuobjdump(*select, "-res-usage", str(file))
    for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        found[m[1]] = MachineCode(int(m[2]), int(m[3]), int(m[4]))
    attributes = cuobjdump(*select, "-elf", str(file))
    for m in re.finditer(r"\.nv\.info\.(\S+)\n(.*?)(?=\n\.nv\.|\n\n\n|\Z)", attributes, re.S):
        bound = re.search(r"EIATTR_MAX_THREADS.*?Value:\s+(0x[0-9a-f]+)", m[2], re.S)
        if bound and m[1] in found:
            found[m[1]].threads = int(bound[1], 16)
    code = MachineCode()
    # As it comes: a library's listing is hundreds of megabytes.
    command = [tool(), *select, "-sass", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout or ():
            if "Function :" in line:
                code = found[line.split(":", 1)[1].strip()]
            elif seen := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", line):
                _count(code, seen[2])
                code.code_bytes = int(seen[1], 16) + 16
    if not found or not all(code.code_bytes for code in found.values()):
        raise ValueError(f"{file}: has no machine code{f' for {target}' if target else ''}, expected some")
    return found


def _count(code: MachineCode, opcode: str) -> None:
    kind = opcode.split(".")[0]
    if kind in ("LDG", "LDGSTS"):
        width = _width(opcode)
        code.loads[width] = code.loads.get(width, 0) + 1
    elif kind == "STG":
        width = _width(opcode)
        code.stores[width] = code.stores.get(width, 0) + 1
    elif kind in ("LDL", "STL"):
        code.local_accesses += 1
    elif kind.endswith("MMA"):
        name = ".".join(opcode.split(".")[:2]) if multiply_adds(opcode) else kind
        code.tensor[name] = code.tensor.get(name, 0) + 1
    elif kind in ("FFMA", "FFMA2", "HFMA2", "DFMA"):
        code.fma += 1


def _width(opcode: str) -> int:
    """LDG.E.128 is 16, LDG.E.U8 1, LDG.E 4."""
    bits = [part for part in opcode.split(".")[1:] if re.fullmatch(r"[US]?(8|16|64|128|256)", part)]
    return int(bits[-1].lstrip("US")) // 8 if bits else 4


def multiply_adds(instruction: str) -> int:
    """Of one tensor instruction, a warp's share. UTCHMMA keeps its shape in a register: 0."""
    kind, *parts = instruction.split(".")
    if kind == "HGMMA" and (sizes := re.fullmatch(r"(\d+)x(\d+)x(\d+)", parts[0])):
        return int(sizes[1]) * int(sizes[2]) * int(sizes[3]) // 4
    depth = {"16816": 16, "1688": 8, "1684": 4}.get(parts[0], 0) if parts else 0
    return 16 * 8 * depth


def generation(tensor: Iterable[str]) -> int:
    """Of the newest tensor instruction: 1 a warp's, 2 a warpgroup's, 3 a multiprocessor's; 0 without any."""
    return max((3 if name.startswith("UTC") else 2 if "GMMA" in name else 1 for name in tensor), default=0)


def static_shared(code: MachineCode, architecture: int) -> int:
    """Bytes that the kernel itself declares."""
    return max(code.shared_bytes - _SYSTEM_SHARED, 0) if architecture >= 90 else code.shared_bytes


def occupancy(architecture: int, threads: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> float:
    """Warps that fit on a multiprocessor over those that it can hold; 0 if not even one block fits."""
    all_registers, all_threads, blocks, all_shared = _MULTIPROCESSOR[architecture]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(
        blocks,
        all_threads // (warps * 32),
        4 * (all_registers // 4 // per_warp) // warps,
        all_shared // (-(-shared_bytes // 128) * 128 + _SYSTEM_SHARED),
        _TENSOR_MEMORY_COLUMNS // tensor_columns if tensor_columns else blocks,
    )
    return blocks * warps / (all_threads // 32)


def compiler_of(library: Path, target: str) -> str:
    """The nvcc that made a library's code, as it signed it."""
    listed = re.findall(rf"ELF file\s+\d+: (\S+\.{target}\.cubin)", cuobjdump("-lelf", str(library)))
    if not listed:
        raise ValueError(f"{library}: has no code for {target}, expected it built for it (or name --arch)")
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", listed[0], str(library.resolve()), folder=Path(folder))
        signed = re.search(
            rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", (Path(folder) / listed[0]).read_bytes()
        )
    return f"nvcc {signed[1].decode()}" if signed else "nvcc unknown"
