"""An op, described once as data.

``hulukern/ops/<op>/spec.py`` holds one :class:`Op` per entry point. Validation, fake kernels, the test
harness, benchmarks and the README's op table read it; no shape list or tolerance stands twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class TensorArg:
    """A tensor argument. ``shape`` names its dimensions by letter; a trailing ``...`` takes any rest."""

    name: str
    shape: str
    dtypes: tuple[torch.dtype, ...]
    doc: str
    optional: bool = False
    many: bool = False  # a list of such tensors


@dataclass(frozen=True)
class Case:
    """A correctness or performance case. ``sizes`` is what the op's ``sample`` reads.

    Tags: ``odd`` (no power of two anywhere), ``tiny``, ``empty``, ``ragged`` (several clips of unequal
    size), ``perf`` (benchmarks only).
    """

    name: str
    sizes: Mapping[str, Any]
    tags: frozenset[str] = frozenset()


TOKENS = (4096, 16384, 65536)  # of a small call, a clip and a batch


def at_tokens(sizes: Callable[[int], Mapping[str, Any]]) -> tuple[Case, ...]:
    """Performance cases of 4 k, 16 k and 65 k patches; ``sizes`` says what an op's ``sample`` reads of one count."""
    return tuple(Case(f"tokens{n}", sizes(n), frozenset({"perf"})) for n in TOKENS)


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: bytes read once plus bytes written once, and FLOPs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class BadCall:
    """A call that must be refused: ``change`` edits a good call's arguments; the message must hold
    every string of ``says``. ``values``: what is wrong is in a tensor's values, which are looked at only
    where that does not stall a device."""

    name: str
    change: Callable[[Arguments], Arguments]
    error: type[Exception]
    says: tuple[str, ...]
    values: bool = False


@dataclass(frozen=True)
class Op:
    """One entry point of an op.

    name: as registered, ``hulukern::<name>``. schema: torch schema of arguments and results, without
    the name and without the trailing ``str backend``, which registration adds.
    sample: (case, dtype, device, generator) -> arguments by schema name; dtype is that of the
    argument named by ``dtype_of``.
    perf_cases: what is timed everywhere. gpu_cases: what a GPU is timed on beside, see :func:`at_tokens`.
    plain: the obvious torch formulation in the arguments' own dtype, same signature as the
    implementations; tolerance is derived from its error. None where results are exact.
    exact: whether a call's results must equal the reference bit for bit.
    differentiable: the arguments with a gradient.
    uninterpreted: dtypes that Triton's interpreter computes wrongly for this op's kernels, with the reason.
    backends: what implements it, as ``module:function`` inside the op's package, or a reason.
    check_backend: raises on what a backend, given by name, takes less of than the others.
    """

    name: str
    summary: str
    schema: str
    tensors: tuple[TensorArg, ...]
    dtype_of: str
    sample: Callable[[Case, torch.dtype, torch.device, torch.Generator], Arguments]
    cases: tuple[Case, ...]
    perf_cases: tuple[Case, ...]
    gpu_cases: tuple[Case, ...]
    cost: Callable[[Arguments], Cost]
    reduction: Callable[[Arguments], int]
    exact: Callable[[Arguments], bool]
    backends: Mapping[str, str]
    absent: Mapping[str, str] = field(default_factory=dict)
    uninterpreted: Mapping[torch.dtype, str] = field(default_factory=dict)
    plain: Callable[..., Any] | None = None
    differentiable: tuple[str, ...] = ()
    check: Callable[[Arguments, dict[str, int]], None] | None = None
    check_backend: Callable[[str, Arguments], None] | None = None
    bad_calls: tuple[BadCall, ...] = ()

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the argument that names the case's dtype."""
        return self.tensor(self.dtype_of).dtypes

    @property
    def main_dtype(self) -> torch.dtype:
        """What is measured where one has to do: bfloat16, as the model runs, and where there is none the first."""
        return torch.bfloat16 if torch.bfloat16 in self.dtypes else self.dtypes[0]

    def timed_case(self, name: str) -> Case:
        return next(case for case in (*self.perf_cases, *self.gpu_cases) if case.name == name)

    def tensor(self, name: str) -> TensorArg:
        return next(t for t in self.tensors if t.name == name)

    @property
    def argument_names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self._typed_names)

    @property
    def argument_types(self) -> tuple[str, ...]:
        """As the schema spells them: ``Tensor?``, ``float[]``."""
        return tuple(kind for kind, _ in self._typed_names)

    @property
    def _typed_names(self) -> list[list[str]]:
        inside = self.schema[1 : self.schema.index(") ->")]
        return [part.split("=")[0].split() for part in inside.split(",") if part.strip()]
