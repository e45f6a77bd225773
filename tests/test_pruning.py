"""The pruning rules: bit-exact where they claim it, invariants where they promise them."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hulukern.pruning import RULES, compress_sequence, drift, prune_frames, prune_patches

GOLDEN = Path(__file__).parent / "data" / "golden"
FAMILIES = ["released_qwen2", "released_qwen3"]
BACKENDS = ["reference", "cpu"]
MODALS = ["video", "image", "video", "video"]


def clip(T: int = 6, H: int = 56, W: int = 84, C: int = 3, noise: float = 6.0, seed: int = 0) -> torch.Tensor:
    """Frames [T, H, W, C] of which some cells move and others rest, so that every rule drops and keeps."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(30, 226, (1, H, W, C), generator=g).float()
    strength = torch.rand((T, H // 28, W // 28, 1), generator=g) * noise
    strength = strength.repeat_interleave(28, 1).repeat_interleave(28, 2)
    return (start + (torch.randn((T, H, W, C), generator=g) * strength).cumsum(0)).clamp(0, 255).round().byte()


def merge_block(frames: torch.Tensor, merge: int = 2, patch: int = 14) -> torch.Tensor:
    """Written out again on purpose, with one loop per level: the order the goldens are in."""
    T, H, W, _C = frames.shape
    rows = []
    for t in range(T):
        for hb in range(H // (patch * merge)):
            for wb in range(W // (patch * merge)):
                for my in range(merge):
                    for mx in range(merge):
                        y, x = (hb * merge + my) * patch, (wb * merge + mx) * patch
                        rows.append(frames[t, y : y + patch, x : x + patch].permute(2, 0, 1).reshape(-1))
    return torch.stack(rows)


def their_mask(pixels: torch.Tensor, t: int, cells: int, rule: str, threshold: float, min_tokens: int) -> torch.Tensor:
    """The two released formulations on normalised fp32 pixels, from their description."""
    x = ((pixels.float() / 255 - 0.5) / 0.5 if pixels.dtype == torch.uint8 else pixels).view(t, cells, -1)
    d = torch.abs(x[1:] - x[:-1]).mean(dim=-1) * 255
    d = torch.cat([torch.full_like(d[:1], threshold + 1), d])
    mask = (d / 255.0 if rule == "released" else d) > threshold
    mask[mask.sum(1) < min_tokens, :min_tokens] = True
    return mask.flatten()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("threshold", "min_tokens"), [(0.1, 1), (0.05, 3)])
@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_released_equals_the_golden_masks(
    family: str, backend: str, threshold: float, min_tokens: int, pixels: str
) -> None:
    golden = load_file(GOLDEN / family / "mask.safetensors")
    patches = golden["pixels_u8"]
    if pixels == "float32":
        patches = (patches.float() / 255 - 0.5) / 0.5
    pruned = prune_patches(
        patches, golden["grid_sizes"], rule="released", merge_size=golden["merge_sizes"].tolist(), modals=MODALS,
        threshold=threshold, min_tokens=min_tokens, backend=backend,
    )  # fmt: skip
    assert torch.equal(pruned.keep, golden[f"mask_t{threshold}_min{min_tokens}"].bool())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compress_equals_the_golden(family: str, backend: str) -> None:
    golden = load_file(GOLDEN / family / "compress.safetensors")
    out = compress_sequence(
        golden["input_ids"], golden["mask"].bool(), image_token_id=int(golden["image_token_index"]),
        features=golden["features"], attention_mask=torch.ones_like(golden["input_ids"]), labels=golden["labels"],
        position_ids=golden["position_ids"], backend=backend,
    )  # fmt: skip
    for name in ("features", "input_ids", "attention_mask", "labels", "position_ids"):
        assert torch.equal(getattr(out, name), golden[f"out_{name}"]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["released", "videollama3"])
@given(seed=st.integers(0, 999), threshold=st.sampled_from([0.0, 0.003, 0.02, 0.1, 0.5]), fill=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_bit_exact_rules_on_random_clips(backend: str, rule: str, seed: int, threshold: float, fill: int) -> None:
    frames = clip(seed=seed, noise=8)
    patches = merge_block(frames)
    expected = their_mask(patches, 6, 6, rule, threshold, fill)
    options = {"rule": rule, "threshold": threshold, "min_tokens": fill, "backend": backend}
    assert torch.equal(prune_frames(frames, **options).keep, expected)
    assert torch.equal(prune_patches(patches, [(6, 4, 6)], **options).keep, expected)


@pytest.mark.parametrize("rule", ["released", "videollama3"])
@pytest.mark.parametrize("pixels", ["uint8", "float32", "bfloat16"])
def test_bit_exact_rules_decide_ties_as_fp32_rounding_does(rule: str, pixels: str) -> None:
    """Cells whose exact difference is the threshold or next to it: only their own rounding tells."""
    g = torch.Generator().manual_seed(3)
    cells, values = 64, 4 * 588
    # released: sum |d| = 0.1 * 255 / 2 * 2352 = 29988 sits on the threshold. videollama3 at 2 / 3: 784.
    total, threshold = (29988, 0.1) if rule == "released" else (784, 2 / 3)
    old = torch.randint(60, 190, (cells, values), generator=g)
    step = torch.full((cells, values), total // values)
    for cell in range(cells):
        short = total + cell % 3 - 1 - int(step[cell].sum())
        step[cell, torch.randperm(values, generator=g)[:short]] += 1
    sign = torch.randint(0, 2, (cells, values), generator=g) * 2 - 1
    patches = torch.stack([old, old + step * sign]).byte().view(-1, 588)
    assert ((old + step * sign).sub(old).abs().sum(1) - total).abs().max() == 1
    x = patches if pixels == "uint8" else ((patches.float() / 255 - 0.5) / 0.5).to(getattr(torch, pixels))
    expected = their_mask(x, 2, cells, rule, threshold, 0)
    got = prune_patches(x, [(2, 2, 2 * cells)], rule=rule, threshold=threshold, min_tokens=0, backend="cpu")
    assert torch.equal(got.keep, expected)


def test_transformers_port_agrees_on_videollama3() -> None:
    # The class needs torchvision to be imported; the one function is taken out of its source.
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "models/video_llama_3/video_processing_video_llama_3.py"
    functions = [
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "_get_compression_mask"
    ]
    assert len(functions) == 1
    names: dict[str, object] = {"torch": torch}
    exec(ast.unparse(functions[0]), names)
    theirs = names["_get_compression_mask"]
    frames = clip(T=5, noise=2)
    patches = (merge_block(frames).float() / 255 - 0.5) / 0.5
    grid = torch.tensor([[5, 4, 6]])
    expected = theirs(None, patches, grid, torch.tensor([2]))  # type: ignore[operator]
    got = prune_frames(frames, rule="videollama3", backend="cpu").keep
    assert torch.equal(got, expected.bool())
    assert 0 < got.sum() < got.numel()


def test_released_loses_the_first_frame_and_previous_does_not() -> None:
    still = clip(T=1).expand(4, -1, -1, -1)
    released = prune_frames(still, rule="released").keep.view(4, 6)
    assert released.sum(1).tolist() == [1, 1, 1, 1]
    previous = prune_frames(still, rule="previous").keep.view(4, 6)
    assert previous.sum(1).tolist() == [6, 1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 999), threshold=st.floats(0.0, 0.3), T=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_bounded_keeps_its_bound(backend: str, seed: int, threshold: float, T: int) -> None:
    """Every dropped cell is within the threshold of the version that stands in for it; drift follows."""
    frames = clip(T=T, seed=seed)
    keep = prune_frames(frames, rule="bounded", threshold=threshold, backend=backend).keep.view(T, 6)
    x = merge_block(frames).view(T, 6, -1).long()
    stand_in = x[0].clone()
    worst, lost = 0.0, 0
    for t in range(T):
        stand_in[keep[t]] = x[t][keep[t]]
        difference = (x[t] - stand_in).abs().double().mean(-1) / 127.5
        worst = max(worst, difference.max().item())
    assert keep[0].all()
    assert worst <= threshold * (1 + 1e-6)
    found = drift(frames, keep.flatten())
    assert (found.max, found.lost) == (pytest.approx(worst, rel=1e-6), lost)


def test_previous_lets_a_slow_drift_through_and_bounded_does_not() -> None:
    slow = (torch.arange(30)[:, None, None, None] * 4 + 20).expand(30, 28, 28, 3).byte()
    options = {"threshold": 0.1}
    assert drift(slow, prune_frames(slow, rule="previous", min_tokens=0, **options).keep).max > 0.8
    assert drift(slow, prune_frames(slow, rule="bounded", **options).keep).max <= 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 99), keep=st.integers(0, 36))
@settings(max_examples=20, deadline=None)
def test_budget_is_exact_and_takes_the_highest(backend: str, seed: int, keep: int) -> None:
    frames = clip(seed=seed)
    frames[3] = frames[2]  # ties at zero
    pruned = prune_frames(frames, rule="budget", keep=keep, backend=backend)
    assert int(pruned.keep.sum()) == keep
    order = sorted(range(36), key=lambda i: (-pruned.scores[i].item(), i))
    assert set(order[:keep]) == set(pruned.keep.nonzero().flatten().tolist())


def test_budget_takes_a_share_and_nan_first() -> None:
    frames = clip(T=10)
    assert int(prune_frames(frames, rule="budget", keep=0.45).keep.sum()) == 27
    patches = torch.zeros(4, 12)
    patches[3] = float("nan")
    assert prune_patches(patches, [(4, 1, 1)], rule="budget", keep=2, merge_size=1).keep.tolist() == [1, 0, 0, 1]


def test_nan_counts_as_changed_except_where_the_released_code_drops_it() -> None:
    patches = torch.zeros(3, 12)
    patches[1, 0] = float("nan")
    options = {"merge_size": 1, "min_tokens": 0}
    assert prune_patches(patches, [(3, 1, 1)], rule="previous", **options).keep.tolist() == [True, True, True]
    assert prune_patches(patches, [(3, 1, 1)], rule="released", **options).keep.tolist() == [False, False, False]


def test_windows_see_what_the_whole_range_hides() -> None:
    """4 HU in the brain window (80 wide) is 0.1 of normalised units; over -1000..1000 it is nothing."""
    ct = torch.full((2, 28, 28, 1), 40, dtype=torch.int16)
    ct[1] += 5
    assert prune_frames(ct, rule="bounded", windows=[(0, 80)]).keep.tolist() == [True, True]
    assert prune_frames(ct, rule="bounded", windows=[(-1000, 1000)]).keep.tolist() == [True, False]
    assert prune_frames(ct, rule="bounded", windows=[(-1000, 1000), (0, 80)]).keep.tolist() == [True, True]


def test_given_scores_are_used_and_checked() -> None:
    frames = clip()
    scores = prune_frames(frames, rule="previous").scores
    for rule in ("released", "videollama3", "previous"):
        again = prune_frames(frames, rule=rule, scores=scores)
        assert torch.equal(again.keep, prune_frames(frames, rule=rule).keep)
    with pytest.raises(ValueError, match=r"prune_frames: scores has shape \[35\], expected \[36\]"):
        prune_frames(frames, rule="previous", scores=scores[1:])


def test_compress_packs_any_number_of_samples() -> None:
    ids = torch.tensor([7, 7, 1, 7, 2, 7, 7, 7, 3])
    out = compress_sequence(
        ids, torch.tensor([False, True, True, False, False, True]), image_token_id=7,
        cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32), backend="cpu",
    )  # fmt: skip
    assert out.input_ids.tolist() == [7, 1, 7, 2, 7, 3]
    assert out.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert out.cu_seqlens.tolist() == [0, 3, 6]


def test_zero_frames_and_empty_packs_are_empty_not_errors() -> None:
    assert prune_frames(torch.empty(0, 28, 28, 3, dtype=torch.uint8), rule="bounded").keep.numel() == 0
    assert prune_patches(torch.empty(0, 588), [], rule="released").keep.numel() == 0


BAD = {
    "rule": ({"rule": "best"}, "rule has value 'best', expected one of 'released'"),
    "threshold": ({"rule": "bounded", "threshold": -0.1}, "threshold has value -0.1, expected at least 0"),
    "threshold_nan": ({"rule": "previous", "threshold": float("nan")}, "threshold has value nan"),
    "over_budget": ({"rule": "budget", "keep": 37}, "keep has 37 tokens, expected 0 to N=36"),
    "share": ({"rule": "budget", "keep": 1.5}, "keep has share 1.5, expected 0.0 to 1.0"),
    "no_keep": ({"rule": "budget"}, "keep has value None"),
    "keep_elsewhere": ({"rule": "previous", "keep": 3}, "keep has value 3, expected None"),
    "threshold_of_budget": ({"rule": "budget", "keep": 3, "threshold": 0.1}, "threshold has value 0.1, expected None"),
    "min_tokens_of_bounded": ({"rule": "bounded", "min_tokens": 1}, "min_tokens has value 1, expected None"),
    "std": ({"rule": "previous", "std": 0.0}, "std has value 0.0, expected above 0"),
    "not_divisible": ({"rule": "previous", "patch_size": 13}, "expected multiples of patch_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        prune_frames(clip(), **options)


def test_bad_grids_and_modals_are_named() -> None:
    patches = torch.zeros(8, 12)
    with pytest.raises(ValueError, match="grid_thw has 4 patches in all, expected N=8"):
        prune_patches(patches, [(1, 2, 2)], rule="previous")
    with pytest.raises(ValueError, match="modals has value"):
        prune_patches(patches, [(2, 2, 2)], rule="previous", modals=["audio"])
    with pytest.raises(ValueError, match="merge_size has 2 values"):
        prune_patches(patches, [(2, 2, 2)], rule="previous", merge_size=[2, 2])
    with pytest.raises(ValueError, match=r"keep has shape \[3\], expected \[2\]"):
        compress_sequence(torch.tensor([7, 7]), torch.ones(3, dtype=torch.bool), image_token_id=7)


def test_every_rule_has_units_and_a_summary() -> None:
    assert list(RULES) == ["released", "videollama3", "previous", "bounded", "budget"]
    assert all(rule.units and rule.summary for rule in RULES.values())


# --- decisions at their edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["released", "previous", "videollama3"])
def test_frames_that_keep_fewer_than_min_tokens_get_their_first_ones(rule: str) -> None:
    """Also those that keep some: 1 or 2 of the 3 asked for."""
    frames = torch.zeros(4, 56, 84, 3, dtype=torch.uint8)
    frames[1:, 28:, 56:] = 200  # cell 5 changes once
    frames[2:, 28:, :56] = 200  # then cells 3 and 4
    keep = prune_frames(frames, rule=rule, min_tokens=3, backend="reference").keep.view(4, 6)
    assert keep[1].nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert keep[2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert keep[3].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["previous", "bounded"])
def test_a_difference_of_just_the_threshold_is_dropped(rule: str, backend: str) -> None:
    """0.1 is 12.75 steps: a sum of 29988 over the 2352 values of a cell."""
    frames = torch.zeros(2, 28, 56, 3, dtype=torch.uint8)
    flat = torch.full((2352,), 12, dtype=torch.uint8)
    flat[: 29988 - 12 * 2352] = 13
    frames[1, :, :28] = flat.view(28, 28, 3)
    frames[1, :, 28:] = flat.view(28, 28, 3)
    frames[1, 0, 28, 0] += 1
    keep = prune_frames(frames, rule=rule, min_tokens=0 if rule == "previous" else None, backend=backend).keep
    assert keep.tolist() == [True, True, False, True]


@pytest.mark.parametrize("rule", ["previous", "bounded"])
def test_a_threshold_of_zero_drops_what_stands_still(rule: str) -> None:
    frames = torch.full((3, 28, 28, 3), 7, dtype=torch.uint8)
    keep = prune_frames(frames, rule=rule, threshold=0.0, min_tokens=0 if rule == "previous" else None).keep
    assert keep.tolist() == [True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [1e37, 1e300, float("inf")])
@pytest.mark.parametrize(("rule", "rest"), [("previous", 1), ("bounded", 0)])
def test_the_first_frame_is_whole_under_any_threshold(rule: str, rest: int, threshold: float, backend: str) -> None:
    """It scores +inf, which is not above a threshold that fp32 holds as +inf."""
    frames = clip()
    kept = [6, *[rest] * 5]
    keep = prune_frames(frames, rule=rule, threshold=threshold, backend=backend).keep
    assert keep.view(6, 6).sum(1).tolist() == kept
    patches = merge_block(frames)
    two = prune_patches(
        torch.cat([patches, patches]), [(6, 4, 6)] * 2, rule=rule, threshold=threshold, backend=backend
    ).keep
    assert two.view(12, 6).sum(1).tolist() == kept * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": ["previous"]}, "rule has value ['previous']"),
        ({"rule": "previous", "windows": [(0, 1)]}, "windows has 1 rows, expected None"),
        ({"rule": "previous", "mean": float("nan")}, "mean has value nan"),
        ({"rule": "previous", "std": 0.0}, "std has value 0.0"),
        ({"rule": "previous", "threshold": "a"}, "threshold has value 'a'"),
        ({"rule": "budget", "keep": True}, "keep has value True"),
        ({"rule": "budget", "keep": 1.5}, "keep has share 1.5"),
        ({"rule": "previous", "merge_size": 0}, "patch_size, merge_size has values 14, 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        prune_frames(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), **options)
