"""The CPU backend as a product: attention, the memory-bound ops, the encoder and the front end against the best
that torch, transformers and Pillow offer on the same machine, in one interleaved run each.

Every comparison is correct first: outputs agree before anything is timed, or the run stops with exit code 1.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

import hulukern
from bench.agreement import Disagreement, agree
from bench.baselines import eager
from bench.models import encoders, patches
from bench.results import check, row, write_results
from bench.timing import Rounds, interleave, keep_freed_memory, peak_memory, summarize
from hulukern.pruning import prune_frames
from hulukern.spec import Arguments, Case
from hulukern.testing.harness import call, sample
from hulukern.validation import dtype_name
from model.media.clip import Clip
from model.sizing import resize_frames

# name -> lengths, dtype, target
ATTENTION = {
    "attention_bf16_1024": ((1024,) * 8, torch.bfloat16, 3.0),
    "attention_bf16_256": ((256,) * 32, torch.bfloat16, 3.0),
    "attention_bf16_4096": ((4096,) * 2, torch.bfloat16, 3.0),
    "attention_fp32_1024": ((1024,) * 4, torch.float32, 1.3),
}
# The first performance case of each; bf16 as the encoder runs.
MEMORY_BOUND = (
    "layer_norm", "layer_norm_backward", "bias_gelu", "bias_gelu_backward", "spatial_merge", "spatial_merge_backward",
    "rope_attention_rotate",
)  # fmt: skip
COPY_TARGET = 0.7
ENCODER_TARGET, TRAIN_TARGET, PREPROCESS_TARGET = 1.6, 1.3, 5.0


def main(path: Path, only: str, seconds: float) -> int:
    suite = Suite()
    steps = [(name, step) for name, step in suite.steps() if only in name]
    if not steps:
        print(f"bench: --only has {only!r}, which names no check", file=sys.stderr)
        return 2
    more = {"threads": torch.get_num_threads(), "freed_memory_kept": keep_freed_memory(), "memory": suite.memory}
    try:
        for _, step in steps:
            known = len(suite.checks)
            step(seconds / len(steps))
            write_results(path, suite.rows, suite.checks, suite="cpu", **more)
            for c in suite.checks[known:]:
                print(f"  {c['name']:<36} {c['value']:6.2f}  [{c['low']:.2f}, {c['high']:.2f}]  target {c['target']:g}"
                      f"{'' if c['met'] else '  MISSED'}", flush=True)  # fmt: skip
    except Disagreement as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


class Suite:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []

    def steps(self) -> Iterator[tuple[str, Callable[[float], None]]]:
        for name in ATTENTION:
            yield name, lambda s, name=name: self.attention(name, s)  # type: ignore[misc]
        for name in MEMORY_BOUND:
            yield f"copy_fraction_{name}", lambda s, name=name: self.copy_fraction(name, s)  # type: ignore[misc]
        yield "encoder_bf16_8f", self.encoder
        yield "encoder_bf16_16f_64f", self.encoder_frames
        yield "train_step_bf16", self.train_step
        yield "preprocess_32f", self.preprocess

    def against(self, name: str, case: str, dtype: str, rounds: Rounds, target: float, direction: str = "fwd") -> None:
        """Rows of all, and the ratio of the best peer's time to ours, round by round."""
        for impl in rounds.seconds:
            self.rows.append(row(name, case, dtype, direction, impl, rounds.timing(impl)))
        best = min((i for i in rounds.seconds if i != "cpu"), key=lambda i: rounds.timing(i).median)
        t = rounds.ratio(best, "cpu")
        self.checks.append(check(name, t.median, t.low, t.high, target))

    def attention(self, name: str, seconds: float) -> None:
        lengths, dtype, target = ATTENTION[name]
        op = hulukern.OPS["rope_attention"].spec
        a = sample(op, Case(name, {"lengths": lengths, "A": 16, "D": 72}), dtype, "cpu")
        runs: dict[str, Callable[[], Any]] = {
            "torch": lambda: separate_rotary_and_sdpa(a, lengths),
            "cpu": lambda: call(op, a, "cpu")[0],
        }
        agree(name, runs["torch"](), runs["cpu"](), 0.02 if dtype == torch.bfloat16 else 1e-4)
        with torch.inference_mode():
            rounds = interleave(runs, seconds=seconds, warmups=1)
        self.against(name, f"{len(lengths)}x{lengths[0]}", dtype_name(dtype), rounds, target)

    def copy_fraction(self, name: str, seconds: float) -> None:
        """Bytes the op must move per second, over those of a copy well beyond the caches in the same round."""
        op = hulukern.OPS[name].spec
        a = sample(op, op.perf_cases[0], torch.bfloat16, "cpu")
        for got, expected in zip(*(pytree.tree_leaves(x) for x in (call(op, a, "cpu"), call(op, a, "reference"))),
                                 strict=True):  # fmt: skip
            agree(name, expected, got, 0.02)
        source = torch.randint(0, 255, (128 << 20,), dtype=torch.uint8)
        target = torch.empty_like(source)
        runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "cpu": lambda: call(op, a, "cpu")}
        plain = eager(op)
        if plain is not None:
            runs["torch"] = lambda: plain(a)
        rounds = interleave(runs, seconds=seconds)
        cost, copied = op.cost(a), 2 * source.numel()
        for impl in runs:
            n_bytes = copied if impl == "copy" else cost.bytes
            self.rows.append(row(name, op.perf_cases[0].name, "bfloat16", "fwd", impl, rounds.timing(impl), n_bytes))
        pairs = zip(rounds.seconds["cpu"], rounds.seconds["copy"], strict=True)
        t = summarize([(cost.bytes / ours) / (copied / copy) for ours, copy in pairs])
        self.checks.append(check(f"copy_fraction_{name}", t.median, t.low, t.high, COPY_TARGET))

    def encoder(self, seconds: float) -> None:
        """Two layers of the real width, 8 frames of 32 x 32 patches, against transformers' port: eager and compiled."""
        (ours, theirs), pixels = encoders(2), patches(8)
        grid, merges = torch.tensor([[8, 32, 32]]), torch.tensor([2])
        compiled: Any = torch.compile(theirs)
        with torch.inference_mode():
            runs: dict[str, Callable[[], Any]] = {
                "transformers": lambda: theirs(pixels, grid, merges).last_hidden_state,
                "transformers compiled": lambda: compiled(pixels, grid, merges).last_hidden_state,
                "cpu": lambda: ours(pixels, grid, [2]),
            }
            agree("encoder_bf16_8f", runs["transformers"](), runs["cpu"](), 0.04)
            rounds = interleave(runs, seconds=seconds, warmups=1)
        self.against("encoder_bf16_8f", "2 layers, 8x32x32", "bfloat16", rounds, ENCODER_TARGET)

    def encoder_frames(self, seconds: float) -> None:
        """Time and peak memory at 16 and 64 frames; ours must grow with the frames and no faster."""
        peaks: dict[str, dict[int, int]] = {"transformers": {}, "cpu": {}}
        for T in (16, 64):
            runs: dict[str, Callable[[], Any]] = {impl: encoder_call(impl, T) for impl in peaks}
            with torch.inference_mode():
                rounds = interleave(runs, seconds=seconds, min_rounds=5, warmups=1)
                for impl in runs:
                    peaks[impl][T] = peak_in_a_process(impl, T)
                    self.memory.append({"op": f"encoder_bf16_{T}f", "impl": impl, "peak_bytes": peaks[impl][T]})
            self.against(f"encoder_bf16_{T}f", f"2 layers, {T}x32x32", "bfloat16", rounds, 1.0)
            less = peaks["transformers"][T] / peaks["cpu"][T]
            self.checks.append(check(f"encoder_memory_{T}f", less, less, less, 1.0))
        growth = peaks["cpu"][64] / peaks["cpu"][16]
        self.checks.append(check("encoder_memory_growth", growth, growth, growth, 4.2, at_most=True))

    def train_step(self, seconds: float) -> None:
        """Forward and backward of the same, gradients of all parameters."""
        (ours, theirs), pixels = encoders(2), patches(2)
        grid, merges = torch.tensor([[2, 32, 32]]), torch.tensor([2])
        upstream = torch.randn(2 * 256, 1152).to(torch.bfloat16)

        def step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
            return list(torch.autograd.grad(forward(), list(model.parameters()), upstream))

        runs: dict[str, Callable[[], Any]] = {
            "transformers": lambda: step(theirs, lambda: theirs(pixels, grid, merges).last_hidden_state),
            "cpu": lambda: step(ours, lambda: ours(pixels, grid, [2])),
        }
        named = dict(zip((n for n, _ in theirs.named_parameters()), runs["transformers"](), strict=True))
        ours.backend = "reference"
        exact = runs["cpu"]()
        ours.backend = "cpu"
        for (name, _), got, expected in zip(ours.named_parameters(), runs["cpu"](), exact, strict=True):
            agree(f"train_step_bf16: {name}", expected, got, 0.05)
            if "norm" not in name:  # torch adds up those of its LayerNorm in bf16: half of one is noise
                agree(f"train_step_bf16: {name} of transformers", named[name], got, 0.1)
        rounds = interleave(runs, seconds=seconds, warmups=1)
        self.against("train_step_bf16", "2 layers, 2x32x32", "bfloat16", rounds, TRAIN_TARGET, "fwd+bwd")

    def preprocess(self, seconds: float) -> None:
        """32 frames of 512 x 512 to normalised patches and the mask that drops repeated cells."""
        frames = _moving_frames(32, 512)
        clip = Clip(frames, "moving squares", "video", "array")

        def ours() -> tuple[torch.Tensor, torch.Tensor]:
            small = torch.from_numpy(resize_frames(clip, (504, 504)))
            patches, scores = hulukern.patch_embed_cut(small, dtype=torch.float32, with_scores=True, backend="cpu")
            return patches, prune_frames(small, rule="previous", scores=scores, backend="cpu").keep

        runs: dict[str, Callable[[], Any]] = {"numpy": lambda: released_preprocess(frames, 504), "cpu": ours}
        theirs, got = runs["numpy"](), ours()
        agree("preprocess_32f", theirs[0], got[0], 1e-5)
        if not torch.equal(theirs[1], got[1]):
            raise Disagreement("preprocess_32f: the masks differ")
        self.against("preprocess_32f", "32x512x512", "float32", interleave(runs, seconds=seconds), PREPROCESS_TARGET)


def encoder_call(impl: str, T: int) -> Callable[[], torch.Tensor]:
    ours, theirs = encoders(2)
    x, grid = patches(8).repeat(T // 8, 1), torch.tensor([[T, 32, 32]])
    if impl == "cpu":
        return lambda: ours(x, grid, [2])
    return lambda: theirs(x, grid, torch.tensor([2])).last_hidden_state


def peak_in_a_process(impl: str, T: int) -> int:
    """What a call adds to a process beyond weights and input. In a process of its own: where freed memory is kept, a
    peak is as much as earlier calls have cut the heap to pieces."""
    command = [sys.executable, "-m", "bench.cpu", impl, str(T)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{impl}, {T} frames: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def separate_rotary_and_sdpa(a: Arguments, lengths: tuple[int, ...]) -> torch.Tensor:
    """As transformers' port does: angles, rotate-half in fp32, then SDPA sequence by sequence."""
    from hulukern.ops.rope_attention.reference import angles

    half = angles(a["positions_q"], a["sections"], a["theta"], torch.float32)
    cos, sin = (torch.cat([x, x], -1)[:, None] for x in (half.cos(), half.sin()))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    parts = [x.transpose(0, 1)[None].split(lengths, 2) for x in (rotated(a["q"]), rotated(a["k"]), a["v"])]
    outs = [F.scaled_dot_product_attention(q, k, v, scale=a["scale"]) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def released_preprocess(frames: Any, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The released processor's steps as it writes them: PIL, then numpy frame by frame, then the difference."""
    from PIL import Image

    out = []
    for frame in frames:
        image = np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC))
        image = image.astype(np.float32) * np.float32(1 / 255)
        out.append(((image - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1))
    stacked = np.stack(out)
    T, P, M = len(out), 14, 2
    grid = side // (P * M)
    x = stacked.reshape(T, 3, grid, M, P, grid, M, P).transpose(0, 2, 5, 3, 6, 1, 4, 7)
    patches = torch.from_numpy(np.ascontiguousarray(x).reshape(T * grid * grid * M * M, 3 * P * P))
    cells = patches.view(T, grid * grid, -1)
    keep = torch.ones(T, grid * grid, dtype=torch.bool)
    keep[1:] = (cells[1:] - cells[:-1]).abs().mean(-1) > 0.1
    empty = ~keep.any(1)
    keep[empty, :1] = True
    return patches, keep.flatten()


def _moving_frames(T: int, side: int) -> Any:
    """A noisy picture over which bright squares move: some cells change, most do not."""
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.integers(0, 200, (1, side, side, 3), dtype=np.uint8), T, 0)
    for t in range(T):
        frames[t, 8 * t : 8 * t + 96, 4 * t : 4 * t + 160] = 255
    return frames


if __name__ == "__main__":  # python -m bench.cpu IMPL FRAMES: bytes, the first call's own left out
    with torch.inference_mode():
        measured = encoder_call(sys.argv[1], int(sys.argv[2]))
        encoded = measured()
        del encoded
        print(peak_memory(measured))
