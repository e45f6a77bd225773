"""One message format for everything a caller can get wrong, and the checks an op's spec implies.

``<op>: <argument> has <what came>, expected <what was expected>[ from <argument> <shape>]``
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from hulukern.spec import Op


def fail(op: str, argument: str, came: str, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` in the one format."""
    raise error(f"{op}: {argument} has {came}, expected {expected}")


def require(condition: bool, op: str, argument: str, came: str, expected: str) -> None:
    if not condition:
        fail(op, argument, came, expected)


def came(value: Any) -> str:
    """What came, in one line: a number or text as it is, the type of anything else."""
    return f"value {value!r}" if isinstance(value, (str, int, float)) else f"type {type(value).__name__}"


def integer(op: str, name: str, value: Any) -> int:
    """An int of whatever library; a symbolic one stays symbolic, and 2.0 is none."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # torch's tensors raise either
        fail(op, name, came(value), "an int", TypeError)


def number(op: str, name: str, value: Any) -> float:
    """A float of whatever library; text is none."""
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch's tensors of several values raise the last
        pass
    fail(op, name, came(value), "a number", TypeError)


def _one_of(kind: type) -> Callable[[str, str, Any], Any]:
    def same(op: str, name: str, value: Any) -> Any:
        return value if isinstance(value, kind) else fail(op, name, came(value), f"a {kind.__name__}", TypeError)

    return same


# What an option of a schema's type must be.
OPTION = {"int": integer, "SymInt": integer, "float": number, "bool": _one_of(bool), "str": _one_of(str)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[Any], pattern: str | None = None) -> str:
    """``[4096, 588]``, or with a pattern the sizes named: ``[N=4096, L=588]``."""
    names = pattern.split() if pattern else []
    named = [f"{name}={size}" if not name.isdigit() else str(size) for name, size in zip(names, shape, strict=False)]
    return "[" + ", ".join(named or [str(size) for size in shape]) + "]"


def check_arguments(op: Op, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Check every tensor argument against the spec: type, dtype, device, dimensions, and sizes that
    stand under one letter in several places. Returns what each letter is.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    """
    letters: dict[str, int] = {}
    origin: dict[str, str] = {}
    first: torch.Tensor | None = None
    first_name = ""
    for spec in op.tensors:
        value = arguments[spec.name]
        if value is None and spec.optional:
            continue
        for name, tensor in _tensors(op, spec.name, value, spec.many):
            if tensor.dtype not in spec.dtypes:
                wanted = " or ".join(dtype_name(d) for d in spec.dtypes)
                fail(op.name, name, f"dtype {dtype_name(tensor.dtype)}", wanted, TypeError)
            if first is None:
                first, first_name = tensor, name
            elif tensor.device != first.device:
                fail(op.name, name, f"device {tensor.device}", f"{first.device} as {first_name}")
            _unify(op.name, name, tensor, spec.shape, letters, origin)
    return letters


def _tensors(op: Op, name: str, value: Any, many: bool) -> list[tuple[str, torch.Tensor]]:
    if many:
        if not isinstance(value, (list, tuple)):
            fail(op.name, name, f"type {type(value).__name__}", "a list of tensors", TypeError)
        named = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    else:
        named = [(name, value)]
    for label, item in named:
        if not isinstance(item, torch.Tensor):
            fail(op.name, label, f"type {type(item).__name__}", "a torch.Tensor", TypeError)
    return named


def _unify(
    op: str, name: str, tensor: torch.Tensor, pattern: str, letters: dict[str, int], origin: dict[str, str]
) -> None:
    names = pattern.split()
    rest = names[-1] == "..."
    names = names[: len(names) - rest]
    if tensor.dim() < len(names) or (tensor.dim() > len(names) and not rest):
        fail(op, name, f"shape {shape_text(tensor.shape)}", f"[{', '.join(pattern.split())}]")
    for letter, size in zip(names, tensor.shape, strict=False):
        known = letters.setdefault(letter, size)
        origin.setdefault(letter, f"{name} {shape_text(tensor.shape)}")
        if known != size:
            sizes = ", ".join(f"{n}={letters[n]}" if n in letters else n for n in names)
            fail(op, name, f"shape {shape_text(tensor.shape)}", f"[{sizes}] from {origin[letter]}")
