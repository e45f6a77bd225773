"""One kernel on one architecture, and what may never be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

# From sm_100 on ptxas keeps a register or two in a frame around subroutines (an IEEE division) and at 255 registers.
FRAME_BYTES_FROM_SM_100 = 8


@dataclass(frozen=True)
class Row:
    """``name`` is unique within a backend and target, and begins with the op."""

    backend: str
    target: str  # sm_90a
    op: str
    name: str
    dtype: str
    threads: int
    registers: int
    spills: int  # accesses of local memory
    stack_bytes: int
    shared_bytes: int
    occupancy: float
    loads: dict[int, int]  # bytes -> accesses of that width
    stores: dict[int, int]
    tensor: dict[str, int]
    tensor_ratio: float | None  # tensor work over what the shape needs
    fma: int
    code_bytes: int
    light_us: float | None  # of the whole op's first performance case
    shape: str = ""  # what a ratio above 1 pads
    max_ratio: float | None = None

    @property
    def label(self) -> str:
        return f"{self.backend} {self.target} {self.name}"

    def quantities(self) -> dict[str, Any]:
        """What is pinned, in JSON's own types."""
        values = asdict(self)
        found = {name: values[name] for name in QUANTITIES}
        for kind in ("loads", "stores"):
            found[kind] = {str(width): found[kind][width] for width in sorted(found[kind], reverse=True)}
        found["tensor"] = dict(sorted(found["tensor"].items()))
        for name in ("occupancy", "tensor_ratio"):
            found[name] = None if found[name] is None else round(found[name], 4)
        return found


QUANTITIES = (
    "threads", "registers", "spills", "stack_bytes", "shared_bytes", "occupancy", "loads", "stores", "tensor",
    "tensor_ratio", "code_bytes", "light_us",
)  # fmt: skip


class Finding(NamedTuple):
    label: str
    quantity: str
    verdict: str  # limit, worse, better, changed
    text: str


def architecture(target: str) -> int:
    return int(target.removeprefix("sm_").rstrip("a"))


def limits(row: Row) -> Iterator[Finding]:
    """What holds under every toolchain: nothing spills, no product is padded, a block fits."""
    frame = 0 if architecture(row.target) < 100 else FRAME_BYTES_FROM_SM_100
    if row.stack_bytes > frame or (row.spills and not frame):
        text = f"spills: {row.spills} accesses, stack {row.stack_bytes} bytes, expected at most {frame}"
        yield Finding(row.label, "spills", "limit", text)
    if row.max_ratio is not None and row.tensor_ratio is not None and row.tensor_ratio > row.max_ratio + 5e-4:
        text = f"tensor work x {row.tensor_ratio:.3f} of what {row.shape} needs, expected at most x {row.max_ratio:.3f}"
        yield Finding(row.label, "tensor_ratio", "limit", text)
    if row.occupancy == 0:
        text = (
            f"occupancy 0: no block of {row.threads} threads, {row.registers} registers and {row.shared_bytes} shared"
        )
        yield Finding(row.label, "occupancy", "limit", f"{text} bytes fits a multiprocessor")
