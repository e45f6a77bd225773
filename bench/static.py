"""What the compiler makes of every kernel, without a GPU: registers, spills, tensor work against what is needed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hulukern
from bench.results import write_text
from hulukern.testing import offline
from hulukern.tuning import ARCHITECTURES

EXAMPLES = """examples:
  python -m bench static                                          all kernels, four architectures, about 5 minutes
  python -m bench static --op rope_attention --arch 90 --json out.json

exit codes: 0 within the limits, 1 a kernel spills (sm_80, sm_90) or pads attention beyond 1.12, 2 bad arguments
"""
MAX_ATTENTION_RATIO = 1.12
LIMITED_HEAD_DIM = 72  # Hulu-Med's
NO_SPILLS_ON = (80, 90)


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


def tensor_ratio(c: offline.Compiled, code: offline.MachineCode) -> float | None:
    """Tensor work of the machine code over what the shapes need; None without either. How often a loop's body stands
    there (whole and masked tiles, and what pipelining peels off) follows from the products in Triton's own form."""
    if c.kernel not in NEEDED or not code.tensor:
        return None
    needed, asked = NEEDED[c.kernel](c.constants)
    tf32_products = 3 if c.dtype == "float32" else 1
    bodies = c.product_work / (asked * tf32_products)
    return code.tensor_work(c) / (needed * bodies * tf32_products)


def measure(architecture: int, ops: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for c in offline.compile_in_subprocess(architecture, Path(folder), ops):
            code = offline.read_machine_code(Path(folder) / c.file)
            ratio = tensor_ratio(c, code)
            limited = c.op.startswith("rope_attention") and 2 * c.constants.get("HALF", 0) == LIMITED_HEAD_DIM
            reasons = []
            if architecture in NO_SPILLS_ON and code.local_accesses and (c.op, c.dtype) not in offline.MAY_SPILL:
                reasons.append(f"spills: {code.local_accesses} accesses")
            if limited and ratio is not None and ratio > MAX_ATTENTION_RATIO:
                reasons.append(f"tensor work x {ratio:.3f}, expected at most {MAX_ATTENTION_RATIO}")
            rows.append({"arch": architecture, **asdict(c), **asdict(code), "tensor_ratio": ratio, "fails": reasons})
    return rows


HEADER = ("arch", "kernel", "case", "dtype", "regs", "spill", "stack", "smem", "code", "loads", "stores", "tensor", "x")


def line(r: dict[str, Any]) -> tuple[str, ...]:
    tensor: dict[str, int] = {}
    for name, count in r["tensor"].items():
        short = ".".join(name.split(".")[:2])
        tensor[short] = tensor.get(short, 0) + count
    ratio = "" if r["tensor_ratio"] is None else f"{r['tensor_ratio']:.3f}"
    return (
        str(r["arch"]), r["kernel"].removesuffix("_kernel"), r["case"], r["dtype"], str(r["registers"]),
        str(r["local_accesses"]), str(r["stack_bytes"]), str(r["shared_bytes"]), str(r["code_bytes"]),
        _widths(r["loads"]), _widths(r["stores"]), " ".join(f"{n}x{name}" for name, n in tensor.items()), ratio,
    )  # fmt: skip


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{n}x{bits}" for bits, n in sorted(counts.items(), reverse=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=["triton"], default="triton", help="whose kernels (default: triton)")
    parser.add_argument("--op", action="append", default=[], help="only this entry point; may be repeated")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")


def run(options: argparse.Namespace) -> int:
    known = [name for name, registered in hulukern.OPS.items() if "triton" in registered.spec.backends]
    unknown = [name for name in options.op if name not in known]
    if unknown:
        raise ValueError(f"--op: has {unknown[0]!r}, expected one of {', '.join(known)}")
    if offline.tool("cuobjdump") is None:
        raise ValueError("triton: has no cuobjdump beside it, expected one")
    rows = [r for architecture in options.arch or ARCHITECTURES for r in measure(architecture, options.op)]
    table = [HEADER, *(line(r) for r in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADER))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if options.json is not None:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    failed = [r for r in rows if r["fails"]]
    for r in failed:
        print(f"sm_{r['arch']} {r['kernel']} {r['case']} {r['dtype']}: {'; '.join(r['fails'])}", file=sys.stderr)
    return 1 if failed else 0
