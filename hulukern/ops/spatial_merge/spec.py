"""spatial_merge as data: the mean over M x M patches, after LayerNorm and for kept cells if wanted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hulukern.ops.common import FLOATS, check_same_dtype, rstd_of
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import fail

EPS = 1e-6  # of every sample


def _check(a: Arguments, letters: dict[str, int]) -> None:
    op, M = "spatial_merge", a["merge_size"]
    if M < 1:
        fail(op, "merge_size", f"value {M}", "at least 1")
    if letters["N"] % M**2:
        fail(op, "x", f"N={letters['N']}", f"a multiple of merge_size**2 = {M**2}")
    if letters["E"] < 1:
        fail(op, "x", "E=0", "at least 1 value a row")
    if (a["weight"] is None) != (a["bias"] is None):
        fail(op, "weight, bias", "one of the two", "both or neither")
    if a["weight"] is not None:
        check_same_dtype(op, a, "bias", "weight")
    if not a["eps"] >= 0:
        fail(op, "eps", f"value {a['eps']}", "at least 0")
    if a["keep"] is not None and letters["K"] > letters["N"] // M**2:
        fail(op, "keep", f"{letters['K']} cells", f"at most N / merge_size**2 = {letters['N'] // M**2}")


def _check_backward(a: Arguments, letters: dict[str, int]) -> None:
    op = "spatial_merge_backward"
    check_same_dtype(op, a, "grad", "x")
    rows = letters["K"] if a["weight"] is not None else 0
    for name in ("mean", "rstd"):
        if a["weight"] is not None and a[name].shape != (rows, a["merge_size"] ** 2):
            fail(op, name, f"shape {list(a[name].shape)}", f"[K={rows}, {a['merge_size'] ** 2}]")


def _sample(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    cells, M, E = s["cells"], s["merge_size"], s["E"]
    x = torch.randn(cells * M**2, E, generator=g) * 2 + 1
    keep = (torch.rand(cells, generator=g) < 0.45).nonzero().flatten() if s.get("keep") else None
    norm = s.get("norm", True)
    weight, bias = torch.randn(E, generator=g) + 1, torch.randn(E, generator=g)
    return {
        "x": x.to(device, dtype),
        "weight": weight.to(device, dtype) if norm else None,
        "bias": bias.to(device, dtype) if norm else None,
        "keep": None if keep is None else keep.to(device),
        "merge_size": M,
        "eps": EPS,
    }


def _sample_backward(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    a = _sample(case, dtype, device, g)
    x, keep, area, E = a["x"], a["keep"], a["merge_size"] ** 2, case.sizes["E"]
    cells = x.view(-1, area, E)
    cells = (cells if keep is None else cells[keep]).float()
    grad = torch.randn(cells.shape[0], E, generator=g).to(device, dtype)
    norm = a["weight"] is not None
    mean = cells.mean(-1) if norm else cells.new_empty(0, 0)
    rstd = rstd_of(cells, EPS) if norm else mean
    return {
        "grad": grad, "x": x, "weight": a["weight"], "keep": keep, "mean": mean, "rstd": rstd,
        "merge_size": a["merge_size"],
    }  # fmt: skip


def _cost(a: Arguments) -> Cost:
    x, area = a["x"], a["merge_size"] ** 2
    N, E = x.shape
    size = x.element_size()
    K = N // area if a["keep"] is None else a["keep"].numel()
    norm = 0 if a["weight"] is None else 2 * E * size + 8 * K * area
    if "grad" in a:
        # kept rows are read only for the LayerNorm; every row of grad_x is written
        read = 0 if a["weight"] is None else K * area * E
        return Cost(size * (K * E + read + N * E) + norm, 14 * K * area * E)
    return Cost(size * (K * area * E + K * E) + norm, 9 * K * area * E)


def _plain(x: torch.Tensor, weight: Any, bias: Any, keep: Any, merge_size: int, eps: float) -> Any:
    """Everything, and the choice last, as the released code does."""
    y = x if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    merged = y.reshape(-1, merge_size**2, x.shape[1]).mean(1)
    rows = x.detach().float().reshape(-1, merge_size**2, x.shape[1])
    if keep is not None:
        merged, rows = merged[keep], rows[keep]
    if weight is None:
        return merged, x.new_empty((0, 0), dtype=torch.float32), x.new_empty((0, 0), dtype=torch.float32)
    return merged, rows.mean(-1), rstd_of(rows, eps)


def _plain_backward(
    grad: Any, x: torch.Tensor, weight: Any, keep: Any, _mean: Any, _rstd: Any, merge_size: int
) -> Any:  # fmt: skip
    leaves = [x.detach().requires_grad_()]
    if weight is not None:
        leaves += [weight.detach().requires_grad_(), torch.zeros_like(weight).requires_grad_()]
    with torch.enable_grad():
        w, b = leaves[1:] or (None, None)
        merged = _plain(leaves[0], w, b, keep, merge_size, EPS)[0]
        found = torch.autograd.grad(merged, leaves, grad)
    return (*found, *[x.new_empty(0)] * 2)[:3]


_CASES = (
    Case("norm", {"cells": 24, "E": 1152, "merge_size": 2}),
    Case("keep", {"cells": 60, "E": 144, "merge_size": 2, "keep": True}),
    Case("mean_only", {"cells": 20, "E": 256, "merge_size": 2, "norm": False}),
    Case("mean_only_keep", {"cells": 31, "E": 64, "merge_size": 2, "norm": False, "keep": True}),
    Case("merge_1", {"cells": 37, "E": 144, "merge_size": 1, "keep": True}),
    Case("odd", {"cells": 7, "E": 75, "merge_size": 3, "keep": True}, frozenset({"odd"})),
    Case("tiny", {"cells": 1, "E": 1, "merge_size": 1}, frozenset({"tiny"})),
    Case("empty", {"cells": 0, "E": 64, "merge_size": 2, "keep": True}, frozenset({"empty"})),
)
_PERF = (
    Case("cells4096_e1152_keep", {"cells": 4096, "E": 1152, "merge_size": 2, "keep": True}, frozenset({"perf"})),
    Case("cells4096_e1152", {"cells": 4096, "E": 1152, "merge_size": 2}, frozenset({"perf"})),
)
_GPU = at_tokens(lambda n: {"cells": n // 4, "E": 1152, "merge_size": 2, "keep": True})
_X = TensorArg("x", "N E", FLOATS, "patch rows in merge-block order")
_WEIGHT = TensorArg("weight", "E", FLOATS, "LayerNorm scale; none: no LayerNorm", optional=True)
_KEEP = TensorArg("keep", "K", (torch.int64,), "cells to merge, strictly increasing; none: all", optional=True)

SPATIAL_MERGE = Op(
    name="spatial_merge",
    summary="M x M mean in merge-block order, optionally after LayerNorm and only for kept cells",
    schema=(
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? keep, int merge_size, float eps) -> (Tensor, Tensor, Tensor)"
    ),
    tensors=(_X, _WEIGHT, TensorArg("bias", "E", FLOATS, "LayerNorm shift", optional=True), _KEEP),
    dtype_of="x",
    sample=_sample,
    cases=_CASES,
    perf_cases=_PERF,
    gpu_cases=_GPU,
    cost=_cost,
    reduction=lambda a: int(a["x"].shape[1]),
    exact=lambda a: False,
    plain=_plain,
    differentiable=("x", "weight", "bias"),
    backends={
        "reference": "reference:spatial_merge",
        "cpu": "native:spatial_merge",
        "triton": "triton_kernels:spatial_merge",
        "cuda": "native:spatial_merge",
    },
    check=_check,
    bad_calls=(
        BadCall("rows", lambda a: {**a, "x": a["x"][1:]}, ValueError, ("x", "N=", "merge_size**2")),
        BadCall("merge_zero", lambda a: {**a, "merge_size": 0}, ValueError, ("merge_size", "0")),
        BadCall("weight_alone", lambda a: {**a, "bias": None}, ValueError, ("weight, bias", "both or neither")),
        BadCall("bias_dtype", lambda a: {**a, "bias": a["bias"].half()}, TypeError, ("bias", "as weight")),
        BadCall(
            "keep_too_many",
            lambda a: {**a, "keep": torch.arange(a["x"].shape[0] + 1)},
            ValueError,
            ("keep", "at most"),
        ),
        BadCall("keep_twice", lambda a: {**a, "keep": torch.tensor([1, 1])}, ValueError, ("increasing",), values=True),
        BadCall(
            "keep_outside", lambda a: {**a, "keep": torch.tensor([0, 24])}, ValueError, ("keep", "24"), values=True
        ),
    ),
)

SPATIAL_MERGE_BACKWARD = Op(
    name="spatial_merge_backward",
    summary="gradients of spatial_merge; dropped cells get zero",
    schema=(
        "(Tensor grad, Tensor x, Tensor? weight, Tensor? keep, Tensor mean, Tensor rstd, int merge_size)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    tensors=(
        TensorArg("grad", "K E", FLOATS, "of the merged cells"),
        _X,
        _WEIGHT,
        _KEEP,
        TensorArg("mean", "R m", (torch.float32,), "of the rows merged, [K, M*M]; [0, 0] without LayerNorm"),
        TensorArg("rstd", "R m", (torch.float32,), "1 / their standard deviation"),
    ),
    dtype_of="x",
    sample=_sample_backward,
    cases=_CASES,
    perf_cases=_PERF,
    gpu_cases=_GPU,
    cost=_cost,
    reduction=lambda a: max(a["x"].shape),
    exact=lambda a: False,
    plain=_plain_backward,
    backends={
        "reference": "reference:spatial_merge_backward",
        "cpu": "native:spatial_merge_backward",
        "triton": "triton_kernels:spatial_merge_backward",
        "cuda": "native:spatial_merge_backward",
    },
    check=_check_backward,
    bad_calls=(
        BadCall("grad_dtype", lambda a: {**a, "grad": a["grad"].half()}, TypeError, ("grad", "as x")),
        BadCall("mean_rows", lambda a: {**a, "mean": a["mean"][1:], "rstd": a["rstd"][1:]}, ValueError, ("mean", "K=")),
    ),
)  # fmt: skip

SPECS = (SPATIAL_MERGE, SPATIAL_MERGE_BACKWARD)
