"""token_score as data: temporal difference of cells, from cut patches or from whole frames."""

from __future__ import annotations

from typing import Any

import torch

from hulukern.ops.common import FLOATS, PIXELS, check_frames, check_grid
from hulukern.ops.token_score import reference as reference_impl
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import fail

MAX_WINDOWS = 8


def _check_reference(op: str, arguments: Arguments) -> None:
    reference, threshold = arguments["reference"], arguments["threshold"]
    if reference not in ("previous", "kept"):
        fail(op, "reference", f"value {reference!r}", "'previous' or 'kept'")
    if not threshold >= 0:
        fail(op, "threshold", f"value {threshold}", "at least 0")


def _check(arguments: Arguments, letters: dict[str, int]) -> None:
    _check_reference("token_score", arguments)
    check_grid("token_score", arguments["grid_thw"], arguments["merge_size"], letters["N"])
    if letters["L"] < 1:
        fail("token_score", "patches", "L=0", "at least 1 value a patch")


def _check_frames(arguments: Arguments, letters: dict[str, int]) -> None:
    op = "token_score_frames"
    _check_reference(op, arguments)
    check_frames(op, arguments["frames"], arguments["patch_size"], arguments["merge_size"])
    windows = arguments["windows"]
    if arguments["frames"].dtype == torch.uint8:
        if windows:
            fail(op, "windows", f"{len(windows) // 2} rows", "none for uint8 frames")
        return
    if not windows or len(windows) % 2 or len(windows) > 2 * MAX_WINDOWS:
        fail(op, "windows", f"{len(windows)} values", f"1 to {MAX_WINDOWS} rows (lo, hi) for int16 frames")
    for lo, hi in zip(windows[::2], windows[1::2], strict=True):
        if not -32768 <= lo < hi <= 32767:
            fail(op, "windows", f"row ({lo}, {hi})", "-32768 <= lo < hi <= 32767")


def _drifting(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, steps: float) -> torch.Tensor:
    """Values [T, ...] that wander, so that both references drop and keep, at up to ``steps`` a version."""
    start = torch.randint(40, 216, (1, *shape[1:]), generator=generator).float()
    moves = torch.randn(shape, generator=generator) * steps
    moves *= (torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=generator) < 0.6).float()
    values = (start + moves.cumsum(0)).clamp(0, 255)
    if dtype.is_floating_point:
        return (values / 127.5 - 1).to(dtype)
    if dtype == torch.int16:
        return (values * 12 - 1200).round().to(dtype)
    return values.round().to(dtype)


def _sample(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Arguments:
    sizes = case.sizes
    m, length = sizes["merge_size"], sizes["L"]
    clips = [
        _drifting((t, h * w, length), dtype, generator, 6.0).flatten(0, 1) for t, h, w in sizes["grid_thw"] if t * h * w
    ]
    patches = torch.cat(clips) if clips else torch.empty(0, length, dtype=dtype)
    return {
        "patches": patches.to(device),
        "grid_thw": [size for row in sizes["grid_thw"] for size in row],
        "merge_size": m,
        "reference": sizes.get("reference", "previous"),
        "threshold": 5.1 if dtype == torch.uint8 else 0.0401,
    }


def _sample_frames(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Arguments:
    sizes = case.sizes
    frames = _drifting(sizes["THWC"], dtype, generator, 6.0)
    return {
        "frames": frames.to(device),
        "patch_size": sizes["patch_size"],
        "merge_size": sizes["merge_size"],
        "windows": list(sizes.get("windows", (-1000, 400, -160, 240))) if dtype == torch.int16 else [],
        "reference": sizes.get("reference", "previous"),
        "threshold": 5.1,
    }


def _cost(arguments: Arguments) -> Cost:
    pixels = arguments["patches"] if "patches" in arguments else arguments["frames"]
    per_cell = _reduction(arguments)
    cells = pixels.numel() // max(per_cell, 1)
    windows = max(len(arguments.get("windows", ())) // 2, 1)
    return Cost(bytes=pixels.numel() * pixels.element_size() + 4 * cells, flops=3 * windows * pixels.numel())


def _reduction(arguments: Arguments) -> int:
    m = arguments["merge_size"]
    if "patches" in arguments:
        return int(m * m * arguments["patches"].shape[1])
    return int((m * arguments["patch_size"]) ** 2 * arguments["frames"].shape[3])


def _plain(patches: Any, grid_thw: list[int], merge_size: int, reference: str, threshold: float) -> torch.Tensor:
    """The released formulation, in the patches' own dtype."""
    if reference == "kept":
        return reference_impl.token_score(patches, grid_thw, merge_size, reference, threshold)
    parts, row = [], 0
    for t, h, w in zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True):
        clip = patches[row : row + t * h * w].reshape(t, h * w // merge_size**2, -1) if t * h * w else None
        row += t * h * w
        if clip is not None:
            first = torch.full_like(clip[:1, :, 0], float("inf"))
            parts.append(torch.cat([first, (clip[1:] - clip[:-1]).abs().mean(-1)]).flatten())
    return torch.cat(parts).float() if parts else patches.new_empty(0, dtype=torch.float32)


_REFERENCE_BAD = (
    BadCall("threshold_negative", lambda a: {**a, "threshold": -0.1}, ValueError, ("threshold", "-0.1")),
    BadCall("threshold_nan", lambda a: {**a, "threshold": float("nan")}, ValueError, ("threshold", "nan")),
    BadCall("reference_unknown", lambda a: {**a, "reference": "next"}, ValueError, ("reference", "'next'", "'kept'")),
)

TOKEN_SCORE = Op(
    name="token_score",
    summary="temporal difference of cells of cut patches",
    schema="(Tensor patches, int[] grid_thw, int merge_size, str reference, float threshold) -> Tensor",
    tensors=(TensorArg("patches", "N L", PIXELS + FLOATS, "cut patches in merge-block order, grids packed"),),
    dtype_of="patches",
    sample=_sample,
    cases=(
        Case("video", {"grid_thw": [(5, 8, 8)], "L": 588, "merge_size": 2}),
        Case("image", {"grid_thw": [(1, 4, 4)], "L": 588, "merge_size": 1}),
        Case("odd", {"grid_thw": [(3, 9, 15)], "L": 147, "merge_size": 3}, frozenset({"odd"})),
        Case(
            "ragged", {"grid_thw": [(2, 4, 6), (1, 2, 2), (7, 2, 10)], "L": 75, "merge_size": 2}, frozenset({"ragged"})
        ),
        Case(
            "kept",
            {"grid_thw": [(9, 4, 4), (3, 2, 6)], "L": 588, "merge_size": 2, "reference": "kept"},
            frozenset({"ragged"}),
        ),
        Case("tiny", {"grid_thw": [(2, 1, 1)], "L": 1, "merge_size": 1}, frozenset({"tiny"})),
        Case("empty", {"grid_thw": [], "L": 588, "merge_size": 2}, frozenset({"empty"})),
        Case("empty_grid", {"grid_thw": [(0, 4, 4), (2, 2, 2)], "L": 12, "merge_size": 2}, frozenset({"empty"})),
    ),
    perf_cases=(Case("clip_32x36x36", {"grid_thw": [(32, 36, 36)], "L": 588, "merge_size": 2}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"grid_thw": [(n // 1024, 32, 32)], "L": 588, "merge_size": 2}),
    cost=_cost,
    reduction=_reduction,
    # Integers are summed exactly and divided once.
    exact=lambda a: a["patches"].dtype == torch.uint8,
    plain=_plain,
    backends={
        "reference": "reference:token_score",
        "cpu": "native:token_score",
        "triton": "triton_kernels:token_score",
        "cuda": "native:token_score",
    },
    check=_check,
    bad_calls=(
        *_REFERENCE_BAD,
        BadCall(
            "grid_does_not_match",
            lambda a: {**a, "grid_thw": [*a["grid_thw"], 1, 2, 2]},
            ValueError,
            ("grid_thw", "patches in all", "N="),
        ),
        BadCall("merge_does_not_divide", lambda a: {**a, "merge_size": 16}, ValueError, ("grid_thw", "merge_size=16")),
        BadCall("merge_zero", lambda a: {**a, "merge_size": 0}, ValueError, ("merge_size", "at least 1")),
    ),
)

TOKEN_SCORE_FRAMES = Op(
    name="token_score_frames",
    summary="temporal difference of cells of whole frames, int16 in intensity windows",
    schema=("(Tensor frames, int patch_size, int merge_size, int[] windows, str reference, float threshold) -> Tensor"),
    tensors=(TensorArg("frames", "T H W C", (torch.uint8, torch.int16), "frames, channels last"),),
    dtype_of="frames",
    sample=_sample_frames,
    cases=(
        Case("rgb", {"THWC": (4, 56, 84, 3), "patch_size": 14, "merge_size": 2}),
        Case("gray_kept", {"THWC": (9, 56, 28, 1), "patch_size": 14, "merge_size": 2, "reference": "kept"}),
        Case("odd", {"THWC": (3, 45, 75, 3), "patch_size": 5, "merge_size": 3}, frozenset({"odd"})),
        Case("tiny", {"THWC": (2, 1, 1, 1), "patch_size": 1, "merge_size": 1}, frozenset({"tiny"})),
        Case("empty", {"THWC": (0, 28, 28, 3), "patch_size": 14, "merge_size": 2}, frozenset({"empty"})),
    ),
    perf_cases=(
        Case("clip_32x504x504", {"THWC": (32, 504, 504, 3), "patch_size": 14, "merge_size": 2}, frozenset({"perf"})),
    ),
    gpu_cases=at_tokens(lambda n: {"THWC": (n // 1024, 448, 448, 3), "patch_size": 14, "merge_size": 2}),
    cost=_cost,
    reduction=_reduction,
    exact=lambda a: True,
    backends={
        "reference": "reference:token_score_frames",
        "cpu": "native:token_score_frames",
        "triton": "triton_kernels:token_score_frames",
        "cuda": "native:token_score_frames",
    },
    check=_check_frames,
    bad_calls=(
        *_REFERENCE_BAD,
        BadCall(
            "not_divisible",
            lambda a: {**a, "frames": a["frames"][:, 1:]},
            ValueError,
            ("frames", "multiples of patch_size * merge_size"),
        ),
        BadCall("three_dims", lambda a: {**a, "frames": a["frames"][0]}, ValueError, ("frames", "[T, H, W, C]")),
        BadCall(
            "window_upside_down",
            lambda a: {**a, "frames": a["frames"].to(torch.int16), "windows": [240, -160]},
            ValueError,
            ("windows", "(240, -160)"),
        ),
        BadCall(
            "window_missing",
            lambda a: {**a, "frames": a["frames"].to(torch.int16), "windows": []},
            ValueError,
            ("windows", "int16"),
        ),
    ),
)

SPECS = (TOKEN_SCORE, TOKEN_SCORE_FRAMES)
