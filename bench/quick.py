"""The main job: what each rule removes on real medical input, what that costs, and how fast each op is.

Everything is checked before it is timed: backends must agree with the reference, and the fused front end
with plain torch, or the run stops with exit code 1.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import hulukern
from bench import baselines, report, roofline
from bench.agreement import Disagreement
from bench.report import CELL
from bench.results import check, row
from bench.timing import Rounds, Timing, interleave, summarize
from hulukern.pruning import RULES, Pruned, drift, prune_frames
from hulukern.testing.harness import call, sample
from hulukern.validation import dtype_name
from model.media import Clip, load_frames
from model.media.clip import thin
from model.sizing import frame_size, resize_frames

TARGET_REDUCTION = 0.55
BUDGET_PERCENT = 45  # kept, rounded down: the target is reached
BACKENDS = ("reference", "cpu")
FRONTEND_TARGET = 5.0
COPY_TARGET = 0.7
CALL_TARGET_US = 5.0


@dataclass(frozen=True)
class Input:
    """A named clip, resized, and how long that took."""

    name: str
    clip: Clip
    frames: torch.Tensor  # uint8 [T, H, W, C]
    resize_s: float


@dataclass(frozen=True)
class Outcome:
    """One rule on one input. Drift in normalised units, against the last kept version of a cell."""

    input: str
    rule: str
    frames: int
    before: int
    after: int
    reduction: float
    drift_max: float
    drift_mean: float
    lost: int


def default_inputs() -> dict[str, tuple[Path, float | None]]:
    """Name -> file that ships in a package, and frames per second or None for all."""
    import nibabel
    from pydicom.examples import get_path

    files = importlib.metadata.files("pydicom-data") or []
    four_seconds = next(Path(str(f.locate())) for f in files if f.name == "color3d_jpeg_baseline.dcm")
    echo = Path(get_path("ybr_color"))
    mr = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    return {"echo": (echo, None), "echo-1fps": (echo, 1.0), "echo-4s-1fps": (four_seconds, 1.0), "mr": (mr, None)}


def read_inputs(extra: Sequence[str], max_frames: int) -> list[Input]:
    """Decode and resize; raises ValueError for what cannot be read. One file is decoded once."""
    ours = default_inputs()
    wanted = dict(ours)
    for given in map(Path, extra):
        name = given.name
        for parent in given.resolve().parents:
            if name not in wanted:
                break
            name = f"{parent.name}/{name}"
        wanted[name] = (given, None)
    decoded: dict[Path, Clip] = {}
    inputs = []
    for name, (path, fps) in wanted.items():
        # Ours are short, and one is also thinned in time; a user's may be an hour.
        most = max_frames if name not in ours else None
        clip = decoded.get(path) or load_frames(path, fps=None, max_frames=most, num_slices=most)
        decoded[path] = clip
        clip = clip if fps is None else clip.at_fps(fps)
        clip = clip.take(thin(np.arange(len(clip.frames)), max_frames))
        T, H, W, _ = clip.frames.shape
        size = frame_size(H, W, n_frames=T)
        start = time.perf_counter()
        frames = torch.from_numpy(resize_frames(clip, size))
        inputs.append(Input(name, clip, frames, time.perf_counter() - start))
    return inputs


def apply_rule(frames: torch.Tensor, rule: str, backend: str, scores: torch.Tensor | None = None) -> Pruned:
    cells = frames.shape[0] * (frames.shape[1] // CELL) * (frames.shape[2] // CELL)
    keep = cells * BUDGET_PERCENT // 100 if rule == "budget" else None
    return prune_frames(frames, rule=rule, keep=keep, scores=None if rule == "bounded" else scores, backend=backend)


def outcome(name: str, rule: str, frames: torch.Tensor, keep: torch.Tensor) -> Outcome:
    d = drift(frames, keep)
    before, after = keep.numel(), int(keep.sum())
    return Outcome(name, rule, frames.shape[0], before, after, 1 - after / before, d.max, d.mean, d.lost)


class Quick:
    """One run: collects rows, checks and pictures' data as it goes."""

    def __init__(self, inputs: list[Input], seconds: float, console: Console) -> None:
        self.inputs, self.console = inputs, console
        # Shares of the measuring time, from what each needs for seven rounds on 2 cores.
        self.per_rule_s = 0.25 * seconds / (len(inputs) * len(RULES))
        # An op without a kernel for this machine has nothing to show here.
        self.ops = [name for name, op in hulukern.OPS.items() if "cpu" in op.spec.backends]
        self.per_op_s = 0.35 * seconds / len(self.ops)
        self.frontend_s = 0.25 * seconds
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.outcomes: list[Outcome] = []
        self.masks: dict[tuple[str, str], torch.Tensor] = {}
        self.copy_bytes_per_s = 0.0
        self.ceilings = roofline.Ceilings(0.0, {})

    def run(self) -> None:
        steps: list[tuple[str, Callable[[], None]]] = [("ceilings", self.measure_ceilings)]
        steps += [
            (f"{i.name}: {rule}", lambda i=i, rule=rule: self.rule(i, rule))  # type: ignore[misc]
            for i in self.inputs
            for rule in RULES
        ]
        steps += [(f"{i.name}: random", lambda i=i: self.random(i)) for i in self.inputs]  # type: ignore[misc]
        steps += [(f"op {name}", lambda name=name: self.op(name)) for name in self.ops]  # type: ignore[misc]
        steps += [("front end against torch", self.frontend), ("call overhead", self.call_overhead)]
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=len(steps))
            for text, step in steps:
                progress.update(task, description=text)
                if not self.console.is_terminal:
                    self.console.print(f"  {text}", style="dim")
                step()
                progress.advance(task)

    # --- measurements -----------------------------------------------------------------------------------

    def row(self, op: str, case: str, dtype: str, impl: str, t: Timing, n_bytes: int = 0, flops: int = 0) -> None:
        self.rows.append(row(op, case, dtype, "fwd", impl, t, n_bytes, flops))

    def measure_ceilings(self) -> None:
        self.ceilings = roofline.measure("cpu", 1.0)
        self.copy_bytes_per_s = self.ceilings.bytes_per_s

    def rule(self, i: Input, rule: str) -> None:
        """Tokens, drift, and the time of the stages on each backend."""
        kept = {b: apply_rule(i.frames, rule, b).keep for b in BACKENDS}
        if not torch.equal(kept["reference"], kept["cpu"]):
            raise Disagreement(f"{i.name}, rule {rule}: the backends keep different cells")
        self.masks[i.name, rule] = kept["cpu"]
        found = outcome(i.name, rule, i.frames, kept["cpu"])
        self.outcomes.append(found)
        r = found.reduction
        self.checks.append(check(f"reduction_{i.name}_{rule}", r, r, r, TARGET_REDUCTION))
        case, cells = f"{i.name}/{rule}", kept["cpu"].numel()
        stages: dict[str, Callable[[], Any]] = {}
        for b in BACKENDS:
            cut = hulukern.patch_embed_cut(i.frames, dtype=torch.bfloat16, with_scores=True, backend=b)
            patches, scores = cut
            stages[f"cut_score {b}"] = lambda b=b: hulukern.patch_embed_cut(  # type: ignore[misc]
                i.frames, dtype=torch.bfloat16, with_scores=True, backend=b
            )
            stages[f"mask {b}"] = lambda b=b, scores=scores: apply_rule(i.frames, rule, b, scores)  # type: ignore[misc]
            stages[f"compact {b}"] = lambda b=b, p=patches, k=kept[b]: hulukern.token_compact(  # type: ignore[misc]
                k, p.view(cells, -1), backend=b
            )
        rounds = interleave(stages, seconds=self.per_rule_s, min_rounds=5, warmups=1)
        for name in stages:
            stage, backend = name.split()
            self.row(f"stage_{stage}", case, "bfloat16", backend, rounds.timing(name))
        self.row("stage_resize", case, "uint8", "PIL", Timing(i.resize_s, i.resize_s, i.resize_s, 1))
        for b in BACKENDS:
            names = [n for n in stages if n.endswith(f" {b}")]
            total = [sum(parts) for parts in zip(*(rounds.seconds[n] for n in names), strict=True)]
            self.row("stage_total", case, "bfloat16", b, summarize(total))

    def random(self, i: Input) -> None:
        """As many tokens as the budget, drawn at random after the first frame: the baseline to beat."""
        n = self.masks[i.name, "budget"].numel()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order[: int(self.masks[i.name, "budget"].sum())]] = True
        self.outcomes.append(outcome(i.name, "random", i.frames, mask))

    def op(self, name: str) -> None:
        """Every backend that runs here, and the plain formulation, on the first performance case."""
        op = hulukern.OPS[name].spec
        case = op.perf_cases[0]
        dtype = op.main_dtype
        arguments = sample(op, case, dtype, "cpu")
        runs: dict[str, Callable[[], Any]] = {b: (lambda b=b: call(op, arguments, b)) for b in BACKENDS}  # type: ignore[misc]
        plain = baselines.eager(op)
        if plain is not None:
            runs["torch"] = lambda: plain(arguments)
        self._agree(name, runs["reference"](), runs["cpu"](), op.exact(arguments))
        rounds = interleave(runs, seconds=self.per_op_s, min_rounds=5, warmups=1)
        cost = op.cost(arguments)
        for impl in runs:
            self.row(name, case.name, dtype_name(dtype), impl, rounds.timing(impl), cost.bytes, cost.flops)
        if cost.flops < 20 * cost.bytes:  # bound by memory, not by arithmetic
            t = rounds.timing("cpu")
            share, low, high = (cost.bytes / s / self.copy_bytes_per_s for s in (t.median, t.high, t.low))
            self.checks.append(check(f"copy_share_{name}", share, low, high, COPY_TARGET))
        slow = "torch" if "torch" in runs else "reference"
        self._ratio(f"{name}_vs_{slow}", rounds, [slow], "cpu", 1.0)

    def frontend(self) -> None:
        """32 frames of 504x504 made from the echo: frames to kept bf16 patches."""
        source = next(i for i in self.inputs if i.name == "echo").clip.frames
        at = np.linspace(0, len(source) - 1, 32).round().astype(int)
        big = [np.asarray(Image.fromarray(source[t]).resize((504, 504), Image.Resampling.BICUBIC)) for t in at]
        frames = torch.from_numpy(np.stack(big))

        def fused() -> tuple[torch.Tensor, torch.Tensor]:
            patches, scores = hulukern.patch_embed_cut(frames, dtype=torch.bfloat16, with_scores=True, backend="cpu")
            keep = prune_frames(frames, rule="previous", scores=scores, backend="cpu").keep
            return hulukern.token_compact(keep, patches.view(keep.numel(), -1), backend="cpu").tensors[0], keep

        exact = baselines.frontend(frames)
        for theirs, ours in zip(exact, fused(), strict=True):
            if not torch.equal(theirs, ours):
                raise Disagreement("the fused front end and plain torch differ")
        runs = {
            "torch": lambda: baselines.frontend(frames),
            "torch bf16": lambda: baselines.frontend(frames, score_dtype=torch.bfloat16),
            "cpu": fused,
        }
        rounds = interleave(runs, seconds=self.frontend_s, warmups=1)
        n_bytes = frames.numel() + 2 * exact[0].numel() * exact[0].element_size()
        for impl in runs:
            self.row("frontend", "32x504x504", "bfloat16", impl, rounds.timing(impl), n_bytes)
        self._ratio("frontend_vs_torch", rounds, ["torch", "torch bf16"], "cpu", FRONTEND_TARGET)

    def call_overhead(self) -> None:
        """Microseconds of a tiny token_score_frames beyond an aten call on as many values."""
        frames = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
        values = frames.float()

        def many(function: Callable[[], Any]) -> Callable[[], None]:
            def loop() -> None:
                for _ in range(200):
                    function()

            return loop

        runs = {"hulukern": many(lambda: hulukern.token_score_frames(frames)), "aten": many(lambda: torch.abs(values))}
        rounds = interleave(runs, seconds=0.6, min_rounds=15)
        beyond = [(a - b) / 200 * 1e6 for a, b in zip(rounds.seconds["hulukern"], rounds.seconds["aten"], strict=True)]
        t = summarize(beyond)
        self.checks.append(check("call_overhead_us", t.median, t.low, t.high, CALL_TARGET_US, at_most=True))

    def _ratio(self, name: str, rounds: Rounds, slow: list[str], fast: str, target: float) -> None:
        """Against the fastest of ``slow`` in median."""
        best = min(slow, key=lambda s: rounds.timing(s).median)
        t = rounds.ratio(best, fast)
        self.checks.append(check(name, t.median, t.low, t.high, target))

    def _agree(self, name: str, reference: Any, got: Any, exact: bool) -> None:
        import torch.utils._pytree as pytree

        for x, y in zip(pytree.tree_leaves(reference), pytree.tree_leaves(got), strict=True):
            same = torch.equal(x, y) if exact else torch.allclose(x.float(), y.float(), rtol=0.02, atol=0.02)
            if not same:
                raise Disagreement(f"{name}: cpu and reference differ")

    def extra(self) -> dict[str, Any]:
        """What stands in the JSON beside rows and checks."""
        return {
            "suite": "quick",
            **roofline.as_json(self.rows, self.ceilings, None),
            "pictures": report.pictures(self.inputs, self.masks),
            "pruning": [asdict(o) for o in self.outcomes],
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "inputs": [
                {"name": i.name, "file": Path(i.clip.source).name, "kind": i.clip.form, "size": list(i.frames.shape)}
                for i in self.inputs
            ],
        }
