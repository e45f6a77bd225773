"""Launch configurations of the Triton kernels, as data.

A row per kernel and architecture. ``why`` gives the reason, or the file of the measurement that chose it: what
``python -m bench sweep`` measures goes to tuning.json beside this file, whose rows overrule TABLE.

HULUKERN_AUTOTUNE=1 times the rows of all architectures at the first use of a kernel and keeps the fastest until the
process ends. A first use must then come before a CUDA graph is captured.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100, 120)
MEASURED = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True)
class Row:
    """``blocks`` are the kernel's tile sizes by the name of its constexpr."""

    blocks: Mapping[str, int]
    warps: int
    stages: int
    why: str

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside its arguments."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}

    @property
    def label(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.options.items())


def nearest(arch: int) -> int:
    """The row's architecture for a device: the newest that is not newer."""
    return max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])


def row(kernel: str, arch: int) -> Row:
    chosen = TABLE[kernel][nearest(arch)]
    for rows, asked in _trials:
        asked[kernel] = nearest(arch)
        chosen = rows.get(kernel, chosen)
    return chosen


_trials: list[tuple[Mapping[str, Row], dict[str, int]]] = []


@contextlib.contextmanager
def trial(rows: Mapping[str, Row]) -> Iterator[dict[str, int]]:
    """For the time being ``rows`` overrule the table. Yields the kernels asked for since, with the architecture."""
    asked: dict[str, int] = {}
    _trials.append((rows, asked))
    try:
        yield asked
    finally:
        _trials.pop()


def candidates(kernel: str) -> list[Row]:
    """What the table has for a kernel on any architecture, each once."""
    return list({row.label: row for row in TABLE[kernel].values()}.values())


def autotuned(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a Triton backend of an op, with rows by time for kernels that it uses first."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with trial({}) as asked:
            result = function(*arguments)
        for kernel, arch in asked.items():
            if (kernel, arch) not in _timed:
                _timed.add((kernel, arch))
                rows = candidates(kernel)
                seconds = [_seconds(kernel, chosen, function, arguments) for chosen in rows]
                TABLE[kernel][arch] = rows[seconds.index(min(seconds))]
        return result

    return run


_timed: set[tuple[str, int]] = set()


def _seconds(kernel: str, chosen: Row, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Infinity for what does not compile or fit."""
    import triton

    with trial({kernel: chosen}):
        try:
            return float(triton.testing.do_bench(lambda: function(*arguments), warmup=5, rep=20)) / 1e3
        except (triton.TritonError, RuntimeError):
            return float("inf")


def read_rows(path: Path) -> dict[str, dict[int, Row]]:
    """Rows by kernel and architecture; none where there is no file. A ValueError names what the kernels cannot use, of
    a file that was measured for other ones, say."""
    if not path.exists():
        return {}
    try:
        kernels = json.loads(path.read_text())
        table = {
            kernel: {int(arch): Row(**{**entry, "blocks": dict(entry["blocks"])}) for arch, entry in rows.items()}
            for kernel, rows in kernels.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: has no table of rows ({error}), expected what `python -m bench sweep` writes"
        ) from error
    for kernel, rows in table.items():
        if kernel not in TABLE:
            raise ValueError(f"{path}: has a kernel {kernel!r}, expected one of {', '.join(TABLE)}")
        blocks = set(TABLE[kernel][ARCHITECTURES[0]].blocks)
        for arch, chosen in rows.items():
            if arch not in ARCHITECTURES:
                raise ValueError(f"{path}: has sm_{arch} for {kernel}, expected one of {ARCHITECTURES}")
            numbers = [*chosen.blocks.values(), chosen.warps, chosen.stages]
            if set(chosen.blocks) != blocks or not all(isinstance(n, int) and n > 0 for n in numbers):
                raise ValueError(f"{path}: has {chosen.label!r} for {kernel}, expected numbers above 0 for {blocks}")
    return table


def _tiles(q: int, k: int, warps: int, stages: int, why: str) -> Row:
    return Row({"BLOCK_Q": q, "BLOCK_K": k}, warps, stages, why)


def _everywhere(blocks: Mapping[str, int], warps: int, why: str) -> dict[int, Row]:
    return {arch: Row(blocks, warps, 1, why) for arch in ARCHITECTURES}


_STREAM = "16 elements a thread: two 16-byte loads in flight, 8 programs a multiprocessor"
_SUMS = "one program a multiprocessor, wide enough to keep the memory busy"
_WGMMA = "two warpgroups of 64 rows; logits of 64 keys beside the output fit in registers without spills"
_MMA = "logits and output of 16 rows a warp fit in registers; 3 stages fit in 100 KiB"
_SLOW = "three tf32 products each: the largest tile without spills"
_SMALL = "99 KiB and no wgmma: three blocks of 4 warps a multiprocessor"
_GRADS = "the largest tiles whose sums and two logit tiles fit in registers without spills"
_SHARED = "warps repeat half of a product (tensor work x 1.5) rather than spill, which all others do"
_FFMA = "columns streamed: the largest tile without spills at every head dim"
_ROWS = "16 rows: 256 programs at 4096 rows, whose angles stay in registers over the heads"

TABLE: dict[str, dict[int, Row]] = {
    "rope_attention": {
        80: _tiles(128, 64, 8, 3, _MMA),
        90: _tiles(128, 64, 8, 3, _WGMMA),
        100: _tiles(128, 64, 8, 3, _WGMMA),
        120: _tiles(64, 32, 4, 2, _SMALL),
    },
    "rope_attention.d128": {
        80: _tiles(128, 64, 8, 3, _MMA),
        90: _tiles(128, 64, 8, 3, _WGMMA),
        100: _tiles(128, 64, 8, 3, _WGMMA),
        120: _tiles(128, 32, 8, 2, _MMA),
    },
    "rope_attention_dq": {
        80: _tiles(64, 32, 4, 2, _GRADS),
        90: _tiles(128, 64, 8, 2, _GRADS),
        100: _tiles(64, 64, 4, 2, _GRADS),
        120: _tiles(64, 16, 4, 2, _GRADS),
    },
    "rope_attention_dq.d128": {
        80: _tiles(32, 64, 8, 2, _GRADS),
        90: _tiles(64, 32, 4, 1, _GRADS),
        100: _tiles(64, 64, 8, 2, _GRADS),
        120: _tiles(32, 64, 8, 2, _GRADS),
    },
    "rope_attention_dq.fp32": {
        80: _tiles(64, 16, 8, 1, _FFMA),
        90: _tiles(64, 16, 4, 1, _FFMA),
        100: _tiles(32, 16, 8, 1, _FFMA),
        120: _tiles(32, 16, 8, 1, _FFMA),
    },
    "rope_attention_dkdv": {
        80: _tiles(32, 128, 8, 2, _GRADS),
        90: _tiles(64, 128, 8, 2, _GRADS),
        100: _tiles(64, 64, 4, 2, _GRADS),
        120: _tiles(16, 64, 4, 2, _GRADS),
    },
    "rope_attention_dkdv.d128": {
        80: _tiles(64, 32, 8, 2, _GRADS),
        90: _tiles(64, 64, 8, 2, _SHARED),
        100: _tiles(64, 64, 8, 2, _GRADS),
        120: _tiles(32, 32, 8, 2, _SHARED),
    },
    "rope_attention_dkdv.fp32": {
        80: _tiles(64, 16, 8, 1, _FFMA),
        90: _tiles(16, 64, 8, 1, _FFMA),
        100: _tiles(16, 64, 8, 1, _FFMA),
        120: _tiles(16, 64, 8, 1, _FFMA),
    },
    "rope_attention_rotate": {arch: Row({"BLOCK_N": 16}, 4, 1, _ROWS) for arch in ARCHITECTURES},
    "rope_attention.fp32": {arch: _tiles(64, 16, 4, 1, _SLOW) for arch in ARCHITECTURES},
    # Memory-bound: elements a program holds at once, and programs that take turns at the rows. Backwards leave one
    # row of fp32 sums a program, so few programs: 132 leave 3 % of the bytes at 8192 rows.
    "layer_norm": _everywhere({"TILE": 2048, "PROGRAMS": 1056}, 4, _STREAM),
    "layer_norm_backward": _everywhere({"TILE": 4096, "PROGRAMS": 132}, 8, _SUMS),
    "bias_gelu": _everywhere({"TILE": 4096, "PROGRAMS": 1056}, 4, _STREAM),
    "bias_gelu_backward": _everywhere({"TILE": 2048, "PROGRAMS": 1056}, 4, _STREAM),
    "patch_embed": {
        arch: Row({"BLOCK_N": 128, "BLOCK_E": 128, "BLOCK_L": 32}, 8, 3, "588 = 18 x 32 + 12; 64 sums a thread")
        for arch in ARCHITECTURES
    },
    "patch_embed.fp32": {
        arch: Row({"BLOCK_N": 64, "BLOCK_E": 64 if arch < 120 else 32, "BLOCK_L": 32}, 4, 1, _SLOW)
        for arch in ARCHITECTURES
    },
    "patch_embed_cut": {
        arch: Row({"BLOCK_N": 8, "BLOCK_L": 256}, 4, 1, "16 pixels a thread") for arch in ARCHITECTURES
    },
    "token_compact_rows": _everywhere({"TILE_BYTES": 8192}, 4, "four 16-byte accesses a thread"),
    "spatial_merge": _everywhere({"TILE": 1, "PROGRAMS": 1056}, 4, _STREAM),
    "spatial_merge_backward": _everywhere({"TILE": 1, "PROGRAMS": 132}, 8, _SUMS),
}

for _kernel, _rows in read_rows(MEASURED).items():
    TABLE[_kernel].update(_rows)
