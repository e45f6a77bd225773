"""The 55 % tracker: its points, its curve, and that fewer tokens reach the decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import e2e
from bench.__main__ import main
from bench.models import decoder_shape, whole
from bench.quick import Input
from model.media import Reading, from_memory


@pytest.fixture(scope="module")
def clip() -> Input:
    frames = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), np.uint8)
    return Input("noise", from_memory(list(frames), "video", Reading()), torch.from_numpy(frames), 0.0)


def test_points_reach_their_reductions(clip: Input) -> None:
    found = [p for p in e2e.points(clip) if p.rule == "budget"]
    for wanted, p in zip(e2e.REDUCTIONS, found, strict=True):
        assert p.reduction >= wanted - 1e-9 or int(p.keep.sum()) == 1
        assert 1 - p.keep.float().mean().item() == pytest.approx(p.reduction)
    assert {p.rule for p in e2e.points(clip)} == {"budget", *e2e.RULES}


def test_what_is_pruned_does_not_reach_the_decoder(clip: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e, "REDUCTIONS", (0.0, e2e.TARGET))
    monkeypatch.setattr(e2e, "RULES", ())
    model = whole({"num_hidden_layers": 1}, decoder_shape("128x1"), torch.float32, "cpu")
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    points, rounds = e2e.measure(model, clip, 0.0, "cpu")
    assert set(seen) == {int(p.keep.sum()) + e2e.PROMPT_TOKENS for p in points}
    entries = [
        {"input": p.input, "rule": p.rule, "reduction": p.reduction, "median_s": rounds.timing(str(n)).median,
         "gain": 1.0, "ideal": 1 / (1 - p.reduction)}
        for n, p in enumerate(points)
    ]  # fmt: skip
    assert "<- 55 %" in e2e.curve(entries)


@pytest.mark.parametrize(
    "arguments", [["--decoder", "100x4"], ["--decoder", "x"], ["--seconds", "0"], ["--max-frames", "1"]]
)
def test_bad_arguments(arguments: list[str]) -> None:
    assert main(["e2e", *arguments]) == 2
