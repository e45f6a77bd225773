"""layer_norm as data: optional residual add, LayerNorm, both results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hulukern.ops.common import FLOATS, check_same_dtype, rstd_of
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import fail

EPS = 1e-6  # of every sample


def _check(a: Arguments, letters: dict[str, int]) -> None:
    op = "layer_norm"
    check_same_dtype(op, a, "residual", "x")
    check_same_dtype(op, a, "bias", "weight")
    if letters["E"] < 1:
        fail(op, "x", "E=0", "at least 1 value a row")
    if not a["eps"] >= 0:
        fail(op, "eps", f"value {a['eps']}", "at least 0")


def _check_backward(a: Arguments, letters: dict[str, int]) -> None:
    op = "layer_norm_backward"
    check_same_dtype(op, a, "grad", "summed")
    check_same_dtype(op, a, "grad_summed", "summed")


def _sample(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    N, E = s["N"], s["E"]
    # A mean far from zero: a variance taken as E[x^2] - E[x]^2 would lose its digits.
    x = torch.randn(N, E, generator=g) + s.get("mean", 3.0)
    residual = torch.randn(N, E, generator=g) if s.get("residual") else None
    scale = s.get("weight", dtype)
    return {
        "x": x.to(device, dtype),
        "residual": None if residual is None else residual.to(device, dtype),
        "weight": (torch.randn(E, generator=g) + 1).to(device, scale),
        "bias": torch.randn(E, generator=g).to(device, scale),
        "eps": EPS,
    }


def _sample_backward(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    N, E = s["N"], s["E"]
    x = (torch.randn(N, E, generator=g) + 1).to(dtype)
    grad_summed = torch.randn(N, E, generator=g) if s.get("residual") else None
    return {
        "grad": torch.randn(N, E, generator=g).to(device, dtype),
        "grad_summed": None if grad_summed is None else grad_summed.to(device, dtype),
        "summed": x.to(device),
        "weight": (torch.randn(E, generator=g) + 1).to(device, dtype),
        "mean": x.float().mean(-1).to(device),
        "rstd": rstd_of(x.float(), EPS).to(device),
    }


def _cost(a: Arguments) -> Cost:
    x = a["x"]
    moved = x.numel() * x.element_size() * (2 if a["residual"] is None else 4)
    return Cost(moved + 8 * x.shape[0] + 2 * a["weight"].numel() * a["weight"].element_size(), 8 * x.numel())


def _cost_backward(a: Arguments) -> Cost:
    x = a["summed"]
    moved = x.numel() * x.element_size() * (3 if a["grad_summed"] is None else 4)
    return Cost(moved + 8 * x.shape[0] + 3 * a["weight"].numel() * a["weight"].element_size(), 14 * x.numel())


def _plain(x: torch.Tensor, residual: Any, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Any:
    summed = x if residual is None else x + residual
    y = F.layer_norm(summed, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    rows = summed.detach().float()
    return y, x.new_empty(0) if residual is None else summed, rows.mean(-1), rstd_of(rows, eps)


def _plain_backward(grad: Any, grad_summed: Any, summed: Any, weight: Any, _mean: Any, _rstd: Any) -> Any:
    leaves = [x.detach().requires_grad_() for x in (summed, weight, torch.zeros_like(weight))]
    with torch.enable_grad():
        y = F.layer_norm(leaves[0], summed.shape[-1:], leaves[1], leaves[2], EPS)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(y, leaves, grad)
    return grad_x if grad_summed is None else grad_x + grad_summed, grad_weight, grad_bias


def _no_values(a: Arguments) -> Arguments:
    return {**a, **{name: a[name][..., :0] for name in ("x", "weight", "bias")}}


LAYER_NORM = Op(
    name="layer_norm",
    summary="optional residual add, then LayerNorm; also returns the sum",
    schema="(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tensors=(
        TensorArg("x", "N E", FLOATS, "rows to normalise"),
        TensorArg("residual", "N E", FLOATS, "added to x first, x's dtype", optional=True),
        TensorArg("weight", "E", FLOATS, "scale"),
        TensorArg("bias", "E", FLOATS, "shift"),
    ),
    dtype_of="x",
    sample=_sample,
    cases=(
        Case("rows", {"N": 37, "E": 1152}),
        Case("residual", {"N": 33, "E": 1152, "residual": True}),
        Case("fp32_weight", {"N": 16, "E": 144, "residual": True, "weight": torch.float32}),
        Case("far_mean", {"N": 8, "E": 256, "mean": 100.0}),
        Case("odd", {"N": 7, "E": 75, "residual": True}, frozenset({"odd"})),
        Case("wide", {"N": 3, "E": 9000}),
        Case("tiny", {"N": 1, "E": 1}, frozenset({"tiny"})),
        Case("empty", {"N": 0, "E": 64, "residual": True}, frozenset({"empty"})),
    ),
    perf_cases=(Case("n8192_e1152_residual", {"N": 8192, "E": 1152, "residual": True}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"N": n, "E": 1152, "residual": True}),
    cost=_cost,
    reduction=lambda a: int(a["x"].shape[1]),
    exact=lambda a: False,
    plain=_plain,
    differentiable=("x", "residual", "weight", "bias"),
    backends={
        "reference": "reference:layer_norm",
        "cpu": "native:layer_norm",
        "triton": "triton_kernels:layer_norm",
        "cuda": "native:layer_norm",
    },
    check=_check,
    bad_calls=(
        BadCall("weight_short", lambda a: {**a, "weight": a["weight"][1:]}, ValueError, ("weight", "E=")),
        BadCall("residual_rows", lambda a: {**a, "residual": a["x"][1:]}, ValueError, ("residual", "N=")),
        BadCall("residual_dtype", lambda a: {**a, "residual": a["x"].half()}, TypeError, ("residual", "as x")),
        BadCall("eps_negative", lambda a: {**a, "eps": -1.0}, ValueError, ("eps", "-1.0")),
        BadCall("no_values", _no_values, ValueError, ("x", "E=0")),
    ),
)  # fmt: skip

LAYER_NORM_BACKWARD = Op(
    name="layer_norm_backward",
    summary="gradients of layer_norm",
    schema=(
        "(Tensor grad, Tensor? grad_summed, Tensor summed, Tensor weight, Tensor mean, Tensor rstd)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    tensors=(
        TensorArg("grad", "N E", FLOATS, "of y"),
        TensorArg("grad_summed", "N E", FLOATS, "of the sum", optional=True),
        TensorArg("summed", "N E", FLOATS, "what was normalised"),
        TensorArg("weight", "E", FLOATS, "scale"),
        TensorArg("mean", "N", (torch.float32,), "of the rows"),
        TensorArg("rstd", "N", (torch.float32,), "1 / standard deviation of the rows"),
    ),
    dtype_of="summed",
    sample=_sample_backward,
    cases=(
        Case("rows", {"N": 37, "E": 1152}),
        Case("residual", {"N": 130, "E": 144, "residual": True}),
        Case("odd", {"N": 7, "E": 75, "residual": True}, frozenset({"odd"})),
        Case("tiny", {"N": 1, "E": 2}, frozenset({"tiny"})),
        Case("empty", {"N": 0, "E": 64}, frozenset({"empty"})),
    ),
    perf_cases=(Case("n8192_e1152_residual", {"N": 8192, "E": 1152, "residual": True}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"N": n, "E": 1152, "residual": True}),
    cost=_cost_backward,
    reduction=lambda a: max(a["summed"].shape),
    exact=lambda a: False,
    plain=_plain_backward,
    backends={
        "reference": "reference:layer_norm_backward",
        "cpu": "native:layer_norm_backward",
        "triton": "triton_kernels:layer_norm_backward",
        "cuda": "native:layer_norm_backward",
    },
    check=_check_backward,
    bad_calls=(
        BadCall("mean_short", lambda a: {**a, "mean": a["mean"][1:]}, ValueError, ("mean", "N=")),
        BadCall("grad_dtype", lambda a: {**a, "grad": a["grad"].half()}, TypeError, ("grad", "as summed")),
    ),
)

SPECS = (LAYER_NORM, LAYER_NORM_BACKWARD)
