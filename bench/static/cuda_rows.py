"""CUDA's kernels: what nvcc made of them, read from the library itself."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import hulukern
from bench.static import light, machine_code
from bench.static.row import Row

LIBRARY = Path(hulukern.__file__).parent / "lib/libhulukern.so"

# Kernel -> its entry point (with _backward where the parameter of that name is 1) and its template's parameters.
KERNELS = {
    "attention_forward": ("rope_attention", "dtype D"),
    "attention_forward_f32": ("rope_attention", ""),
    "attention_delta": ("rope_attention_backward", "dtype"),
    "attention_backward": ("rope_attention_backward", "dtype D own_keys"),
    "attention_backward_f32": ("rope_attention_backward", "own_keys"),
    "rotate_rows": ("rope_attention_rotate", "dtype"),
    "layer_norm_forward": ("layer_norm", "dtype bytes warps"),
    "layer_norm_backward": ("layer_norm_backward", "dtype bytes slots"),
    "layer_norm_columns": ("layer_norm_backward", "dtype"),
    "bias_gelu_rows": ("bias_gelu", "dtype bytes tanh backward"),
    "spatial_merge_forward": ("spatial_merge", "dtype bytes warps"),
    "spatial_merge_backward": ("spatial_merge_backward", "dtype bytes slots"),
    "spatial_merge_columns": ("spatial_merge_backward", "dtype"),
    "zero_cells_left_out": ("spatial_merge_backward", "bytes"),
    "score_cells": ("token_score", "dtype bytes kept"),
    "score_large_cells": ("token_score", "dtype bytes"),
    "compact_mask": ("token_compact", ""),
    "compact_rows": ("token_compact", ""),
    "copy_rows": ("token_compact", "bytes gather"),
    "patch_embed_normalize_rows": ("patch_embed_normalize", "dtype values"),
    "patch_embed_cut_patches": ("patch_embed_cut", "in dtype values"),
    "sum_columns": ("several", ""),
}
DTYPES = {0: "uint8", 1: "int16", 4: "float16", 5: "bfloat16", 6: "float32"}  # hk_dtype
TYPES = {"h": "uint8", "s": "int16", "f": "float32"}  # as mangled


def target(architecture: int) -> str:
    """As CMakeLists.txt builds for it."""
    return f"sm_{architecture}{'a' if architecture in (90, 100) else ''}"


def toolchain(architecture: int, library: Path | None = None) -> str:
    library = library or LIBRARY
    if not library.exists():
        raise ValueError(f"cuda: has no {library}, expected a build (make build); --backend triton leaves it out")
    return machine_code.compiler_of(library, target(architecture))


def kernel_of(mangled: str) -> tuple[str, dict[str, Any]] | None:
    """``_ZN2hk17attention_forwardILi5ELi72EEE..`` -> (attention_forward, {dtype: bfloat16, D: 72})."""
    begin = re.match(r"_ZN2hk(?:\d+_GLOBAL__N_[^E]*?|12_GLOBAL__N_1)?(\d+)", mangled)
    if begin is None:
        return None
    end = begin.end() + int(begin[1])
    name = mangled[begin.end() : end]
    arguments = re.match(r"I((?:L[a-z]\d+E|[a-z])+)E", mangled[end:])
    values: list[Any] = [
        int(number) if number else TYPES.get(letter, letter)
        for number, letter in re.findall(r"L[a-z](\d+)E|([a-z])", arguments[1] if arguments else "")
    ]
    names = KERNELS.get(name, ("", ""))[1].split() or [str(i) for i in range(len(values))]
    constants = dict(zip(names, values, strict=True))
    if "dtype" in constants:
        constants["dtype"] = DTYPES[constants["dtype"]]
    return name, constants


def label_of(mangled: str) -> tuple[str, str, str, dict[str, Any]] | None:
    """Op, what a row is called, the kernel's own name and its constants."""
    kernel = kernel_of(mangled)
    if kernel is None:
        return None
    name, constants = kernel
    op = KERNELS.get(name, ("unknown", ""))[0] + ("_backward" if constants.get("backward") else "")
    parameters = ", ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in constants.items())
    return op, f"{op}/{name}<{parameters}>" if constants else f"{op}/{name}", name, constants


def tile_stride(D: int) -> int:
    """csrc/device/mma.cuh, kTileStride, in bytes."""
    return (D // 8 | 1) * 16


def dynamic_shared(name: str, constants: dict[str, Any]) -> int:
    """Bytes that the launcher asks for: csrc/ops/rope_attention, k...SharedBytes."""
    if name == "attention_forward":
        return 4 * 64 * tile_stride(constants["D"])
    if name == "attention_backward":
        D = constants["D"]
        step = 64 if D <= 80 else 32
        return (2 * 64 + 4 * step) * tile_stride(D) + 4 * step * 4
    return 0


def needed_multiply_adds(name: str, constants: dict[str, Any]) -> int:
    """Of one step of a warp, by the shape alone: its rows x the step's rows x D, for each product."""
    if name == "attention_forward":
        D: int = constants["D"]
        return 2 * 16 * (2 if D <= 72 else 1) * 64 * D
    if name == "attention_backward":
        D = constants["D"]
        return (4 if constants["own_keys"] else 3) * 16 * (64 if D <= 80 else 32) * D
    return 0


def rows(architecture: int, ops: list[str], library: Path | None = None) -> list[Row]:
    """One row per kernel instance; no ``ops`` means all."""
    found: list[Row] = []
    seen: Counter[str] = Counter()
    for mangled, code in sorted(machine_code.read(library or LIBRARY, target(architecture)).items()):
        kernel = label_of(mangled)
        if kernel is None:
            continue
        op, label, name, constants = kernel
        if ops and op not in ops:
            continue
        seen[label] += 1
        needed = needed_multiply_adds(name, constants)
        shared = machine_code.static_shared(code, architecture) + dynamic_shared(name, constants)
        work = sum(count * machine_code.multiply_adds(i) for i, count in code.tensor.items())
        dtype = constants.get("in") or constants.get("dtype") or ("float32" if name.endswith("_f32") else "")
        found.append(Row(
            backend="cuda", target=target(architecture), op=op,
            name=label if seen[label] == 1 else f"{label}#{seen[label]}",
            dtype=dtype, threads=code.threads, registers=code.registers, spills=code.local_accesses,
            stack_bytes=code.stack_bytes, shared_bytes=shared,
            occupancy=machine_code.occupancy(architecture, code.threads, code.registers, shared),
            loads=code.loads, stores=code.stores, tensor=code.tensor,
            tensor_ratio=work / needed if needed else None,
            fma=code.fma, code_bytes=code.code_bytes, light_us=light.time_us(op, dtype, architecture),
            shape=f"head_dim {constants['D']}" if needed else "", max_ratio=1.0 if needed else None,
        ))  # fmt: skip
    return found
