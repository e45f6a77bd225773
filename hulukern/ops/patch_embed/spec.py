"""patch_embed as data: from cut patches and from whole frames, and its two halves without the product."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from hulukern.ops.common import DOT_UNINTERPRETED, FLOATS, check_frames, check_same_dtype
from hulukern.ops.patch_embed import reference
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import fail

MAX_CHANNELS = 4
MEAN, STD = [0.5, 0.25, 0.4], [0.5, 0.3, 0.25]  # unequal on purpose: a swapped channel shows


def _check_norm(op: str, arguments: Arguments, channels: int) -> None:
    mean, std = arguments["mean"], arguments["std"]
    if not 1 <= channels <= MAX_CHANNELS:
        fail(op, "channels", f"value {channels}", f"1 to {MAX_CHANNELS}")
    if (mean is None) != (std is None):
        fail(op, "mean, std", "only one of them", "both or neither")
    if mean is None:
        return
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(math.isfinite(v) for v in values):
            fail(op, name, f"values {tuple(values)}", f"{channels} finite ones, one per channel")
    if min(std) <= 0:
        fail(op, "std", f"values {tuple(std)}", "all above 0")


def _check_window(op: str, arguments: Arguments) -> None:
    window, dtype = arguments["window"], arguments["frames"].dtype
    if dtype == torch.uint8 and window:
        fail(op, "window", f"value {tuple(window)}", "None for uint8 frames")
    if dtype == torch.int16 and not (len(window) == 2 and -32768 <= window[0] < window[1] <= 32767):
        fail(op, "window", f"value {tuple(window)}", "(lo, hi) with -32768 <= lo < hi <= 32767 for int16 frames")


def _check_dtype(op: str, arguments: Arguments) -> None:
    if arguments["dtype"] not in FLOATS:
        fail(op, "dtype", f"value {arguments['dtype']!r}", "float32, bfloat16 or float16", TypeError)


def _check_normalize(arguments: Arguments, letters: dict[str, int]) -> None:
    op, channels = "patch_embed_normalize", arguments["channels"]
    _check_norm(op, arguments, channels)
    _check_dtype(op, arguments)
    if letters["L"] % channels:
        fail(op, "patches", f"L={letters['L']}", f"a multiple of {channels} channels")


def _check_cut(arguments: Arguments, letters: dict[str, int]) -> None:
    op, channels = "patch_embed_cut", arguments["channels"]
    _check_norm(op, arguments, channels)
    _check_dtype(op, arguments)
    _check_window(op, arguments)
    check_frames(op, arguments["frames"], arguments["patch_size"], arguments["merge_size"])
    if letters["C"] not in (1, channels):
        fail(op, "frames", f"C={letters['C']}", f"1 or {channels} channels")


def _check_embed(arguments: Arguments, letters: dict[str, int]) -> None:
    op = "patch_embed"
    check_same_dtype(op, arguments, "bias", "weight")
    _check_norm(op, arguments, arguments["channels"])
    if letters["L"] % arguments["channels"]:
        fail(op, "patches", f"L={letters['L']}", f"a multiple of {arguments['channels']} channels")


def _check_embed_frames(arguments: Arguments, letters: dict[str, int]) -> None:
    op = "patch_embed_frames"
    check_same_dtype(op, arguments, "bias", "weight")
    check_frames(op, arguments["frames"], arguments["patch_size"], arguments["merge_size"])
    p = arguments["patch_size"]
    area = p**2
    channels, rest = letters["L"] // area, letters["L"] % area
    if rest or letters["C"] not in (1, channels):
        fail(
            op, "weight", f"shape {list(arguments['weight'].shape)}",
            f"[E, C*{p}*{p}] for C={letters['C']} (or any C for gray frames)",
        )  # fmt: skip
    _check_norm(op, arguments, channels)
    _check_window(op, arguments)


def _pixels(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.int16:
        return torch.randint(-1400, 1400, shape, generator=generator, dtype=dtype)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _norm(sizes: Any, channels: int) -> Arguments:
    if sizes.get("raw"):
        return {"mean": None, "std": None}
    if sizes.get("plain"):
        return {"mean": [0.0] * channels, "std": [1.0] * channels}
    return {"mean": [*MEAN, 0.1][:channels], "std": [*STD, 0.7][:channels]}


def _weight(sizes: Any, length: int, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    scale = 0.01 if sizes.get("raw") else 1.0
    weight = torch.randn(sizes["E"], length, generator=g) * scale / max(length, 1) ** 0.5
    bias = torch.randn(sizes["E"], generator=g) if sizes.get("bias", True) else None
    return {"weight": weight.to(dtype).to(device), "bias": None if bias is None else bias.to(dtype).to(device)}


def _sample_normalize(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    pixels = _pixels((s["N"], s["channels"] * s["plane"]), dtype, g)
    return {
        "patches": pixels.to(device),
        "channels": s["channels"],
        **_norm(s, s["channels"]),
        "dtype": s.get("out", torch.float32),
    }


def _sample_cut(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    return {
        "frames": _pixels(s["THWC"], dtype, g).to(device),
        "patch_size": s["patch_size"],
        "merge_size": s["merge_size"],
        "channels": s.get("channels", s["THWC"][3]),
        **_norm(s, s.get("channels", s["THWC"][3])),
        "window": list(s.get("window", (-1000, 400))) if dtype == torch.int16 else [],
        "dtype": s.get("out", torch.float32),
        "with_scores": s.get("scores", True),
    }


def _sample_embed(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    length = s["channels"] * s["plane"]
    if s.get("pixels", True):
        patches, norm = _pixels((s["N"], length), torch.uint8, g), _norm(s, s["channels"])
    else:
        patches, norm = torch.randn(s["N"], length, generator=g).to(dtype), {"mean": None, "std": None}
    return {
        "patches": patches.to(device),
        **_weight(s, length, dtype, device, g),
        "channels": s["channels"] if norm["mean"] else 1,
        **norm,
    }


def _sample_frames(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    channels, p = s.get("channels", s["THWC"][3]), s["patch_size"]
    pixels = torch.int16 if s.get("i16") else torch.uint8
    return {
        "frames": _pixels(s["THWC"], pixels, g).to(device),
        **_weight(s, channels * p * p, dtype, device, g),
        "patch_size": p,
        "merge_size": s["merge_size"],
        **_norm(s, channels),
        "window": [-1000, 400] if s.get("i16") else [],
        "with_scores": s.get("scores", True),
    }


def _n_values(a: Arguments) -> int:
    """Values of all patches together: what is written by a cut, and K x N of the product."""
    if "patches" in a:
        return int(a["patches"].numel())
    T, H, W, _C = a["frames"].shape
    channels = a["channels"] if "channels" in a else a["weight"].shape[1] // a["patch_size"] ** 2
    return int(T * H * W * channels)


def _cost(a: Arguments) -> Cost:
    pixels = a["patches"] if "patches" in a else a["frames"]
    moved, values = pixels.numel() * pixels.element_size(), _n_values(a)
    flops = 3 * values
    if a.get("with_scores"):
        moved += 4 * pixels.numel() // max(_reduction_cell(a), 1)
        flops += 3 * pixels.numel()
    if "weight" not in a:
        return Cost(moved + values * a["dtype"].itemsize, flops)
    E, length = a["weight"].shape
    rows = values // max(length, 1)
    size = a["weight"].element_size()
    return Cost(moved + size * (E * length + E + rows * E), flops + 2 * values * E)


def _reduction_cell(a: Arguments) -> int:
    return int((a["patch_size"] * a["merge_size"]) ** 2 * a["frames"].shape[3])


def _plain_embed(patches: torch.Tensor, weight: torch.Tensor, bias: Any, channels: int, mean: Any, std: Any) -> Any:
    if patches.dtype == torch.uint8:
        patches = reference.patch_embed_normalize(patches, channels, mean, std, weight.dtype)
    return F.linear(patches.to(weight.dtype), weight, bias)


def _plain_frames(
    frames: torch.Tensor, weight: torch.Tensor, bias: Any, patch_size: int, merge_size: int, mean: Any, std: Any,
    window: list[int], with_scores: bool,
) -> Any:  # fmt: skip
    channels = weight.shape[1] // patch_size**2
    patches, scores = reference.patch_embed_cut(
        frames, patch_size, merge_size, channels, mean, std, window, weight.dtype, with_scores
    )
    return F.linear(patches, weight, bias), scores


_NORM_BAD = (
    BadCall("std_zero", lambda a: {**a, "std": [0.0] * len(a["std"])}, ValueError, ("std", "above 0")),
    BadCall("mean_alone", lambda a: {**a, "std": None}, ValueError, ("mean, std", "both or neither")),
    BadCall("mean_nan", lambda a: {**a, "mean": [float("nan")] * len(a["mean"])}, ValueError, ("mean", "finite")),
)
_FRAMES_BAD = (
    BadCall(
        "not_divisible",
        lambda a: {**a, "frames": a["frames"][:, :, 1:]},
        ValueError,
        ("frames", "multiples of patch_size * merge_size"),
    ),
    BadCall("three_dims", lambda a: {**a, "frames": a["frames"][0]}, ValueError, ("frames", "[T, H, W, C]")),
    BadCall("float_frames", lambda a: {**a, "frames": a["frames"].float()}, TypeError, ("frames", "float32", "uint8")),
    BadCall("window_for_uint8", lambda a: {**a, "window": [0, 255]}, ValueError, ("window", "uint8")),
)

_TIES = {"THWC": (2, 28, 56, 1), "patch_size": 14, "merge_size": 2, "channels": 1, "plain": True}
_CUT_CASES = (
    Case("rgb", {"THWC": (3, 56, 84, 3), "patch_size": 14, "merge_size": 2}),
    Case("bf16", {"THWC": (2, 56, 56, 3), "patch_size": 14, "merge_size": 2, "out": torch.bfloat16}),
    Case("fp16", {"THWC": (2, 28, 84, 3), "patch_size": 14, "merge_size": 1, "out": torch.float16}),
    Case("raw", {"THWC": (2, 32, 64, 3), "patch_size": 16, "merge_size": 2, "raw": True}),
    # Windows of 2**9 and 2**12: every other value lies halfway between two of the output's.
    Case("ties_bf16", {**_TIES, "window": (0, 512), "out": torch.bfloat16}),
    Case("ties_fp16", {**_TIES, "window": (-2048, 2048), "out": torch.float16}),
    Case("gray", {"THWC": (4, 28, 56, 1), "patch_size": 14, "merge_size": 2, "channels": 3, "out": torch.bfloat16}),
    Case("odd", {"THWC": (3, 45, 75, 3), "patch_size": 5, "merge_size": 3}, frozenset({"odd"})),
    Case("no_scores", {"THWC": (2, 28, 28, 3), "patch_size": 14, "merge_size": 1, "scores": False}),
    Case("tiny", {"THWC": (1, 1, 1, 1), "patch_size": 1, "merge_size": 1}, frozenset({"tiny"})),
    Case("empty", {"THWC": (0, 28, 28, 3), "patch_size": 14, "merge_size": 2}, frozenset({"empty"})),
)

PATCH_EMBED_CUT = Op(
    name="patch_embed_cut",
    summary="frames to normalised patches in merge-block order, and temporal scores, in one pass",
    schema=(
        "(Tensor frames, int patch_size, int merge_size, int channels, float[]? mean, float[]? std, int[] window, "
        "ScalarType dtype, bool with_scores) -> (Tensor, Tensor)"
    ),
    tensors=(TensorArg("frames", "T H W C", (torch.uint8, torch.int16), "frames, channels last"),),
    dtype_of="frames",
    sample=_sample_cut,
    cases=_CUT_CASES,
    perf_cases=(
        Case(
            "clip_32x504x504",
            {"THWC": (32, 504, 504, 3), "patch_size": 14, "merge_size": 2, "out": torch.bfloat16},
            frozenset({"perf"}),
        ),
    ),
    gpu_cases=at_tokens(
        lambda n: {"THWC": (n // 1024, 448, 448, 3), "patch_size": 14, "merge_size": 2, "out": torch.bfloat16}
    ),
    cost=_cost,
    reduction=lambda a: 1,
    exact=lambda a: True,
    backends={
        "reference": "reference:patch_embed_cut",
        "cpu": "native:patch_embed_cut",
        "triton": "triton_kernels:patch_embed_cut",
        "cuda": "native:patch_embed_cut",
    },
    check=_check_cut,
    bad_calls=(
        *_NORM_BAD,
        *_FRAMES_BAD,
        BadCall("two_channels", lambda a: {**a, "frames": a["frames"][..., :2]}, ValueError, ("frames", "C=2")),
        BadCall("int_dtype", lambda a: {**a, "dtype": torch.int32}, TypeError, ("dtype", "bfloat16")),
    ),
)

PATCH_EMBED_NORMALIZE = Op(
    name="patch_embed_normalize",
    summary="cut uint8 patches to normalised values",
    schema="(Tensor patches, int channels, float[]? mean, float[]? std, ScalarType dtype) -> Tensor",
    tensors=(TensorArg("patches", "N L", (torch.uint8,), "cut patches (channel, y, x)"),),
    dtype_of="patches",
    sample=_sample_normalize,
    cases=(
        Case("rgb", {"N": 40, "channels": 3, "plane": 196}),
        Case("bf16", {"N": 33, "channels": 3, "plane": 196, "out": torch.bfloat16}),
        Case("fp16_odd", {"N": 7, "channels": 3, "plane": 25, "out": torch.float16}, frozenset({"odd"})),
        Case("raw", {"N": 5, "channels": 1, "plane": 588, "raw": True, "out": torch.bfloat16}),
        Case("tiny", {"N": 1, "channels": 1, "plane": 1}, frozenset({"tiny"})),
        Case("empty", {"N": 0, "channels": 3, "plane": 196}, frozenset({"empty"})),
    ),
    perf_cases=(
        Case("clip_41472x588", {"N": 41472, "channels": 3, "plane": 196, "out": torch.bfloat16}, frozenset({"perf"})),
    ),
    gpu_cases=at_tokens(lambda n: {"N": n, "channels": 3, "plane": 196, "out": torch.bfloat16}),
    cost=_cost,
    reduction=lambda a: 1,
    exact=lambda a: True,
    backends={
        "reference": "reference:patch_embed_normalize",
        "cpu": "native:patch_embed_normalize",
        "triton": "triton_kernels:patch_embed_normalize",
        "cuda": "native:patch_embed_normalize",
    },
    check=_check_normalize,
    bad_calls=(
        *_NORM_BAD,
        BadCall("float_patches", lambda a: {**a, "patches": a["patches"].float()}, TypeError, ("patches", "uint8")),
    ),
)

_WEIGHT = TensorArg("weight", "E L", FLOATS, "embedding weight, (channel, y, x) order")
_BIAS = TensorArg("bias", "E", FLOATS, "embedding bias", optional=True)
_WEIGHT_BAD = (
    BadCall(
        "weight_shape",
        lambda a: {**a, "weight": a["weight"][:, 1:]},
        ValueError,
        ("weight",),
    ),
    BadCall("bias_shape", lambda a: {**a, "bias": a["bias"][1:]}, ValueError, ("bias", "E=")),
    BadCall("weight_int", lambda a: {**a, "weight": a["weight"].int()}, TypeError, ("weight", "int32", "bfloat16")),
    BadCall("weight_none", lambda a: {**a, "weight": None}, TypeError, ("weight", "NoneType", "torch.Tensor")),
    BadCall("bias_dtype", lambda a: {**a, "bias": a["bias"].to(torch.float64)}, TypeError, ("bias", "float64")),
)

PATCH_EMBED = Op(
    name="patch_embed",
    summary="cut patches (uint8 or float) times the embedding weight",
    schema="(Tensor patches, Tensor weight, Tensor? bias, int channels, float[]? mean, float[]? std) -> Tensor",
    tensors=(
        TensorArg("patches", "N L", (torch.uint8, *FLOATS), "cut patches; floats are normalised already"),
        _WEIGHT,
        _BIAS,
    ),
    dtype_of="weight",
    sample=_sample_embed,
    cases=(
        Case("pixels", {"N": 64, "channels": 3, "plane": 196, "E": 96}),
        Case("floats", {"N": 48, "channels": 3, "plane": 196, "E": 64, "pixels": False}),
        Case("raw", {"N": 32, "channels": 3, "plane": 196, "E": 32, "raw": True}),
        Case("blocks", {"N": 2100, "channels": 3, "plane": 4, "E": 8}),
        Case("odd", {"N": 37, "channels": 3, "plane": 25, "E": 51, "bias": False}, frozenset({"odd"})),
        Case("tiny", {"N": 1, "channels": 1, "plane": 1, "E": 1}, frozenset({"tiny"})),
        Case("empty", {"N": 0, "channels": 3, "plane": 196, "E": 16}, frozenset({"empty"})),
    ),
    perf_cases=(Case("n4096_e1152", {"N": 4096, "channels": 3, "plane": 196, "E": 1152}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"N": n, "channels": 3, "plane": 196, "E": 1152}),
    cost=_cost,
    reduction=lambda a: int(a["weight"].shape[1]),
    exact=lambda a: False,
    plain=_plain_embed,
    differentiable=("patches", "weight", "bias"),
    backends={
        "reference": "reference:patch_embed",
        "cpu": "native:patch_embed",
        "triton": "triton_kernels:patch_embed",
        "cuda": "native:patch_embed",
    },
    uninterpreted=DOT_UNINTERPRETED,
    check=_check_embed,
    bad_calls=(*_NORM_BAD, *_WEIGHT_BAD),
)

PATCH_EMBED_FRAMES = Op(
    name="patch_embed_frames",
    summary="whole frames (uint8, or int16 with a window) to embeddings, and temporal scores of the same pass",
    schema=(
        "(Tensor frames, Tensor weight, Tensor? bias, int patch_size, int merge_size, float[]? mean, float[]? std, "
        "int[] window, bool with_scores) -> (Tensor, Tensor)"
    ),
    tensors=(
        TensorArg("frames", "T H W C", (torch.uint8, torch.int16), "frames, channels last"),
        _WEIGHT,
        _BIAS,
    ),
    dtype_of="weight",
    sample=_sample_frames,
    cases=(
        Case("rgb", {"THWC": (3, 56, 84, 3), "patch_size": 14, "merge_size": 2, "E": 64}),
        Case(
            "window", {"THWC": (3, 28, 56, 1), "patch_size": 14, "merge_size": 2, "E": 32, "channels": 3, "i16": True}
        ),
        Case("raw", {"THWC": (2, 32, 32, 3), "patch_size": 16, "merge_size": 1, "E": 24, "raw": True, "scores": False}),
        Case("blocks", {"THWC": (5, 112, 112, 3), "patch_size": 4, "merge_size": 2, "E": 8}),
        Case(
            "odd",
            {"THWC": (3, 45, 75, 3), "patch_size": 5, "merge_size": 3, "E": 37, "bias": False},
            frozenset({"odd"}),
        ),
        Case("tiny", {"THWC": (1, 1, 1, 1), "patch_size": 1, "merge_size": 1, "E": 1}, frozenset({"tiny"})),
        Case("empty", {"THWC": (0, 28, 28, 3), "patch_size": 14, "merge_size": 2, "E": 16}, frozenset({"empty"})),
    ),
    perf_cases=(
        Case(
            "frames_4x448_e1152",
            {"THWC": (4, 448, 448, 3), "patch_size": 14, "merge_size": 2, "E": 1152},
            frozenset({"perf"}),
        ),
    ),
    gpu_cases=at_tokens(lambda n: {"THWC": (n // 1024, 448, 448, 3), "patch_size": 14, "merge_size": 2, "E": 1152}),
    cost=_cost,
    reduction=lambda a: int(a["weight"].shape[1]),
    exact=lambda a: False,
    plain=_plain_frames,
    differentiable=("weight", "bias"),
    backends={
        "reference": "reference:patch_embed_frames",
        "cpu": "native:patch_embed_frames",
        "triton": "triton_kernels:patch_embed_frames",
        "cuda": "native:patch_embed_frames",
    },
    uninterpreted=DOT_UNINTERPRETED,
    check=_check_embed_frames,
    bad_calls=(*_NORM_BAD, *_FRAMES_BAD, *_WEIGHT_BAD),
)

SPECS = (PATCH_EMBED, PATCH_EMBED_FRAMES, PATCH_EMBED_CUT, PATCH_EMBED_NORMALIZE)
