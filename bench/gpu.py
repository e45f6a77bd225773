"""The model on a GPU: the encoder at full depth and its training step against transformers' port, and what reduction
gains end to end with a decoder of the 7B's shape. Without a GPU it rehearses with a model of two layers.

Correct first: everyone agrees with the port before anything is timed. The file is written after every step, so that a
run that is stopped leaves what it had.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import is_flash_attn_2_available

from bench import roofline
from bench.agreement import agree
from bench.models import DECODER_7B, IMAGE_TOKEN, PATCH, REAL, decoder_shape, encoders, flops, patches, whole
from bench.profile import longest, words
from bench.results import check, gpu_state, load_results, row, write_results
from bench.timing import Rounds, interleave, interleave_cuda, peak_memory
from hulukern.backends import runs_on, unavailable

REDUCTIONS = (0.0, 0.30, 0.55, 0.80)
PEER = "transformers"
PROMPT_TOKENS = 32  # of text after a clip
# Of the largest value. At full depth equal models differ by 0.012 in bf16, other rotary angles make 0.2 and more.
AGREEMENT = 0.04
LONGEST = 12  # entries of a profile that are kept


@dataclass(frozen=True)
class Scale:
    """What is measured."""

    encoder: Mapping[str, int]
    layers: int
    side: int  # patches, of a frame
    frames: tuple[int, ...]
    train_frames: int
    decoder: Mapping[str, int]
    clip_side: int  # patches, of a frame of a clip that the whole model sees
    batches: tuple[tuple[int, int], ...]  # of how many clips, of how many frames


FULL = Scale(REAL, 27, 32, (16, 64), 8, DECODER_7B, 24, ((1, 16), (32, 8)))
SMALL = {"hidden_size": 144, "intermediate_size": 288, "num_attention_heads": 2}
REHEARSAL = Scale(SMALL, 2, 4, (2, 3), 2, decoder_shape("128x1"), 4, ((1, 4), (2, 6)))


def main(path: Path, only: str, seconds: float) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suite = Suite(FULL if device == "cuda" else REHEARSAL, device)
    steps = [(name, step) for name, step in suite.steps() if only in name]
    if not steps:
        print(f"bench: --only has {only!r}, which names no step", file=sys.stderr)
        return 2
    begin = time.monotonic()
    for name, step in steps:
        try:
            step(seconds / len(steps))
        except Exception as error:  # no step may cost the others their turn
            suite.failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        torch.compiler.reset()  # and what it compiled
        suite.save(path)
        print(f"[{time.monotonic() - begin:5.0f} s] {name}", flush=True)
    print(table(load_results(path)))
    print(path)
    return 1 if suite.failures else 0


class Suite:
    def __init__(self, scale: Scale, device: str) -> None:
        self.scale, self.device = scale, device
        kinds = ("cuda", "triton") if device == "cuda" else ("cpu",)  # a simulated kernel is a proof and has no speed
        self.backends = [b for b in kinds if runs_on(b, device) and not unavailable(b)]
        self.ceilings = roofline.measure(device)
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.profiles: dict[str, list[dict[str, Any]]] = {}
        self.curve: list[dict[str, Any]] = []
        self.absent: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.gpu_states: list[dict[str, str]] = []

    def steps(self) -> Iterator[tuple[str, Callable[[float], None]]]:
        """What a run that is stopped can best do without comes last: the port is compiled anew for each size."""
        few, many = self.scale.frames[0], self.scale.frames[1:]
        yield f"encoder_{few}f", lambda s: self.encoder(few, s)
        for B, T in self.scale.batches:
            yield f"reduction_b{B}", lambda s, B=B, T=T: self.reduction(B, T, s)  # type: ignore[misc]
        yield "train_step", self.train_step
        for T in many:
            yield f"encoder_{T}f", lambda s, T=T: self.encoder(T, s)  # type: ignore[misc]

    # --- the encoder ----------------------------------------------------------------------------------------

    def encoder(self, T: int, seconds: float) -> None:
        name = f"encoder_bf16_{T}f"
        with torch.inference_mode():
            runs = {impl: run for impl, (_, run) in self._contenders(name, T).items()}
            self._compare(name, "fwd", runs, self._flops(T), seconds)

    def train_step(self, seconds: float) -> None:
        s, T = self.scale, self.scale.train_frames
        name = f"train_step_bf16_{T}f"
        upstream = torch.randn(T * s.side**2 // 4, s.encoder["hidden_size"], device=self.device).to(torch.bfloat16)

        def step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
            return lambda: list(torch.autograd.grad(forward(), list(model.parameters()), upstream))

        found = self._contenders(name, T)
        runs = {}
        theirs = dict(zip([n for n, _ in found[PEER][0].named_parameters()], step(*found[PEER])(), strict=True))
        for impl, (model, forward) in found.items():
            with self._peers_may_fail(name, impl):
                run = step(model, forward)
                for (parameter, _), got in zip(model.named_parameters(), run(), strict=True):
                    if "norm" not in parameter:  # torch adds up those of its LayerNorm in bf16: half of one is noise
                        agree(f"{name}, {impl}: {parameter}", theirs[parameter], got, 0.1)
                runs[impl] = run
        self._compare(name, "fwd+bwd", runs, 3 * self._flops(T), seconds)

    def _flops(self, T: int) -> int:
        return flops(self.scale.layers, T, self.scale.side, self.scale.encoder)

    def _contenders(self, name: str, T: int) -> dict[str, tuple[Any, Callable[[], torch.Tensor]]]:
        """Our model on every backend, and the port with each attention that is here and compiled layer by layer (whole,
        its layers are as many graphs): copies of the same weights. All must agree with the port as it is."""
        s = self.scale
        ours, theirs = encoders(s.layers, self.device, s.encoder)
        pixels, grid = patches(T, s.side, self.device), torch.tensor([[T, s.side, s.side]])
        models: dict[str, Any] = {PEER: theirs}
        for backend in self.backends:
            models[backend] = copy.deepcopy(ours)
            models[backend].backend = backend
        models["transformers compiled"] = compiled = copy.deepcopy(theirs)
        for layer in compiled.encoder.layers:
            layer.compile()
        if is_flash_attn_2_available():
            models["transformers flash"] = flash = copy.deepcopy(theirs)
            flash.set_attn_implementation("flash_attention_2")
        else:
            self.absent["transformers flash"] = "flash-attn 2 is not installed, or there is no GPU"
        on_device = (grid.to(self.device), torch.tensor([2], device=self.device))

        def forward(impl: str) -> torch.Tensor:
            model = models[impl]
            out = model(pixels, grid, [2]) if impl in self.backends else model(pixels, *on_device).last_hidden_state
            return cast(torch.Tensor, out)

        found: dict[str, tuple[Any, Callable[[], torch.Tensor]]] = {}
        expected = forward(PEER)
        for impl, model in models.items():
            with self._peers_may_fail(name, impl):
                agree(f"{name}: {impl}", expected, forward(impl), AGREEMENT)
                found[impl] = (model, functools.partial(forward, impl))
        return found

    @contextlib.contextmanager
    def _peers_may_fail(self, name: str, impl: str) -> Iterator[None]:
        """A peer that refuses, or computes something else, is left out with the reason; ours must not."""
        try:
            yield
        except Exception as error:
            if impl in self.backends:
                raise
            self.absent[f"{name}: {impl}"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def _compare(
        self, name: str, direction: str, runs: Mapping[str, Callable[[], Any]], n_flops: int, seconds: float
    ) -> None:
        """Rows and peaks of all, our best against the best peer, round by round, and where the time of both goes."""
        rounds = self._time(runs, seconds)
        case = f"{self.scale.layers} layers, {self.scale.side}x{self.scale.side}"
        for impl in runs:
            self.rows.append(row(name, case, "bfloat16", direction, impl, rounds.timing(impl), 0, n_flops))
            self._peak(name, impl, runs[impl])

        def best(ours: bool) -> str:
            names = [impl for impl in runs if (impl in self.backends) == ours]
            return min(names, key=lambda impl: rounds.timing(impl).median)

        ours, peer = best(True), best(False)
        t = rounds.ratio(peer, ours)
        self.checks.append(check(name, t.median, t.low, t.high, 1.0))
        peaks = {m["impl"]: m["peak_bytes"] for m in self.memory if m["op"] == name}
        less = peaks[peer] / max(peaks[ours], 1)
        self.checks.append(check(f"{name}_memory", less, less, less, 1.0))
        for impl in (ours, peer):
            self._profile(f"{name}/{impl}", runs[impl])

    # --- reduction, end to end ------------------------------------------------------------------------------

    @functools.cached_property
    def _whole(self) -> Any:
        encoder = {**self.scale.encoder, "num_hidden_layers": self.scale.layers}
        model = whole(encoder, self.scale.decoder, torch.bfloat16, self.device)
        model.backend = self.backends[0]
        return model

    def reduction(self, B: int, T: int, seconds: float) -> None:
        """Mask, encoder with projector, prefill, and all of it: from pixels to the first token's logits."""
        side, model = self.scale.clip_side, self._whole
        cells = T * side**2 // 4
        clip = torch.randint(0, 256, (4 * cells, PATCH), dtype=torch.uint8, device=self.device)
        pixels, merges = clip.repeat(B, 1), [2] * B
        grid = torch.tensor([[T, side, side]] * B)
        text = torch.arange(100, 100 + PROMPT_TOKENS)
        ids = torch.cat([torch.full((cells,), IMAGE_TOKEN), text]).repeat(B, 1).to(self.device)
        runs: dict[str, Callable[[], Any]] = {}
        with torch.inference_mode():
            for r in REDUCTIONS:
                # Of copies of one clip a budget beyond their first frames keeps the same in each: nothing is padded.
                pruning = {"rule": "budget", "keep": B * round((1 - r) * cells)} if r else False
                visual = {"pixel_values": pixels, "grid_thw": grid, "merge_sizes": merges}
                keep = model.visual_mask(pixels, grid, merges, None, pruning)
                p = model.prompt(ids, **visual, pruning=False, keep=keep)
                prompt = {
                    "inputs_embeds": p.inputs_embeds, "attention_mask": p.attention_mask,
                    "position_ids": p.position_ids, "logits_to_keep": 1,
                }  # fmt: skip
                runs |= {
                    f"encoder@{r}": functools.partial(model.visual_features, pixels, grid, merges, keep),
                    f"prefill@{r}": functools.partial(model, **prompt),
                    f"first token@{r}": functools.partial(model, ids, **visual, pruning=pruning, logits_to_keep=1),
                }
                if r:
                    runs[f"mask@{r}"] = functools.partial(model.visual_mask, pixels, grid, merges, None, pruning)
            rounds = self._time(runs, seconds, min_rounds=2)
            for label, run in runs.items():
                part, r = label.split("@")[0], float(label.split("@")[1])
                case = f"{B} x {cells} tokens, {100 * r:.0f} % removed"
                t, gain = rounds.timing(label), rounds.ratio(f"{part}@{REDUCTIONS[part == 'mask']}", label)
                self.rows.append(row(part, case, "bfloat16", "fwd", self.backends[0], t))
                self.curve.append(
                    {
                        "batch": B, "part": part, "reduction": r, "median_s": t.median, "gain": gain.median,
                        "gain_low": gain.low, "gain_high": gain.high, "ideal": 1 / (1 - r),
                    }
                )  # fmt: skip
                if part == "first token":
                    self._peak(f"{part}, {case}", self.backends[0], run)
                    if r:
                        name = f"reduction_gain_b{B}_{100 * r:.0f}"
                        self.checks.append(check(name, gain.median, gain.low, gain.high, 1.0))

    # --- what every step does -------------------------------------------------------------------------------

    def _time(self, runs: Mapping[str, Callable[[], Any]], seconds: float, min_rounds: int = 5) -> Rounds:
        if self.device == "cuda":
            turns = {name: (lambda _, run=run: run()) for name, run in runs.items()}
            return interleave_cuda(turns, sets=1, seconds=seconds, min_rounds=min_rounds)
        return interleave(runs, seconds=seconds, min_rounds=min_rounds, warmups=1)

    def _peak(self, name: str, impl: str, run: Callable[[], Any]) -> None:
        """Bytes that a call adds at its highest."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            held = run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            del held
        else:
            peak = peak_memory(run)
        self.memory.append({"op": name, "impl": impl, "peak_bytes": peak})

    def _profile(self, label: str, run: Callable[[], Any]) -> None:
        cuda = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            run()
            if cuda:
                torch.cuda.synchronize()
        self.profiles[label] = longest(found, self.device)[:LONGEST]

    def save(self, path: Path) -> None:
        if self.device == "cuda":
            self.gpu_states.append(gpu_state())
        write_results(
            path, self.rows, self.checks, suite="gpu", device=self.device, scale=asdict(self.scale), memory=self.memory,
            profiles=self.profiles, curve=self.curve, absent=self.absent, failures=self.failures,
            gpu_states=self.gpu_states,
            **roofline.as_json(self.rows, self.ceilings, roofline.datasheet(self.device)),
        )  # fmt: skip


def table(data: Mapping[str, Any]) -> str:
    """Of a results file, for a terminal: the encoder, reduction over its ideal, and where the time goes."""
    peaks = {(m["op"], m["impl"]): f"{m['peak_bytes'] / 2**20:9.0f} MiB" for m in data["memory"]}
    lines = []
    for r, n in zip(data["rows"], data["roofline"], strict=True):
        if r["flops"]:
            share = "" if n["of_measured"] is None else f"  {100 * n['of_measured']:.0f} % of the matmul's rate"
            who = f"{r['op']:<22} {r['impl']:<22}"
            lines.append(f"{who} {1e3 * r['median_s']:9.2f} ms {peaks.get((r['op'], r['impl']), ''):>13}{share}")
    for e in data["curve"]:
        who = f"batch {e['batch']:<3} {e['part']:<12} {100 * e['reduction']:3.0f} % removed"
        lines.append(f"{who} {1e3 * e['median_s']:9.2f} ms  gain {e['gain']:5.2f} of {e['ideal']:.2f}")
    for label, kernels in data["profiles"].items():
        lines += [label, words(kernels)]
    for what in ("absent", "failures"):
        lines += [f"{what}: {name}: {why}" for name, why in data[what].items()]
    return "\n".join(lines)
