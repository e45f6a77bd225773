"""bias_gelu as data: bias add and GELU between two linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hulukern.ops.common import FLOATS, check_same_dtype
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import fail

APPROXIMATE = ("tanh", "none")


def _check(op: str, a: Arguments) -> None:
    check_same_dtype(op, a, "bias", "x")
    if a["approximate"] not in APPROXIMATE:
        fail(op, "approximate", f"value {a['approximate']!r}", "'tanh' or 'none'")


def _sample(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    N, E = s["N"], s["E"]
    x = torch.randn(N, E, generator=g) * s.get("scale", 2.0)
    bias = torch.randn(E, generator=g) if s.get("bias", True) else None
    return {
        "x": x.to(device, dtype),
        "bias": None if bias is None else bias.to(device, dtype),
        "approximate": s.get("approximate", "tanh"),
    }


def _sample_backward(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    forward = _sample(case, dtype, device, g)
    return {"grad": torch.randn(forward["x"].shape, generator=g).to(device, dtype), **forward}


def _cost(a: Arguments) -> Cost:
    x = a["x"]
    # tanh and erf as a polynomial or exponential of about ten operations each
    passes, flops = (3, 30) if "grad" in a else (2, 16)
    biases = 0 if a["bias"] is None else a["bias"].numel() * (passes - 1)
    return Cost((passes * x.numel() + biases) * x.element_size(), flops * x.numel())


def _plain(x: torch.Tensor, bias: Any, approximate: str) -> torch.Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def _plain_backward(grad: torch.Tensor, x: torch.Tensor, bias: Any, approximate: str) -> Any:
    u = x if bias is None else x + bias
    grad_x = torch.ops.aten.gelu_backward(grad, u, approximate=approximate)
    return grad_x, x.new_empty(0) if bias is None else grad_x.sum(0)


_CASES = (
    Case("tanh", {"N": 37, "E": 4304}),
    Case("erf", {"N": 33, "E": 256, "approximate": "none"}),
    Case("no_bias", {"N": 9, "E": 144, "bias": False}),
    Case("large_values", {"N": 5, "E": 64, "scale": 40.0}),
    Case("erf_large_values", {"N": 5, "E": 64, "scale": 40.0, "approximate": "none"}),
    Case("odd", {"N": 7, "E": 75}, frozenset({"odd"})),
    Case("tiny", {"N": 1, "E": 1}, frozenset({"tiny"})),
    Case("empty", {"N": 0, "E": 64}, frozenset({"empty"})),
)
_PERF = (Case("n8192_e4304", {"N": 8192, "E": 4304}, frozenset({"perf"})),)
_GPU = at_tokens(lambda n: {"N": n, "E": 4304})
_BAD = (
    BadCall("bias_short", lambda a: {**a, "bias": a["bias"][1:]}, ValueError, ("bias", "E=")),
    BadCall("bias_dtype", lambda a: {**a, "bias": a["bias"].half()}, TypeError, ("bias", "as x")),
    BadCall("approximate", lambda a: {**a, "approximate": "erf"}, ValueError, ("approximate", "'erf'", "'none'")),
)
_X = TensorArg("x", "N E", FLOATS, "what the first linear layer gives, without its bias")
_BIAS = TensorArg("bias", "E", FLOATS, "its bias", optional=True)

BIAS_GELU = Op(
    name="bias_gelu",
    summary="bias add and GELU, tanh or erf",
    schema="(Tensor x, Tensor? bias, str approximate) -> Tensor",
    tensors=(_X, _BIAS),
    dtype_of="x",
    sample=_sample,
    cases=_CASES,
    perf_cases=_PERF,
    gpu_cases=_GPU,
    cost=_cost,
    reduction=lambda a: 4,
    exact=lambda a: False,
    plain=_plain,
    differentiable=("x", "bias"),
    backends={
        "reference": "reference:bias_gelu",
        "cpu": "native:bias_gelu",
        "triton": "triton_kernels:bias_gelu",
        "cuda": "native:bias_gelu",
    },
    check=lambda a, _: _check("bias_gelu", a),
    bad_calls=_BAD,
)

BIAS_GELU_BACKWARD = Op(
    name="bias_gelu_backward",
    summary="gradients of bias_gelu",
    schema="(Tensor grad, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    tensors=(TensorArg("grad", "N E", FLOATS, "of the result"), _X, _BIAS),
    dtype_of="x",
    sample=_sample_backward,
    cases=_CASES,
    perf_cases=_PERF,
    gpu_cases=_GPU,
    cost=_cost,
    reduction=lambda a: max(4, a["x"].shape[0]),
    exact=lambda a: False,
    plain=_plain_backward,
    backends={
        "reference": "reference:bias_gelu_backward",
        "cpu": "native:bias_gelu_backward",
        "triton": "triton_kernels:bias_gelu_backward",
        "cuda": "native:bias_gelu_backward",
    },
    check=lambda a, _: _check("bias_gelu_backward", a),
    bad_calls=_BAD,
)

SPECS = (BIAS_GELU, BIAS_GELU_BACKWARD)
