"""From a spec to verdicts: each check raises AssertionError with what differs and where.

Tolerance is derived: the error against the reference in fp64 may be twice that of plain torch in the
arguments' dtype, plus a floor of one output rounding and an fp32 sum over the op's reduction length.
What a spec calls exact must equal the reference bit for bit.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from hulukern.registry import OPS
from hulukern.spec import Arguments, Case, Op
from hulukern.testing.buffers import lay_out, poisoned_buffers


def generator(*parts: object, device: str | torch.device = "cpu") -> torch.Generator:
    """Seeded by what it is for, the same in every process."""
    return torch.Generator(device).manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


def sample(
    op: Op,
    case: Case,
    dtype: torch.dtype,
    device: str,
    layout: str = "contiguous",
    seed: int = 0,
    drawn_on: str = "cpu",
) -> Arguments:
    """Arguments of a case. The host's values are the same for every device; large ones take it seconds to draw, so
    that benchmarks draw on the device that they time."""
    g = generator(op.name, case.name, dtype, seed, device=drawn_on)
    with torch.device(drawn_on):
        arguments = op.sample(case, dtype, torch.device(device), g)
    return pytree.tree_map_only(torch.Tensor, lambda x: lay_out(x, layout), arguments)


def call(op: Op, arguments: Arguments, backend: str) -> Any:
    """Through torch's dispatcher, as every user does."""
    overload = getattr(torch.ops.hulukern, op.name).default
    return overload(*(arguments[name] for name in op.argument_names), backend)


def reference(op: Op, arguments: Arguments) -> Any:
    return OPS[op.name].backend("reference", "cpu")(*(arguments[name] for name in op.argument_names))


def check_forward(
    op: Op, case: Case, dtype: torch.dtype, backend: str, device: str, layout: str = "contiguous", seed: int = 0
) -> None:
    """Outputs against the reference; inputs untouched; every element written; nothing written beside."""
    arguments = sample(op, case, dtype, device, layout, seed)
    before = pytree.tree_map_only(torch.Tensor, lambda x: x.clone(), arguments)
    with poisoned_buffers():
        got = call(op, arguments, backend)
    for name in arguments:
        _all_equal(f"{op.name}: argument {name} was modified", arguments[name], before[name])
    if op.exact(arguments):
        _all_equal(op.name, got, reference(op, arguments))
        return
    expected = reference(op, _as_double(arguments))
    plain = _plain(op)(*(arguments[name] for name in op.argument_names))
    _compare(op.name, got, expected, plain, op.reduction(arguments))


def check_backward(
    op: Op, case: Case, dtype: torch.dtype, backend: str, device: str, layout: str = "contiguous", seed: int = 0
) -> None:
    """Gradients of every differentiable argument, under random upstream gradients, against autograd of
    the reference in fp64."""
    arguments = sample(op, case, dtype, device, layout, seed)
    got = _gradients(op, arguments, lambda a: call(op, a, backend), seed)
    expected = _gradients(op, _as_double(arguments), lambda a: reference(op, a), seed)
    plain = _gradients(op, arguments, lambda a: _plain(op)(*(a[name] for name in op.argument_names)), seed)
    assert got.keys() == expected.keys(), f"{op.name}: gradients of {sorted(got)}, expected {sorted(expected)}"
    for name in got:
        x = arguments[name.split("[")[0]]
        like = x[int(name.split("[")[1][:-1])] if "[" in name else x
        assert got[name].shape == like.shape, f"{op.name}: grad {name} has shape {tuple(got[name].shape)}"
        assert got[name].dtype == like.dtype, f"{op.name}: grad {name} has dtype {got[name].dtype}"
        length = max((t.shape[0] for t in pytree.tree_leaves(arguments) if _is_float(t) and t.dim()), default=1)
        n_rows = max(got[name].numel() // max(got[name].shape[0], 1) if got[name].dim() else 1, length)
        _compare(f"{op.name}: grad {name}", got[name], expected[name], plain[name], max(n_rows, length))


def check_opcheck(op: Op, case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch, by torch's own checker."""
    arguments = _with_grad(op, sample(op, case, dtype, device))
    overload = getattr(torch.ops.hulukern, op.name).default
    torch.library.opcheck(overload, (*(arguments[name] for name in op.argument_names), backend))


def check_compile(op: Op, case: Case, dtype: torch.dtype, backend: str, device: str, compiler: str) -> None:
    """torch.compile(fullgraph=True), gradients included, gives what eager gives."""
    import torch._dynamo

    torch._dynamo.reset()
    arguments = sample(op, case, dtype, device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda a: call(op, a, backend), fullgraph=True, backend=compiler)
        _all_equal(op.name, compiled(arguments), call(op, arguments, backend))
        if differentiable(op, arguments):
            # The graph's own additions may round in another order than eager's: torch's tolerance for a dtype.
            got = _gradients(op, arguments, compiled, 0)
            torch.testing.assert_close(got, _gradients(op, arguments, lambda a: call(op, a, backend), 0))


def differentiable(op: Op, arguments: Arguments) -> list[str]:
    """The arguments of this call that have a gradient, list items as ``name[i]``."""
    names = []
    for name in op.differentiable:
        value = arguments[name]
        if isinstance(value, (list, tuple)):
            names += [f"{name}[{i}]" for i, x in enumerate(value) if _is_float(x)]
        elif _is_float(value):
            names.append(name)
    return names


def _with_grad(op: Op, arguments: Arguments) -> Arguments:
    """Copies whose differentiable tensors require a gradient; layouts are kept."""
    out = dict(arguments)
    for name in op.differentiable:
        out[name] = pytree.tree_map_only(
            torch.Tensor, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, out[name]
        )
    return out


@dataclass(frozen=True)
class Graph:
    """A forward that ran, ready for ``torch.autograd.grad(outputs, leaves, upstream)``."""

    names: list[str]
    outputs: list[torch.Tensor]
    leaves: list[torch.Tensor]
    upstream: list[torch.Tensor]


def graph(op: Op, arguments: Arguments, run: Callable[[Arguments], Any], seed: int = 0, drawn_on: str = "cpu") -> Graph:
    """Run forward on copies that require gradients, with random upstream gradients."""
    arguments = _with_grad(op, arguments)
    names = differentiable(op, arguments)
    leaves = []
    for name in names:
        base, _, index = name.partition("[")
        leaves.append(arguments[base][int(index[:-1])] if index else arguments[base])
    outputs = [y for y in pytree.tree_leaves(run(arguments)) if y.requires_grad]
    upstream = []
    for i, y in enumerate(outputs):
        draw = generator(op.name, "upstream", i, seed, device=drawn_on)
        g = torch.randn(y.shape[::-1], generator=draw, dtype=torch.float64, device=drawn_on)
        # Not contiguous where that is possible: autograd promises nothing about upstream layouts.
        upstream.append(g.permute(*range(g.dim() - 1, -1, -1)).to(y.device, y.dtype))
    return Graph(names, outputs, leaves, upstream)


def _gradients(op: Op, arguments: Arguments, run: Callable[[Arguments], Any], seed: int) -> dict[str, torch.Tensor]:
    g = graph(op, arguments, run, seed)
    grads = torch.autograd.grad(g.outputs, g.leaves, g.upstream, allow_unused=True)
    missing = [name for name, x, leaf in zip(g.names, grads, g.leaves, strict=True) if x is None and leaf.numel()]
    assert not missing, f"{op.name}: no gradient for {missing}"
    filled = [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(grads, g.leaves, strict=True)]
    return dict(zip(g.names, filled, strict=True))


def _plain(op: Op) -> Callable[..., Any]:
    return op.plain or OPS[op.name].backend("reference", "cpu")


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _as_double(arguments: Arguments) -> Arguments:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)


def _all_equal(what: str, got: Any, expected: Any) -> None:
    a, b = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(a) == len(b), f"{what}: {len(a)} results, expected {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(x, torch.Tensor):
            assert x == y, f"{what}: {x} is not {y}"
            continue
        _same_form(f"{what}: result {i}", x, y)
        different = ~((x == y) | (x.isnan() & y.isnan())) if x.is_floating_point() else x != y
        assert not different.any(), f"{what}: result {i} differs in {int(different.sum())} of {x.numel()} elements"


def _same_form(what: str, x: torch.Tensor, y: torch.Tensor) -> None:
    assert x.shape == y.shape, f"{what} has shape {tuple(x.shape)}, expected {tuple(y.shape)}"
    assert x.dtype == y.dtype, f"{what} has dtype {x.dtype}, expected {y.dtype}"


def _compare(what: str, got: Any, expected: Any, plain: Any, reduction: int) -> None:
    triples = zip(*map(pytree.tree_leaves, (got, expected, plain)), strict=True)
    for i, (x, e, p) in enumerate(triples):
        label = f"{what}: result {i}"
        _same_form(label, x, p)
        if not x.is_floating_point():
            assert torch.equal(x, e), f"{label} differs"
            continue
        assert x.shape == e.shape, f"{label} has shape {tuple(x.shape)}, expected {tuple(e.shape)}"
        if x.numel() == 0:
            continue
        x, e, p = x.double().cpu(), e.double().cpu(), p.double().cpu()
        infinite = ~e.isfinite()
        assert torch.equal(x[infinite], e[infinite]), f"{label} differs where the reference is not finite"
        x, e, p = x[~infinite], e[~infinite], p[~infinite]
        if x.numel() == 0:
            continue
        assert x.isfinite().all(), f"{label} is not finite in {int((~x.isfinite()).sum())} places"
        out_eps = torch.finfo(pytree.tree_leaves(got)[i].dtype).eps
        scale = e.abs().max()
        floor = out_eps * e.abs() + torch.finfo(torch.float32).eps * max(reduction, 1) ** 0.5 * scale
        bound = 2 * (p - e).abs().max() + floor
        worst = ((x - e).abs() / bound.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
        assert worst <= 1, f"{label} is off by {worst:.3g} times the allowed error"


@contextlib.contextmanager
def implementation(op: Op, name: str, function: Callable[..., Any]) -> Iterator[str]:
    """For the time being ``function`` is a backend of this op, to be put through the checks."""
    registered = OPS[op.name]
    registered.set_implementation(name, function)
    try:
        yield name
    finally:
        registered.set_implementation(name, None)
