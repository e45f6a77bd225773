"""Suite ops: every op, performance case, dtype, direction and backend that can run here, in turns with its peers.

Correct first: each backend passes the harness on a small case, and everyone agrees with the reference on the case
that is timed, or is not timed. Then no one may cheat: argument sets rotate, results are held and checked again after
timing, inputs get fresh values, and a call on fresh values that takes far longer than the median was cached.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

import hulukern
from bench import roofline
from bench.baselines import BASELINES, Baseline, Run
from bench.listing import why_not
from bench.results import gpu_state, load_results, meta, row, write_results
from bench.timing import Rounds, interleave, interleave_cuda, keep_freed_memory, n_cold
from hulukern.backends import BACKENDS
from hulukern.spec import Arguments, Case, Op
from hulukern.testing import harness
from hulukern.validation import dtype_name

# Against the reference on the case that is timed; the harness is strict on a small one. Ours: of the largest value.
# Peers, as a share of the norm: they may add up gradients in 16 bits (torch's LayerNorm has single weights off by
# 0.11 of the largest over 8192 rows), while what computes something else is off everywhere.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
TOLERANCE_16, TOLERANCE_PEERS = 0.03, 0.1
FRESH = 2  # calls on inputs never seen
CACHED = 4.0  # times the median: more on fresh inputs than noise explains
CACHED_FLOOR_S = 2e-3  # and by at least this: a scheduler's slice is no cache
PATIENCE_S = 2.0  # with one call of a peer; a convolution's backward in fp16 takes a CPU half a minute
SAVE_EVERY_S = 10.0
# What the suite itself writes into a file.
OWN = (
    "meta",
    "rows",
    "checks",
    "suite",
    "device",
    "warm",
    "wanted",
    "complete",
    "reasons",
    "gpu_states",
    "ceilings",
    "roofline",
)


class Wrong(RuntimeError):
    """An implementation is not worth timing."""


class DeviceLost(RuntimeError):
    """A kernel left the GPU's context unusable: no more can be measured in this process."""


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


def groups(wanted: Filter, device: str) -> list[Group]:
    """A CPU has the performance cases, and of a GPU's own those that are named."""
    found = []
    for name, registered in hulukern.OPS.items():
        op = registered.spec
        # Backward ops are timed there through the ops that they belong to.
        more = op.gpu_cases if (device == "cuda" and not name.endswith("_backward")) or wanted.cases else ()
        for case in (*op.perf_cases, *more):
            for dtype in op.dtypes:
                if case in more and dtype != op.main_dtype and not wanted.dtypes:
                    continue
                # Gradients exist in floats only, and where a spec names arguments that have one.
                directions = ("fwd", "bwd") if op.differentiable and dtype.is_floating_point else ("fwd",)
                for direction in directions:
                    group = Group(name, case.name, dtype_name(dtype), direction)
                    pairs = ((group.op, wanted.ops), (group.case, wanted.cases), (group.dtype, wanted.dtypes))
                    if all(not names or value in names for value, names in pairs):
                        found.append((dtype != op.main_dtype, name != "rope_attention", case in more, group))
    # A deadline cuts what comes last: first main dtypes, of these attention, then what every machine has.
    found.sort(key=lambda entry: entry[:3])
    if not found:
        raise ValueError("--op, --case, --dtype: have no performance case in common, see python -m bench list")
    return [group for *_, group in found]


# --- one group -------------------------------------------------------------------------------------------------


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
    sets = 2 if warm else max(2, n_cold(cost[0], device))
    arguments = [first] + [sample(seed=k) for k in range(1, sets)]
    expected = [_expected(op, a, group.direction) for a in arguments]

    def attempt(step: Callable[[Contender], None]) -> None:
        for c in [c for c in contenders if c.name not in reasons]:
            try:
                step(c)
            except (Wrong, AssertionError) as error:
                reasons[c.name] = f"wrong: {_line(error)}"
            except Exception as error:  # a peer refuses in its own words; ours must not refuse
                reasons[c.name] = f"{'wrong' if c.ours else 'absent'}: {type(error).__name__}: {_line(error)}"
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
    for k in range(FRESH):
        new = sample(seed=1000 + k)
        # In the storage of the old ones: who knows inputs by their address is caught.
        new = _overwritten(first, new) if group.direction == "fwd" else new
        correct = [_expected(op, new, group.direction)]

        def fresh(c: Contender, new: Arguments = new, correct: list[Any] = correct) -> None:
            c.take([new])
            quickest[c.name] = min(quickest[c.name], _seconds(lambda: c.call(0), device))
            c.check(correct, exact, "on fresh inputs")

        attempt(fresh)
    for c in [c for c in timed if c.name not in reasons]:
        t = rounds.timing(c.name)
        if quickest[c.name] > CACHED * t.high + CACHED_FLOOR_S:
            reasons[c.name] = f"wrong: fresh inputs take {quickest[c.name] / t.median:.0f} times the median: cached"
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


def _lost(device: str) -> str:
    """Why nothing can run any more; empty where it can."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return _line(error)
    return ""


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


# --- all of them -----------------------------------------------------------------------------------------------


class Suite:
    """A run that saves as it goes: what an interrupted one leaves is whole, and ``resume`` goes on from there."""

    def __init__(self, path: Path, wanted: Filter, device: str, resume: bool = False, warm: bool = False) -> None:
        self.path, self.wanted, self.device, self.warm = path, wanted, device, warm
        self.groups = groups(wanted, device)
        if device == "cpu":  # or every large result's pages cost more than what is written into them
            keep_freed_memory()
        self.against = {"backends": list(wanted.backends), "baselines": list(wanted.baselines)}
        self.rows: list[dict[str, Any]] = []
        self.reasons: dict[str, dict[str, str]] = {}  # group -> implementation -> why it has no row
        self.extra: dict[str, Any] = {}  # what else the file holds
        self.gpu_states: list[dict[str, str]] = []  # clocks, power and throttling at every save
        self._saved = 0.0
        before = _earlier(path) if path.exists() else None
        if resume and before is not None:
            _same_run(path, before, device, warm, self.against)
            self.rows, self.reasons = before["rows"], before["reasons"]
            self.gpu_states = before["gpu_states"]
            self.extra = {k: v for k, v in before.items() if k not in OWN}
            self.ceilings = roofline.Ceilings(**before["ceilings"]["measured"])
        else:
            self.ceilings = roofline.measure(device)

    @property
    def left(self) -> list[Group]:
        return [g for g in self.groups if str(g) not in self.reasons]

    @property
    def wrong(self) -> list[str]:
        return [
            f"{group}/{name}: {reason}" for group, found in self.reasons.items() for name, reason in found.items()
            if reason.startswith("wrong") and name in (*BACKENDS, "all")
        ]  # fmt: skip

    def run(self, seconds: float, deadline: float = float("inf")) -> Iterator[Group]:
        """Measures groups, about ``seconds`` of measuring each; none is begun after ``deadline`` (monotonic)."""
        for group in self.left:
            if time.monotonic() > deadline:
                break
            reasons: dict[str, str] = {}
            try:
                found = contenders(group, self.wanted, self.device, reasons)
                self.rows += measure(group, found, self.device, seconds, reasons, self.warm)
            except Exception as error:  # no group may cost the others their turn
                reasons["all"] = f"wrong: {type(error).__name__}: {_line(error)}"
            lost = _lost(self.device)
            if lost:
                reasons["all"] = f"wrong: the device is lost: {lost}"
            self.reasons[str(group)] = reasons
            if lost:
                self.save()
                raise DeviceLost(f"{group}: {lost}")
            if time.monotonic() - self._saved > SAVE_EVERY_S:
                self.save()
            yield group
        self.save()

    def save(self) -> None:
        peaks = roofline.datasheet(self.device)
        if self.device == "cuda":
            self.gpu_states.append(gpu_state())
        checks = roofline.checks(self.rows, self.ceilings) if self.device == "cuda" else []
        write_results(
            self.path, self.rows, checks, suite="ops", device=self.device, warm=self.warm, wanted=self.against,
            complete=not self.left,
            reasons=self.reasons, gpu_states=self.gpu_states,
            **roofline.as_json(self.rows, self.ceilings, peaks), **self.extra,
        )  # fmt: skip
        self._saved = time.monotonic()


def _earlier(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is not a file of this suite: it is not ours to overwrite."""
    data = load_results(path)
    if data.get("suite") != "ops":
        raise ValueError(f"{path}: has results of another suite, expected those of ops or no file")
    return data


def _same_run(path: Path, data: Mapping[str, Any], device: str, warm: bool, wanted: dict[str, list[str]]) -> None:
    now = meta() | {"device": device, "warm": warm, "wanted": wanted}
    missing = [key for key in OWN if key not in data]
    if missing:
        raise ValueError(
            f"{path}: has no {', '.join(missing)}, expected a file of suite ops; without --resume it starts anew"
        )
    for key, was in (data["meta"] | {key: data[key] for key in ("device", "warm", "wanted")}).items():
        if key != "time" and was != now.get(key):
            raise ValueError(f"{path}: has {key} {was}, expected {now[key]} to go on; without --resume it starts anew")


def table(rows: Sequence[Mapping[str, Any]], light: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal, and for a machine with nothing but torch."""
    head = ("op", "case", "dtype", "dir", "impl", "median us", "95 % interval", "of light", "of sheet", "x peer")
    lines = [head]
    for r, n in zip(rows, light, strict=True):
        shares = ["" if n[k] is None else f"{100 * n[k]:.0f} %" for k in ("of_measured", "of_datasheet")]
        lines.append(
            (
                r["op"], r["case"], r["dtype"], r["direction"], r["impl"], f"{r['median_s'] * 1e6:.1f}",
                f"{r['low_s'] * 1e6:.1f} .. {r['high_s'] * 1e6:.1f}", *shares,
                "" if n["faster"] is None else f"{n['faster']:.2f}",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(path: Path, wanted: Filter, seconds: float, resume: bool, warm: bool, limit_s: float = float("inf")) -> int:
    """The suite as a command. Exit code 1 when a result is wrong, 2 when interrupted or the device is lost."""
    wanted.check()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # one core a thread, the same ones throughout
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
    suite = Suite(path, wanted, device, resume, warm)
    left, begin = suite.left, time.monotonic()
    each = seconds / len(suite.groups)
    print(f"{len(left)} of {len(suite.groups)} groups to measure, about {each:.2g} s each and as long for checks")
    try:
        for group in suite.run(each, begin + limit_s):
            print(f"[{time.monotonic() - begin:5.0f} s] {group}", flush=True)
    except KeyboardInterrupt:
        suite.save()
        print(
            f"bench: interrupted with {len(suite.left)} groups left; {path} is whole, --resume goes on", file=sys.stderr
        )
        return 2
    except DeviceLost as error:
        print(f"bench: {error}; {path} is whole, --resume goes on", file=sys.stderr)
        return 2
    print(table(suite.rows, load_results(path)["roofline"]))
    if suite.left:
        print(f"no time for: {', '.join(map(str, suite.left))}")
    print("\n".join([f"wrong  {w}" for w in suite.wrong] + [str(path)]))
    return 1 if suite.wrong else 0
