"""The vision encoder against transformers' video_llama_3, and its exact savings."""

from __future__ import annotations

import pytest
import torch
from transformers import VideoLlama3VisionConfig, VideoLlama3VisionModel

from model.config import HuluMedVisionConfig
from model.vision import HuluMedVisionModel, plan

GRIDS = [(3, 4, 6), (1, 6, 2), (2, 10, 4), (1, 3, 9)]
MERGES = [2, 1, 2, 1]
SIZES = {"hidden_size": 144, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2}


def pair(seed: int = 0) -> tuple[HuluMedVisionModel, VideoLlama3VisionModel]:
    """Ours and theirs with the same random weights, biases and norms included."""
    torch.manual_seed(seed)
    theirs = VideoLlama3VisionModel(VideoLlama3VisionConfig(**SIZES, patch_size=14)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    ours = HuluMedVisionModel(HuluMedVisionConfig(**SIZES)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def pixels(seed: int = 0) -> torch.Tensor:
    n = sum(t * h * w for t, h, w in GRIDS)
    return torch.randint(0, 256, (n, 588), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(u8: torch.Tensor) -> torch.Tensor:
    return (u8.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_transformers_on_ragged_grids_with_gradients(seed: int) -> None:
    ours, theirs = pair(seed)
    u8 = pixels(seed)
    got = ours(u8, GRIDS, MERGES)
    expected = theirs(normalised(u8), torch.tensor(GRIDS), torch.tensor(MERGES)).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed))
    got.backward(upstream)
    expected.backward(upstream)
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        scale = gradients[name].grad.abs().max().item()
        torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-4, atol=2e-5 * scale, msg=name)


def test_pixels_and_normalised_floats_are_the_same_input() -> None:
    ours, _ = pair()
    torch.testing.assert_close(ours(pixels(), GRIDS, MERGES), ours(normalised(pixels()), GRIDS, MERGES))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.45, 1.0])
def test_survivors_only_equals_dropping_later(share: float) -> None:
    ours, _ = pair()
    with torch.no_grad():
        whole = ours(pixels(), GRIDS, MERGES)
        keep = torch.rand(whole.shape[0], generator=torch.Generator().manual_seed(3)) < share
        got = ours(pixels(), GRIDS, MERGES, keep)
    torch.testing.assert_close(got, whole[keep], rtol=1e-6, atol=1e-6)


def test_survivors_have_the_gradients_of_dropping_later() -> None:
    ours, _ = pair()
    keep = torch.arange(sum(t * h * w // m**2 for (t, h, w), m in zip(GRIDS, MERGES, strict=True))) % 3 == 1
    found = []
    for early in (True, False):
        ours.zero_grad()
        out = ours(pixels(), GRIDS, MERGES, keep) if early else ours(pixels(), GRIDS, MERGES)[keep]
        out.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in ours.named_parameters()})
    for name, g in found[0].items():
        torch.testing.assert_close(g, found[1][name], rtol=1e-4, atol=1e-4 * float(found[1][name].abs().max() + 1e-6))


def test_frames_do_not_see_each_other() -> None:
    ours, _ = pair()
    with torch.no_grad():
        whole = ours(pixels(), GRIDS, MERGES)
        row = cell = 0
        for grid, m in zip(GRIDS, MERGES, strict=True):
            n = grid[0] * grid[1] * grid[2]
            alone = ours(pixels()[row : row + n], [grid], [m])
            torch.testing.assert_close(alone, whole[cell : cell + n // m**2], rtol=1e-5, atol=1e-5)
            row, cell = row + n, cell + n // m**2


@pytest.mark.parametrize("pruned", [False, True])
def test_the_encoder_compiles_without_graph_breaks(pruned: bool) -> None:
    ours, _ = pair()
    keep = torch.arange(sum(t * h * w // m**2 for (t, h, w), m in zip(GRIDS, MERGES, strict=True))) % 2 == 0
    p = plan(GRIDS, MERGES, keep if pruned else None)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours.encode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixels(), p), ours.encode(pixels(), p))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ours, _ = pair()
    ours.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        ours(pixels(), GRIDS, MERGES).square().sum().backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    assert ours.encoder.layers[0].gradient_checkpointing
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_backend_is_chosen_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import hulukern

    used: set[str] = set()
    for name, op in hulukern.OPS.items():
        real = op.backend("reference", "cpu")
        monkeypatch.setitem(op.implementations, "reference", lambda *a, r=real, n=name: used.add(n) or r(*a))
        op._resolved.clear()
    ours, _ = pair()
    ours.backend = "reference"
    with torch.no_grad():
        ours(pixels(), GRIDS, MERGES)
    assert {"patch_embed", "rope_attention", "layer_norm", "bias_gelu", "spatial_merge"} <= used
    for op in hulukern.OPS.values():
        op._resolved.clear()


@pytest.mark.parametrize(
    ("grids", "merges", "keep", "says"),
    [
        (GRIDS[:3], MERGES[:3], None, "patches in all"),
        (GRIDS, [2, 1, 2, 2], None, "divisible by merge_size=2"),
        (GRIDS, [2, 1, 2, 3], None, "merge_sizes has value 3, expected 1 or 2"),
        (GRIDS, MERGES[:3], None, "one for each of 4 grids"),
        (GRIDS, MERGES, torch.ones(5, dtype=torch.bool), "one a cell"),
    ],
)
def test_grids_that_do_not_fit_are_named(grids: list, merges: list, keep: torch.Tensor | None, says: str) -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match=says):
        ours(pixels(), grids, merges, keep)


def test_nothing_to_encode() -> None:
    ours, _ = pair()
    with torch.no_grad():
        assert ours(pixels()[:0], torch.empty(0, 3, dtype=torch.int64), []).shape == (0, 144)


@pytest.mark.parametrize("change", [{"hidden_size": 145}, {"hidden_act": "gelu"}, {"num_attention_heads": 5}])
def test_sizes_that_cannot_be_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="HuluMedVisionConfig: has"):
        HuluMedVisionConfig(**{**SIZES, **change})
