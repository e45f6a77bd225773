"""Speed of light: no call of an op can be shorter than its bytes at the memory's peak, nor its FLOPs at the units'."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import hulukern
from bench.static.machine_code import remembered
from hulukern.testing import harness
from hulukern.validation import dtype_name


class Peak(NamedTuple):
    """Bytes and dense FLOPs a second."""

    memory: float
    tensor_16: float  # bf16 and fp16, fp32 sums
    tensor_32: float  # tf32
    fp32: float


# NVIDIA's datasheets, dense rates (half of what stands there "with sparsity"), one card an architecture:
#  80  A100 80GB SXM, "A100 Tensor Core GPU" datasheet, June 2021
#  90  H100 SXM, "H100 Tensor Core GPU" datasheet, 2023
# 100  B200, "HGX B200" page and "Blackwell Architecture" datasheet, an eighth of the eight-GPU board
# 120  GeForce RTX 5090, "RTX Blackwell GPU Architecture" whitepaper, appendix A
PEAKS = {
    80: Peak(2.039e12, 312e12, 156e12, 19.5e12),
    90: Peak(3.35e12, 989.4e12, 494.7e12, 66.9e12),
    100: Peak(8.0e12, 2250e12, 1125e12, 75e12),
    120: Peak(1.792e12, 209.5e12, 104.8e12, 104.8e12),
}
PRODUCTS = ("rope_attention", "rope_attention_backward", "patch_embed", "patch_embed_frames")


def time_us(op: str, dtype: str, architecture: int) -> float | None:
    """Of one call of ``op`` on its first performance case, all its kernels together; None for a kernel of no one op.
    Another dtype than the op takes means its first 16-bit one."""
    if op not in hulukern.OPS:
        return None
    n_bytes, flops, dtype = _cost(op, dtype)
    peak = PEAKS[architecture]
    units = peak.fp32
    if op in PRODUCTS:  # fp32 precision on tensor units takes three products
        units = max(peak.fp32, peak.tensor_32 / 3) if dtype == "float32" else peak.tensor_16
    return float(f"{1e6 * max(n_bytes / peak.memory, flops / units):.4g}")


@functools.cache
def _cost(name: str, dtype: str) -> tuple[int, int, str]:
    registered = hulukern.OPS[name]
    op = registered.spec
    default = op.main_dtype
    chosen = next((d for d in op.dtypes if dtype_name(d) == dtype), default)

    def count() -> tuple[int, int]:
        cost = op.cost(harness.sample(op, op.perf_cases[0], chosen, "cpu"))
        return cost.bytes, cost.flops

    # Arguments of performance cases are large, and what a spec counts depends on nothing but the ops' sources.
    package = Path(hulukern.__file__).parent / "ops"
    folder = package / registered.package.rsplit(".", 1)[1]
    sources = [path.read_bytes() for path in (package / "common.py", folder / "spec.py", folder / "reference.py")]
    n_bytes, flops = remembered("cost", [name.encode(), dtype_name(chosen).encode(), *sources], count)
    return n_bytes, flops, dtype_name(chosen)
