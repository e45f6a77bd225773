"""One group of suite ops: who may run, and their times once they are proven.

Correct first: each backend passes the harness on a small case, and everyone agrees with the reference on the case
that is timed, or is not timed. Then no one may cheat: argument sets rotate, results are held and checked again after
timing, inputs get fresh values, and a call on fresh values that takes far longer than the median was cached.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

import hulukern
from bench import roofline
from bench.baselines import BASELINES, Baseline, Run
from bench.listing import why_not
from bench.results import row
from bench.timing import Rounds, interleave, interleave_cuda, n_cold
from hulukern.backends import BACKENDS
from hulukern.spec import Arguments, Case, Op
from hulukern.testing import harness
from hulukern.validation import dtype_name

# Against the reference on the case that is timed; the harness is strict on a small one. Ours: of the largest value.
# Peers, as a share of the norm: they may add up gradients in 16 bits (torch's LayerNorm has single weights off by
# 0.11 of the largest over 8192 rows), while what computes something else is off everywhere.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
TOLERANCE_16, TOLERANCE_PEERS = 0.03, 0.1
FRESH, FRESH_MOST = 2, 12  # calls on inputs never seen: so many, and more while one looks cached
CACHED = 4.0  # times the median: more on fresh inputs than noise explains
CACHED_FLOOR_S = 2e-3  # and by at least this: a scheduler's slice is no cache
PATIENCE_S = 2.0  # with one call of a peer; a convolution's backward in fp16 takes a CPU half a minute


class Wrong(RuntimeError):
    """An implementation is not worth timing."""


@dataclass(frozen=True)
class Filter:
    """What to measure; empty is all."""

    ops: Sequence[str] = ()
    cases: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    backends: Sequence[str] = ()
    baselines: Sequence[str] = ()

    def check(self) -> None:
        """Raises ValueError for a name that nothing has."""
        specs = [o.spec for o in hulukern.OPS.values()]
        known = {
            "--op": (self.ops, list(hulukern.OPS)),
            "--case": (self.cases, sorted({c.name for op in specs for c in (*op.perf_cases, *op.gpu_cases)})),
            "--dtype": (self.dtypes, sorted({dtype_name(d) for op in specs for d in op.dtypes})),
            "--backend": (self.backends, list(BACKENDS)),
            "--baseline": (self.baselines, [b.name for b in BASELINES] + ["none"]),
        }
        for option, (given, names) in known.items():
            for name in given:
                if name not in names:
                    raise ValueError(f"{option}: has {name!r}, expected one of {', '.join(names)}")


@dataclass(frozen=True)
class Group:
    """What is measured in turns."""

    op: str
    case: str
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{self.op}/{self.case}/{self.dtype}/{self.direction}"


@dataclass
class Contender:
    """An implementation under measurement. ``turn`` runs the next argument set; results are held until checked."""

    name: str
    op: Op
    direction: str
    run: Callable[[Arguments], Any]
    sets: list[Any] = field(default_factory=list)
    held: dict[int, Any] = field(default_factory=dict)
    turns: int = 0

    @property
    def ours(self) -> bool:
        return self.name in BACKENDS

    def take(self, arguments: list[Arguments]) -> None:
        """A backward is timed alone: forwards run now, and keep their graphs."""
        forward = self.direction == "fwd"
        self.sets = arguments if forward else [_graph(self.op, a, self.run) for a in arguments]
        self.held = {}

    def call(self, k: int) -> Any:
        if self.direction == "fwd":
            self.held[k] = self.run(self.sets[k])
        else:
            g = self.sets[k]
            self.held[k] = torch.autograd.grad(g.outputs, g.leaves, g.upstream, allow_unused=True, retain_graph=True)
        return self.held[k]

    def turn(self) -> Any:
        self.turns += 1
        return self.call(self.turns % len(self.sets))

    def check(self, expected: list[Any], exact: bool, when: str) -> None:
        """Raises Wrong for a held result that is not what it should be."""
        for k, got in self.held.items():
            _agree(got, expected[k], exact and self.ours, self.ours, when)


def measure(
    group: Group, contenders: list[Contender], device: str, seconds: float, reasons: dict[str, str], warm: bool = False
) -> list[dict[str, Any]]:
    """Rows of those that hold; ``reasons`` gets why another does not: "absent: …" where it cannot, "wrong: …" where
    its result is. Inputs change from call to call; ``warm``, between two only, which caches may hold."""
    op = hulukern.OPS[group.op].spec
    if any(peer.compiles for peer in BASELINES if peer.name in {c.name for c in contenders}):
        torch.compiler.reset()  # they compile for each group's own shapes
    case, dtype = op.timed_case(group.case), getattr(torch, group.dtype)
    sample = functools.partial(harness.sample, op, case, dtype, device, drawn_on=device)
    first = sample()
    exact, cost = op.exact(first), _cost(op, case, dtype, first, group.direction, device)
    tensors = [x for x in pytree.tree_leaves(first) if isinstance(x, torch.Tensor)]
    sets = 2 if warm else max(2, n_cold(cost[0] or sum(x.numel() * x.element_size() for x in tensors), device))
    arguments = [first] + [sample(seed=k) for k in range(1, sets)]
    expected = [_expected(op, a, group.direction) for a in arguments]

    def attempt(step: Callable[[Contender], None]) -> None:
        for c in [c for c in contenders if c.name not in reasons]:
            try:
                step(c)
            except (Wrong, AssertionError) as error:
                reasons[c.name] = f"wrong: {line(error)}"
            except Exception as error:  # a peer refuses in its own words; ours must not refuse
                reasons[c.name] = f"{'wrong' if c.ours else 'absent'}: {type(error).__name__}: {line(error)}"
            if c.name in reasons:
                c.sets, c.held = [], {}  # what they hold of the GPU is the others'

    def correct_first(c: Contender) -> None:
        if c.ours:
            _strict(op.name, dtype, c.name, device, group.direction)
        c.take(arguments)
        quickest = min(_seconds(functools.partial(c.call, k), device) for k in range(len(arguments)))
        c.check(expected, exact, "before timing")
        if not c.ours and quickest > PATIENCE_S:
            reasons[c.name] = f"absent: one call takes {quickest:.0f} s, more than {PATIENCE_S:g} are not waited for"

    attempt(correct_first)
    timed = [c for c in contenders if c.name not in reasons]
    if not timed:
        return []
    rounds = _time(timed, len(arguments), device, seconds)
    attempt(lambda c: c.check(expected, exact, "after timing"))

    quickest = {c.name: float("inf") for c in timed}

    def cached() -> list[str]:
        limits = {c.name: CACHED * rounds.timing(c.name).high + CACHED_FLOOR_S for c in timed if c.name not in reasons}
        return [name for name, limit in limits.items() if quickest[name] > limit]

    for k in range(FRESH_MOST):  # a busy machine delays some calls, a cache is missed by all
        if k >= FRESH and not cached():
            break
        new = sample(seed=1000 + k)
        # In the storage of the old ones: who knows inputs by their address is caught.
        new = _overwritten(first, new) if group.direction == "fwd" else new
        correct = [_expected(op, new, group.direction)]

        def fresh(c: Contender, new: Arguments = new, correct: list[Any] = correct) -> None:
            c.take([new])
            quickest[c.name] = min(quickest[c.name], _seconds(lambda: c.call(0), device))
            c.check(correct, exact, "on fresh inputs")

        attempt(fresh)
    for name in cached():
        times = quickest[name] / rounds.timing(name).median
        reasons[name] = f"wrong: fresh inputs take {times:.0f} times the median: cached"
    where = (group.op, group.case, group.dtype, group.direction)
    return [row(*where, c.name, rounds.timing(c.name), *cost) for c in timed if c.name not in reasons]


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()  # what made the arguments is not the call's
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contenders(group: Group, wanted: Filter, device: str, reasons: dict[str, str]) -> list[Contender]:
    """Everyone who may run here; the reference only when it is asked for, since nobody runs it for its speed."""
    op = hulukern.OPS[group.op].spec
    found = []
    for backend in wanted.backends or roofline.OURS:
        reason = why_not(op, backend, device)
        if not reason and device == "cpu" and backend != "cpu" and not wanted.backends:
            reason = "interpreted or simulated here: a proof, and no speed unless --backend asks for it"
        if reason:
            reasons[backend] = f"absent: {reason}"
        else:
            found.append(Contender(backend, op, group.direction, functools.partial(_through, op, backend)))
    for peer in BASELINES:
        if op.name in peer.ops and (not wanted.baselines or peer.name in wanted.baselines):
            reason = peer.absent(device)
            if peer.compiles and group.dtype != dtype_name(op.main_dtype) and not wanted.baselines:
                reason = "compiles some 10 s a case: in the main dtype only, unless --baseline asks for it"
            if reason:
                reasons[peer.name] = f"absent: {reason}"
            else:
                found.append(Contender(peer.name, op, group.direction, _Prepared(peer, op)))
    return found


def _through(op: Op, backend: str, a: Arguments) -> Any:
    return harness.call(op, a, backend)


class _Prepared:
    """A peer that prepares itself for the first arguments it sees."""

    def __init__(self, peer: Baseline, op: Op) -> None:
        self.peer, self.op = peer, op
        self.run: Run | None = None

    def __call__(self, a: Arguments) -> Any:
        self.run = self.run or self.peer.prepare(self.op, a)
        return self.run(a)


@functools.cache
def _strict(name: str, dtype: torch.dtype, backend: str, device: str, direction: str) -> None:
    """The harness on a small case: the tolerance of the tests. Raises AssertionError."""
    op = hulukern.OPS[name].spec
    check = harness.check_forward if direction == "fwd" else harness.check_backward
    check(op, op.cases[0], dtype, backend, device)


def _time(contenders: list[Contender], sets: int, device: str, seconds: float) -> Rounds:
    if device == "cuda":
        return interleave_cuda({c.name: c.call for c in contenders}, sets=sets, seconds=seconds)
    return interleave({c.name: c.turn for c in contenders}, seconds=seconds, min_rounds=5, warmups=1)


def _graph(op: Op, a: Arguments, run: Run) -> harness.Graph:
    """With upstream gradients as a layer behind it has them, in rows: the harness's own would time a transposition."""
    device = next(x.device.type for x in pytree.tree_leaves(a) if isinstance(x, torch.Tensor))
    g = harness.graph(op, a, run, drawn_on=device)
    return dataclasses.replace(g, upstream=[x.contiguous() for x in g.upstream])


def _expected(op: Op, a: Arguments, direction: str) -> Any:
    if direction == "fwd":
        return harness.call(op, a, "reference")
    g = _graph(op, a, functools.partial(_through, op, "reference"))
    return torch.autograd.grad(g.outputs, g.leaves, g.upstream, allow_unused=True)


def _overwritten(old: Arguments, new: Arguments) -> Arguments:
    pairs = list(zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True))
    if any(isinstance(x, torch.Tensor) and x.shape != y.shape for x, y in pairs):
        return new  # as many values are kept as chance has it
    for x, y in pairs:
        if isinstance(x, torch.Tensor):
            x.copy_(y)
    return old


def _agree(got: Any, expected: Any, exact: bool, ours: bool, when: str) -> None:
    """Raises Wrong. A peer may return the first results only."""
    a, b = ([x for x in pytree.tree_leaves(v) if isinstance(x, torch.Tensor)] for v in (got, expected))
    if not a or len(a) > len(b) or (ours and len(a) < len(b)):
        raise Wrong(f"{when} {len(a)} results, expected {len(b)}")
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x.shape != y.shape:
            raise Wrong(f"{when} result {i} has shape {list(x.shape)}, expected {list(y.shape)}")
        if exact or not y.is_floating_point():
            off, limit, of = float((x != y).float().mean()) if x.numel() else 0.0, 0.0, "the values"
        else:
            finite = y.isfinite()
            if not torch.equal(x.isfinite(), finite):
                raise Wrong(f"{when} result {i} is not finite in other places than the reference")
            limit, of = TOLERANCE.get(y.dtype, TOLERANCE_16), "the largest value"
            if not finite.all():
                x, y = x[finite], y[finite]
            x, y = x.float(), y.float()
            difference = x - y
            if ours and y.numel():
                off = float(difference.abs().max() / y.abs().max().clamp(min=1e-6))
            else:
                off, limit, of = float(difference.norm() / y.norm().clamp(min=1e-6)), TOLERANCE_PEERS, "the norm"
        if not off <= limit:
            raise Wrong(f"{when} result {i} is off by {off:.3g} of {of}, at most {limit:g} is expected")


def _cost(op: Op, case: Case, dtype: torch.dtype, a: Arguments, direction: str, device: str) -> tuple[int, int]:
    """Bytes and FLOPs: of a backward what the op that does it says, where there is one with this case."""
    if direction == "fwd":
        cost = op.cost(a)
        return cost.bytes, cost.flops
    backward = hulukern.OPS.get(f"{op.name}_backward")
    if backward is None or case not in (*backward.spec.perf_cases, *backward.spec.gpu_cases):
        return 0, 0
    cost = backward.spec.cost(harness.sample(backward.spec, case, dtype, device, drawn_on=device))
    return cost.bytes, cost.flops


def line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
