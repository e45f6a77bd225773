"""The 55 % tracker: throughput of pixels to first token over the share of visual tokens removed.

One model of random weights, the encoder at its real width, runs mask, encoder, projector and prefill for the same
clip at reductions from 0 to 95 %, in turns. The ideal line is a time proportional to what is kept, 1 / (1 - r);
what is missing to it is what pruning does not save: every layer but the encoder's last, and what is fixed per call.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.models import IMAGE_TOKEN, decoder_shape, whole
from bench.quick import Input, read_inputs
from bench.results import check, row, write_results
from bench.timing import Rounds, interleave
from hulukern.pruning import prune_frames
from model.sizing import cut_patches

EXAMPLES = """examples:
  python -m bench e2e                                    prints the curve, writes bench/out/e2e.json
  python -m bench e2e --input chest.nii.gz --seconds 60
  python -m bench e2e --encoder-layers 27 --decoder 7b     the 7B's shape, where there is memory and time

exit codes: 0 done, 2 bad input or arguments
"""
TARGET = 0.55
REDUCTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, TARGET, 0.6, 0.7, 0.8, 0.9, 0.95)
RULES = ("previous", "bounded")  # where a rule of its own accord comes to lie on the curve
PROMPT_TOKENS = 32  # of text after the clip


@dataclass(frozen=True)
class Point:
    """One place on the curve. ``rule`` is "budget" for the swept reductions."""

    input: str
    rule: str
    reduction: float
    keep: torch.Tensor  # bool [V]

    @property
    def case(self) -> str:
        return f"{self.input}/{self.rule}@{100 * self.reduction:.1f}"


def points(i: Input) -> list[Point]:
    """The swept reductions and the rules' own, on one input."""
    found = []
    cells = i.frames.shape[0] * (i.frames.shape[1] // 28) * (i.frames.shape[2] // 28)
    for r in REDUCTIONS:
        kept = max(1, math.floor((1 - r) * cells + 1e-9))
        keep = prune_frames(i.frames, rule="budget", keep=kept).keep
        found.append(Point(i.name, "budget", 1 - kept / cells, keep))
    for rule in RULES:
        pruned = prune_frames(i.frames, rule=rule)
        found.append(Point(i.name, rule, pruned.reduction, pruned.keep))
    return found


def first_token(model: Any, i: Input, keep: torch.Tensor, device: str) -> Callable[[], torch.Tensor]:
    """A call from pixels to the first token's logits, for a mask that is known already."""
    patches = cut_patches(i.frames.numpy(), 2).to(device)
    T, H, W, _ = i.frames.shape
    visual = {"pixel_values": patches, "grid_thw": torch.tensor([[T, H // 14, W // 14]]), "merge_sizes": [2]}
    ids = torch.cat([torch.full((keep.numel(),), IMAGE_TOKEN), torch.arange(100, 100 + PROMPT_TOKENS)])[None].to(device)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(ids, **visual, keep=keep, logits_to_keep=1).logits
            if device == "cuda":
                torch.cuda.synchronize()
        return logits

    return call


def measure(model: Any, i: Input, seconds: float, device: str) -> tuple[list[Point], Rounds]:
    chosen = points(i)
    runs = {str(n): first_token(model, i, p.keep, device) for n, p in enumerate(chosen)}
    return chosen, interleave(runs, seconds=seconds, min_rounds=5, warmups=1)


def curve(found: list[dict[str, Any]]) -> str:
    lines = [f"{'input':<14} {'rule':<9} {'removed':>8} {'ms':>9} {'gain':>6} {'ideal':>6} {'of ideal':>9}"]
    for e in found:
        mark = "  <- 55 %" if abs(e["reduction"] - TARGET) < 0.01 and e["rule"] == "budget" else ""
        lines.append(
            f"{e['input']:<14} {e['rule']:<9} {100 * e['reduction']:7.1f}% {1e3 * e['median_s']:9.1f} {e['gain']:6.2f} "
            f"{e['ideal']:6.2f} {100 * e['gain'] / e['ideal']:8.0f}%{mark}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", action="append", default=[], metavar="FILE", help="a file or folder of your own")
    parser.add_argument("--max-frames", type=int, default=16, help="of one input, evenly chosen (default: 16)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring per input, about (default: 20)")
    parser.add_argument("--encoder-layers", type=int, default=2, help="of 27 (default: 2)")
    parser.add_argument("--decoder", default="1024x4", metavar="SHAPE", help="7b or WIDTHxLAYERS (default: 1024x4)")
    parser.add_argument("--json", type=Path, default=Path("bench/out/e2e.json"), metavar="FILE")


def run(options: argparse.Namespace) -> int:
    if not options.seconds > 0 or options.max_frames < 2 or options.encoder_layers < 1:
        raise ValueError("--seconds, --max-frames, --encoder-layers: have values too small, expected above 0, 1 and 0")
    if options.encoder_layers > 27:
        raise ValueError(f"--encoder-layers: has {options.encoder_layers}, expected at most the encoder's 27")
    decoder = decoder_shape(options.decoder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = whole({"num_hidden_layers": options.encoder_layers}, decoder, torch.bfloat16, device)
    # A single frame has nothing to prune.
    inputs = [i for i in read_inputs(options.input, options.max_frames) if i.frames.shape[0] > 1]
    rows, checks, found = [], [], []
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(inputs))
        for i in inputs:
            bar.update(task, description=i.name)
            chosen, rounds = measure(model, i, options.seconds, device)
            for n, p in enumerate(chosen):
                t, ratio = rounds.timing(str(n)), rounds.ratio("0", str(n))
                rows.append(row("e2e", p.case, "bfloat16", "fwd", device, t))
                point = {"input": p.input, "rule": p.rule, "reduction": p.reduction, "median_s": t.median}
                found.append(point | {"gain": ratio.median, "ideal": 1 / (1 - p.reduction)})
                if p.rule == "budget" and abs(p.reduction - TARGET) < 0.01:
                    checks.append(check(f"e2e_gain_at_55_{i.name}", ratio.median, ratio.low, ratio.high, 1.0))
            bar.advance(task)
    shape = {"encoder_layers": options.encoder_layers, "decoder": options.decoder, "frames": options.max_frames}
    write_results(options.json, rows, checks, suite="e2e", curve=found, model=shape)
    print(curve(found))
    print(f"\n{options.json}")
    return 0
