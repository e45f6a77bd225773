"""Triton's kernels: compiled offline as each op launches them, in a process per architecture."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.static import light, machine_code
from bench.static.machine_code import MachineCode
from bench.static.row import Row
from hulukern.testing import offline

MAX_ATTENTION_RATIO = 1.12  # head_dim 72 as 80 columns twice, on sm_100; 1.056 elsewhere
LIMITED_HEAD_DIM = 72  # Hulu-Med's


def target(architecture: int) -> str:
    return f"sm_{architecture}"


def toolchain(architecture: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return f"triton {importlib.metadata.version('triton')}, ptxas {get_ptxas(architecture).version}"


def _attention(rotated: int, plain: int) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """Multiply-adds of one tile of queries and keys: needed, and with the columns that the kernel adds. Products over
    rotated columns are the logits and their gradients, over plain ones the values and theirs."""

    def work(c: dict[str, Any]) -> tuple[int, int]:
        pairs = c["BLOCK_Q"] * c["BLOCK_K"]
        columns = rotated * 2 * (c["W"] + c["P"]) + plain * (c["MAIN"] + c["TAIL"])
        return pairs * (rotated + plain) * 2 * c["HALF"], pairs * columns

    return work


def _embed(c: dict[str, Any]) -> tuple[int, int]:
    padded = -(-c["LENGTH"] // c["BLOCK_L"]) * c["BLOCK_L"]
    tile = c["BLOCK_N"] * c["BLOCK_E"] * c["BLOCK_L"]
    return tile * c["LENGTH"] // padded, tile


NEEDED: dict[str, Callable[[dict[str, Any]], tuple[int, int]]] = {
    "rope_attention_kernel": _attention(1, 1),
    "rope_attention_dq_kernel": _attention(2, 1),
    "rope_attention_dkdv_kernel": _attention(2, 2),
    "patch_embed_kernel": _embed,
}


def tensor_work(c: offline.Compiled, code: MachineCode) -> int:
    """Multiply-adds of a program's tensor instructions, each counted once. UTCHMMA keeps its shape in a register, so
    there Triton's own form is counted."""
    if any(machine_code.generation([name]) == 3 for name in code.tensor):
        return c.product_work
    return c.warps * sum(count * machine_code.multiply_adds(name) for name, count in code.tensor.items())


def tensor_ratio(c: offline.Compiled, code: MachineCode) -> float | None:
    """Tensor work of the machine code over what the shapes need; None without either. How often a loop's body stands
    there (whole and masked tiles, and what pipelining peels off) follows from the products in Triton's own form."""
    if c.kernel not in NEEDED or not code.tensor:
        return None
    needed, asked = NEEDED[c.kernel](c.constants)
    tf32_products = 3 if c.dtype == "float32" else 1
    bodies = c.product_work / (asked * tf32_products)
    return tensor_work(c, code) / (needed * bodies * tf32_products)


def row(architecture: int, c: offline.Compiled, cubin: Path, number: int = 1) -> Row:
    """``number`` tells apart what one call launches of one kernel in several forms."""
    code = machine_code.read_one(cubin)
    shared = machine_code.static_shared(code, architecture) + c.shared_bytes
    head_dim = 2 * c.constants.get("HALF", 0)
    attention = c.kernel in NEEDED and bool(head_dim)
    shape = f"head_dim {head_dim}" if attention else f"{c.constants['LENGTH']} columns" if c.kernel in NEEDED else ""
    return Row(
        backend="triton", target=target(architecture), op=c.op,
        name=f"{c.op}/{c.case}/{c.dtype}/{c.kernel}{f'#{number}' if number > 1 else ''}",
        dtype=c.dtype, threads=32 * c.warps, registers=code.registers, spills=code.local_accesses,
        stack_bytes=code.stack_bytes, shared_bytes=shared,
        occupancy=machine_code.occupancy(architecture, 32 * c.warps, code.registers, shared, c.tensor_columns),
        loads=code.loads, stores=code.stores, tensor=code.tensor, tensor_ratio=tensor_ratio(c, code), fma=code.fma,
        code_bytes=code.code_bytes, light_us=light.time_us(c.op, c.dtype, architecture), shape=shape,
        max_ratio=MAX_ATTENTION_RATIO if attention and head_dim == LIMITED_HEAD_DIM else None,
    )  # fmt: skip


def rows(architecture: int, ops: list[str]) -> list[Row]:
    """Every kernel that the ops' calls would launch; no ``ops`` means all. What Triton compiled before it takes from
    its own cache, whose key is the kernel's source, its options and the toolchain."""
    with tempfile.TemporaryDirectory() as folder:
        seen: Counter[tuple[str, str, str, str]] = Counter()
        found = []
        cache = machine_code.CACHE / "triton"
        for c in offline.compile_in_subprocess(architecture, Path(folder), ops, cache=cache):
            key = (c.op, c.case, c.dtype, c.kernel)
            seen[key] += 1
            found.append(row(architecture, c, Path(folder) / c.file, seen[key]))
        return found
