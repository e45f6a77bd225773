"""What nvcc made of every CUDA kernel, read from the library itself: no GPU, no timing.

Registers, stack, local memory (spills), shared memory and the occupancy that follows; tensor instructions against
the count that the shape needs; how wide accesses to global memory are.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hulukern

ARCHS = ("80", "90a", "100a", "120")
EXAMPLES = """examples:
  python -m bench.static_cuda                            every kernel on sm_80
  python -m bench.static_cuda --arch 90a --op rope_attention --json out.json

exit codes: 0 nothing spills and no product is padded, 1 something does, 2 the tools or the library are missing
"""

# Per multiprocessor: registers, threads, blocks, shared bytes; and what a block keeps for the system.
LIMITS = {
    "80": (65536, 2048, 32, 164 << 10, 1024),
    "90a": (65536, 2048, 32, 228 << 10, 1024),
    "100a": (65536, 2048, 32, 228 << 10, 1024),
    "120": (65536, 1536, 24, 100 << 10, 1024),
}
# Multiply-adds of one tensor instruction of a warp.
TENSOR = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8}
OP_OF = {
    "attention_": "rope_attention", "rotate_": "rope_attention", "layer_norm_": "layer_norm", "bias_gelu_": "bias_gelu",
    "spatial_merge_": "spatial_merge", "zero_cells": "spatial_merge", "score_": "token_score",
    "compact_": "token_compact", "copy_rows": "token_compact", "patch_embed_": "patch_embed", "sum_columns": "shared",
}  # fmt: skip


def tile_stride(D: int) -> int:
    """csrc/device/mma.cuh, kTileStride, in bytes."""
    return (D // 8 | 1) * 16


def dynamic_shared(name: str, constants: list[int]) -> int:
    """Bytes that the launcher asks for: csrc/ops/rope_attention, k...SharedBytes."""
    if name == "attention_forward":
        return 4 * 64 * tile_stride(constants[1])
    if name == "attention_backward":
        D = constants[1]
        step = 64 if D <= 80 else 32
        return (2 * 64 + 4 * step) * tile_stride(D) + 4 * step * 4
    return 0


def needed_multiply_adds(name: str, constants: list[int]) -> int:
    """Of one step of a warp, by the shape alone: its rows x the step's rows x D, for each product."""
    if name == "attention_forward":
        D = constants[1]
        return 2 * 16 * (2 if D <= 80 else 1) * 64 * D
    if name == "attention_backward":
        _, D, own_keys = constants
        return (4 if own_keys else 3) * 16 * (64 if D <= 80 else 32) * D
    return 0


def kernel_of(mangled: str) -> tuple[str, list[int]] | None:
    """``_ZN2hk17attention_forwardILi5ELi72EEE..`` -> (attention_forward, [5, 72])."""
    found = re.match(r"_ZN2hk(?:\d+_GLOBAL__N_[^E]*?|12_GLOBAL__N_1)?(\d+)", mangled)
    if found is None:
        return None
    begin = found.end()
    name, rest = mangled[begin : begin + int(found[1])], mangled[begin + int(found[1]) :]
    arguments = re.match(r"I((?:L[a-z]\d+E|[a-z])+)E", rest)
    return name, [int(n) for n in re.findall(r"L[a-z](\d+)E", arguments[1])] if arguments else []


def tool(name: str) -> str:
    """A CUDA binary tool of the triton wheel."""
    try:
        import triton.backends.nvidia
    except ImportError as error:
        raise FileNotFoundError(f"{name} comes with triton, which is not installed ({error})") from error
    path = Path(triton.backends.nvidia.__path__[0]) / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"this triton ships no {name}")
    return str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Warps that fit on a multiprocessor over those it can hold."""
    all_registers, all_threads, all_blocks, all_shared, reserved = LIMITS[arch]
    warps = -(-threads // 32)
    of_registers = all_registers // (-(-registers // 8) * 8 * 32) // warps if registers else all_blocks
    blocks = min(of_registers, all_threads // threads, all_blocks, all_shared // (shared + reserved))
    return blocks * warps / (all_threads // 32)


def _usage(library: Path, arch: str) -> dict[str, dict[str, int]]:
    text = _run(tool("cuobjdump"), "-arch", f"sm_{arch}", "-res-usage", str(library))
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        m[1]: {"registers": int(m[2]), "stack": int(m[3]), "shared": int(m[4]), "local": int(m[5])}
        for m in re.finditer(pattern, text)
    }


def _instructions(library: Path, arch: str) -> dict[str, Counter[str]]:
    """Opcodes with their modifiers, counted per kernel."""
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    command = [tool("cuobjdump"), "-arch", f"sm_{arch}", "-sass", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if "Function :" in line:
                current = found.setdefault(line.split(":", 1)[1].strip(), Counter())
            elif opcode := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
                current[opcode[1]] += 1
    return found


def _threads(library: Path, arch: str) -> dict[str, int]:
    """What __launch_bounds__ says, from the kernels' attributes."""
    text = _run(tool("cuobjdump"), "-arch", f"sm_{arch}", "-elf", str(library))
    pattern = r"\.nv\.info\.(\S+)\n(.*?)(?=\n\.nv\.|\n\n\n|\Z)"
    found = {}
    for m in re.finditer(pattern, text, re.S):
        bound = re.search(r"EIATTR_MAX_THREADS.*?Value:\s+(0x[0-9a-f]+)", m[2], re.S)
        if bound:
            found[m[1]] = int(bound[1], 16)
    return found


def _width(opcode: str) -> int:
    bits = next((int(part) for part in opcode.split(".") if part in ("64", "128")), 0)
    return bits // 8 or (1 if ".U8" in opcode or ".S8" in opcode else 2 if ".U16" in opcode or ".S16" in opcode else 4)


def rows(archs: list[str], ops: list[str], library: Path | None = None) -> list[dict[str, Any]]:
    """One row per kernel instance and architecture; no ``ops`` means all."""
    library = library or Path(hulukern.__file__).parent / "lib/libhulukern.so"
    found = []
    for arch in archs:
        usage, instructions, threads = _usage(library, arch), _instructions(library, arch), _threads(library, arch)
        for mangled, use in sorted(usage.items()):
            kernel = kernel_of(mangled)
            if kernel is None:
                continue
            name, constants = kernel
            op = next((o for prefix, o in OP_OF.items() if name.startswith(prefix)), "unknown")
            if ops and op not in ops:
                continue
            counts = instructions.get(mangled, Counter())
            tensor = {shape: sum(n for o, n in counts.items() if o.startswith(shape)) for shape in TENSOR}
            needed = needed_multiply_adds(name, constants)
            shared = use["shared"] + dynamic_shared(name, constants)
            bound = threads.get(mangled, 0)
            widths = sorted({_width(o) for o in counts if re.match(r"(LDG|STG|LDGSTS)\b", o)}, reverse=True)
            found.append({
                "arch": arch, "op": op, "kernel": name, "constants": constants, **use, "shared": shared,
                "threads": bound, "occupancy": occupancy(arch, use["registers"], bound, shared) if bound else None,
                "local_accesses": sum(n for o, n in counts.items() if re.match(r"(LDL|STL)\b", o)),
                "tensor": {k: n for k, n in tensor.items() if n},
                "tensor_ratio": sum(TENSOR[k] * n for k, n in tensor.items()) / needed if needed else None,
                "global_bytes": widths, "instructions": sum(counts.values()),
            })  # fmt: skip
    return found


def faults(found: list[dict[str, Any]]) -> list[str]:
    """What may not be: spills, and tensor work beyond what the shape needs.

    From sm_100 on ptxas keeps a register or two in a frame of 8 bytes around subroutines and at 255 registers; more
    than that is a spill there too. (Without a least number of blocks in __launch_bounds__ it also spills to gain
    occupancy: kernels at the edge of a step therefore say 1.)
    """
    out = []
    for r in found:
        label = f"sm_{r['arch']} {r['kernel']}<{', '.join(map(str, r['constants']))}>"
        allowed = 0 if r["arch"] in ("80", "90a") else 8
        if r["stack"] > allowed or (r["local_accesses"] and not allowed):
            out.append(f"{label}: stack {r['stack']} bytes, {r['local_accesses']} local accesses, expected {allowed}")
        if r["tensor_ratio"] is not None and r["tensor_ratio"] != 1:
            out.append(f"{label}: tensor work x {r['tensor_ratio']:.3f} of what the shape needs, expected x 1")
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.static_cuda", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: 80")
    parser.add_argument("--op", action="append", default=[], help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows")
    options = parser.parse_args(arguments)
    try:
        found = rows(options.arch or ["80"], options.op)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"static_cuda: {error}", file=sys.stderr)
        return 2
    print(f"{'arch':5} {'kernel':44} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>6} {'thr':>4} {'occ':>5} "
          f"{'tensor':>22} {'ratio':>6}  global bytes")  # fmt: skip
    for r in found:
        label = f"{r['kernel']}<{', '.join(map(str, r['constants']))}>" if r["constants"] else r["kernel"]
        tensor = " + ".join(f"{n} {k.removeprefix('HMMA.')}" for k, n in r["tensor"].items())
        ratio = "" if r["tensor_ratio"] is None else f"{r['tensor_ratio']:.3f}"
        occupied = "" if r["occupancy"] is None else f"{r['occupancy']:.2f}"
        widths = ", ".join(map(str, r["global_bytes"]))
        print(f"{r['arch']:5} {label:44} {r['registers']:4} {r['stack']:5} {r['local_accesses']:5} {r['shared']:6} "
              f"{r['threads']:4} {occupied:>5} {tensor:>22} {ratio:>6}  {widths}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = faults(found)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
