"""The speed of light: what a machine could do at best, and what share of that a row reaches.

A call must move its spec's bytes and do its FLOPs, so it cannot be faster than the longer of the two at the
ceilings. Those are measured in the same run (a copy far beyond the caches, a large matmul in each dtype), and stand
beside the datasheet's dense peaks where the device has one. Data that a cache holds may well beat a copy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.results import check
from bench.timing import interleave, interleave_cuda
from hulukern.backends import BACKENDS
from hulukern.validation import dtype_name

OURS = tuple(b for b in BACKENDS if b != "reference")
COPY_TARGET = 0.85  # of a memory-bound kernel on a GPU
MATMUL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ceilings:
    """Bytes read plus written per second, and FLOP/s of a matmul by dtype of its operands."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def light_s(self, n_bytes: int, flops: int, dtype: str) -> float | None:
        """The shortest time a call can take; None where nobody counted. What is not a float is not multiplied by
        tensor cores: fp32 arithmetic."""
        rate = self.flops_per_s.get(dtype) or self.flops_per_s.get("float32")
        if (not n_bytes and not flops) or (flops and not rate):
            return None
        return max(n_bytes / self.bytes_per_s, flops / rate if rate else 0.0)


def _peaks(tensor: float, fp32: float, memory: float) -> Ceilings:
    tera = {"bfloat16": tensor, "float16": tensor, "float32": fp32}
    return Ceilings(memory * 1e12, {dtype: value * 1e12 for dtype, value in tera.items()})


# Dense (never sparse) TFLOP/s of 16-bit tensor cores with fp32 accumulation, of fp32 without tensor cores (torch
# multiplies fp32 so unless told otherwise), and TB/s. The first whose name is in the device's name; longer names first.
DATASHEET = {
    "H100 PCIe": _peaks(756, 51, 2.0),  # NVIDIA H100 Tensor Core GPU datasheet, half of the sparse figure
    "H100 NVL": _peaks(835, 60, 3.9),  # same
    "H100": _peaks(989.4, 66.9, 3.35),  # same, SXM5; "NVIDIA H100 80GB HBM3"
    "H200": _peaks(989.4, 66.9, 4.8),  # NVIDIA H200 datasheet
    "A100-PCIE-40GB": _peaks(312, 19.5, 1.555),  # NVIDIA A100 datasheet
    "A100-SXM4-40GB": _peaks(312, 19.5, 1.555),
    "A100 80GB PCIe": _peaks(312, 19.5, 1.935),
    "A100": _peaks(312, 19.5, 2.039),  # same, SXM4 80 GB
    "B200": _peaks(2250, 75, 8.0),  # NVIDIA DGX B200 datasheet / 8
    "RTX 4090": _peaks(165.2, 82.6, 1.008),  # NVIDIA Ada GPU architecture whitepaper
    "RTX 5090": _peaks(209.5, 104.8, 1.792),  # NVIDIA RTX Blackwell GPU architecture whitepaper
}


def datasheet(device: str) -> Ceilings | None:
    """Of the current GPU; None for a CPU, and for a GPU that is not in the list."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peaks for known, peaks in DATASHEET.items() if known in name), None)


def measure(device: str, seconds: float = 2.0) -> Ceilings:
    """Both kinds of ceiling, here and now."""
    cuda = device == "cuda"
    n = 1 << (30 if cuda else 27)
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Any] = {"copy": lambda: target.copy_(source)}
    sides = {dtype_name(dtype): 8192 if cuda else _side(dtype) for dtype in MATMUL_DTYPES}
    for name, side in sides.items():
        a = torch.randn(side, side, device=device).to(getattr(torch, name))
        runs[name] = lambda a=a: a @ a
    with torch.inference_mode():
        if cuda:
            on_device = {name: (lambda _, call=call: call()) for name, call in runs.items()}
            rounds = interleave_cuda(on_device, sets=1, seconds=seconds)
        else:
            rounds = interleave(runs, seconds=seconds, min_rounds=5, warmups=1)
    flops = {name: 2 * side**3 / rounds.timing(name).median for name, side in sides.items()}
    if not cuda:  # where fp16 has no instructions, whoever converts it first has those of fp32
        flops["float16"] = max(flops["float16"], flops["float32"])
    return Ceilings(2 * n / rounds.timing("copy").median, flops)


def _side(dtype: torch.dtype) -> int:
    """Of a matmul that a CPU does in a tenth of a second: fp16 without instructions for it is 200 times as slow."""
    side, probe = 1536, 192
    a = torch.randn(probe, probe).to(dtype)
    a @ a
    probes = []
    for _ in range(5):  # one may lie in another process's time
        start = time.perf_counter()
        a @ a
        probes.append(time.perf_counter() - start)
        if probes[-1] > 0.1:
            break
    took = min(probes)
    while side > probe and took * (side / probe) ** 3 > 0.1:
        side //= 2
    return side


def annotate(
    rows: Sequence[Mapping[str, Any]], measured: Ceilings, peaks: Ceilings | None
) -> list[dict[str, float | None]]:
    """Per row, in its order:

    light_s: the speed of light by the measured ceilings. of_measured, of_datasheet: that light over the median.
    faster: the best peer's median over this one; plain torch counts, our reference only where no one else is.
    gap_closed: of the time between the best peer and the speed of light, the share that is gone; 0 is the peer,
    1 the speed of light. None: unknown.
    """
    found = []
    for r in rows:
        counts = (r["bytes"], r["flops"], r["dtype"])
        light, sheet = measured.light_s(*counts), peaks.light_s(*counts) if peaks else None
        same = [o for o in rows if all(o[k] == r[k] for k in ("op", "case", "dtype", "direction"))]
        peers = [o for o in same if o["impl"] not in BACKENDS] or [o for o in same if o["impl"] == "reference"]
        best = min((o["median_s"] for o in peers), default=None)
        gap = best - light if best and light and r["impl"] in OURS else 0.0
        found.append(
            {
                "light_s": light,
                "of_measured": light / r["median_s"] if light else None,
                "of_datasheet": sheet / r["median_s"] if sheet else None,
                "faster": best / r["median_s"] if best else None,
                "gap_closed": (best - r["median_s"]) / gap if best and gap > 0 else None,
            }
        )
    return found


def checks(rows: Sequence[Mapping[str, Any]], measured: Ceilings) -> list[dict[str, Any]]:
    """The share of the measured copy bandwidth that each memory-bound kernel of ours reaches."""
    found = []
    for r in (r for r in rows if r["impl"] in OURS and r["bytes"] and r["flops"] < 20 * r["bytes"]):
        name = f"copy_fraction_{r['op']}_{r['case']}_{r['dtype']}_{r['direction']}_{r['impl']}"
        share, low, high = (r["bytes"] / r[k] / measured.bytes_per_s for k in ("median_s", "high_s", "low_s"))
        found.append(check(name, share, low, high, COPY_TARGET))
    return found


def as_json(rows: Sequence[Mapping[str, Any]], measured: Ceilings, peaks: Ceilings | None) -> dict[str, Any]:
    """What stands beside rows in a results file."""
    return {
        "ceilings": {"measured": asdict(measured), "datasheet": asdict(peaks) if peaks else None},
        "roofline": annotate(rows, measured, peaks),
    }
