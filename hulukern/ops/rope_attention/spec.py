"""rope_attention as data: rotary by integer coordinates, then varlen non-causal softmax attention."""

from __future__ import annotations

from typing import Any

import torch

from hulukern.ops.common import DOT_UNINTERPRETED, FLOATS, check_same_dtype
from hulukern.ops.rope_attention.reference import _sequences, rope_attention_rotate
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import fail

HEAD_DIMS = (64, 72, 80, 96, 128)  # what GPU kernels are written for; the reference takes any even one
MAX_HEAD_DIM_CPU = 256
HW = {64: [16, 16], 72: [18, 18], 80: [20, 20], 96: [24, 24], 128: [32, 32]}
THW = {72: [12, 12, 12], 96: [16, 16, 16]}


def _check_sections(op: str, a: Arguments, letters: dict[str, int]) -> None:
    sections, D, axes = a["sections"], letters["D"], letters["axes"]
    if D < 2:
        fail(op, "x" if "x" in a else "q", f"D={D}", "at least 2")
    if min(sections, default=0) < 1 or 2 * sum(sections) != D:
        fail(op, "sections", f"value {sections}", f"positive pair counts that add up to D/2 = {D / 2:g}")
    if len(sections) != axes:
        fail(op, "positions", f"{axes} axes", f"{len(sections)} as sections {sections}")
    if not a["theta"] > 0:
        fail(op, "theta", f"value {a['theta']}", "above 0")


def _check_head_dim(op: str, backend: str, a: Arguments) -> None:
    name = "x" if "x" in a else "q"
    D = a[name].shape[2]
    if backend in ("triton", "cuda") and D not in HEAD_DIMS:
        fail(op, name, f"D={D}", f"one of {', '.join(map(str, HEAD_DIMS))} for backend {backend!r}")
    if backend == "cpu" and D > MAX_HEAD_DIM_CPU:
        fail(op, name, f"D={D}", f"an even number up to {MAX_HEAD_DIM_CPU} for backend 'cpu'")


def _check_attention(op: str, a: Arguments, letters: dict[str, int]) -> None:
    for name in ("k", "v", "grad", "out"):
        if name in a:
            check_same_dtype(op, a, name, "q")
    _check_sections(op, a, letters)
    if not a["scale"] > 0:
        fail(op, "scale", f"value {a['scale']}", "above 0")


def _ends(lengths: Any) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _sample(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    lengths_k = s["lengths"]
    lengths_q = s.get("lengths_q", lengths_k)
    A, D, sections = s["A"], s["D"], s.get("sections", HW.get(s["D"]))
    nq, nk = sum(lengths_q), sum(lengths_k)

    def heads(n: int) -> torch.Tensor:
        return torch.randn(n, A, D, generator=g).to(device, dtype)

    def positions(n: int) -> torch.Tensor:
        return torch.randint(0, 40, (n, len(sections)), generator=g, dtype=torch.int32).to(device)

    pk = positions(nk)
    return {
        "q": heads(nq), "k": heads(nk), "v": heads(nk),
        "positions_q": pk if lengths_q == lengths_k else positions(nq), "positions_k": pk,
        "cu_seqlens_q": _ends(lengths_q).to(device), "cu_seqlens_k": _ends(lengths_k).to(device),
        "sections": sections, "theta": 10000.0, "scale": D**-0.5,
    }  # fmt: skip


def _sample_backward(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    a = _sample(case, dtype, device, g)
    out, lse = _plain(**a)
    grad = torch.randn(out.shape, generator=g).to(device, dtype)
    return {"grad": grad, "q": a["q"], "k": a["k"], "v": a["v"], "out": out, "lse": lse, **a}


def _sample_rotate(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    a = _sample(case, dtype, device, g)
    options = {"sections": a["sections"], "theta": a["theta"], "inverse": case.sizes.get("inverse", False)}
    return {"x": a["q"], "positions": a["positions_q"], **options}


def attention_products(a: Arguments) -> int:
    """Multiply-adds of one product over all pairs of a query and a key, all heads."""
    _, A, D = a["q"].shape
    pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in _sequences(a["cu_seqlens_q"], a["cu_seqlens_k"]))
    return int(pairs * A * D)


def _cost(a: Arguments) -> Cost:
    q, k, size = a["q"].numel(), a["k"].numel(), a["q"].element_size()
    lse = 4 * a["q"].shape[0] * a["q"].shape[1]
    if "grad" in a:  # reads grad, q, out, k, v, writes the gradients of q, k, v; recomputes the logits
        return Cost(size * (4 * q + 4 * k) + lse, 10 * attention_products(a))
    return Cost(size * (2 * q + 2 * k) + lse, 4 * attention_products(a))


def _cost_rotate(a: Arguments) -> Cost:
    x = a["x"]
    return Cost(2 * x.numel() * x.element_size() + 4 * a["positions"].numel(), 3 * x.numel())


def _plain_parts(a: Arguments) -> Any:
    """As transformers does: rotated in fp32, rounded, then attention sequence by sequence."""
    rotary = (a["sections"], a["theta"], False)
    q = rope_attention_rotate(a["q"], a["positions_q"], *rotary).transpose(0, 1)
    k = rope_attention_rotate(a["k"], a["positions_k"], *rotary).transpose(0, 1)
    outs, lses = [q[:, :0]], [q[:, :0, 0].float()]
    for in_q, in_k in _sequences(a["cu_seqlens_q"], a["cu_seqlens_k"]):
        logits = q[:, in_q] @ k[:, in_k].transpose(1, 2) * a["scale"]
        p = logits.float().softmax(-1).to(q.dtype)
        outs.append(p @ a["v"].transpose(0, 1)[:, in_k])
        lses.append(logits.detach().float().logsumexp(-1))
    return torch.cat(outs, 1).transpose(0, 1).contiguous(), torch.cat(lses, 1)


def _plain(*values: Any, **named: Any) -> Any:
    return _plain_parts(named or dict(zip(ROPE_ATTENTION.argument_names, values, strict=True)))


def _plain_backward(*values: Any) -> Any:
    a = dict(zip(ROPE_ATTENTION_BACKWARD.argument_names, values, strict=True))
    leaves = [a[name].detach().requires_grad_() for name in ("q", "k", "v")]
    with torch.enable_grad():
        out, _ = _plain_parts({**a, **dict(zip("qkv", leaves, strict=True))})
        found = torch.autograd.grad(out, leaves, a["grad"], allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))


def _ends_short(a: Arguments) -> Arguments:
    return {**a, "cu_seqlens_k": a["cu_seqlens_k"] - 1}


def _ends_fall(a: Arguments) -> Arguments:
    ends = torch.tensor([0, a["q"].shape[0] + 1, a["q"].shape[0]], dtype=torch.int32)
    return {**a, "cu_seqlens_q": ends}


_ATTENTION = (
    TensorArg("q", "Nq A D", FLOATS, "queries, not rotated"),
    TensorArg("k", "Nk A D", FLOATS, "keys, not rotated"),
    TensorArg("v", "Nk A D", FLOATS, "values"),
    TensorArg("positions_q", "Nq axes", (torch.int32,), "coordinates of the queries"),
    TensorArg("positions_k", "Nk axes", (torch.int32,), "coordinates of the keys"),
    TensorArg("cu_seqlens_q", "S+1", (torch.int32,), "where the queries of a sequence begin and end"),
    TensorArg("cu_seqlens_k", "S+1", (torch.int32,), "where its keys begin and end"),
)
_CASES = (
    Case("hw", {"lengths": (40, 23), "A": 2, "D": 72}, frozenset({"ragged"})),
    Case("thw", {"lengths": (33, 5), "A": 2, "D": 72, "sections": THW[72]}, frozenset({"ragged"})),
    Case("d64", {"lengths": (17, 30), "A": 2, "D": 64}),
    Case("d80", {"lengths": (20,), "A": 1, "D": 80}),
    Case("thw_d96", {"lengths": (20,), "A": 1, "D": 96, "sections": THW[96]}),
    Case("d128", {"lengths": (20,), "A": 1, "D": 128}),
    Case("tiles", {"lengths": (150, 1, 131), "A": 1, "D": 72}, frozenset({"ragged"})),
    Case(
        "fewer_queries", {"lengths_q": (5, 3, 0, 70), "lengths": (16, 0, 4, 75), "A": 2, "D": 72}, frozenset({"ragged"})
    ),
    Case("many_short", {"lengths": (1, 2, 3, 0, 4, 1, 1, 2), "A": 2, "D": 72}, frozenset({"ragged"})),
    Case("odd", {"lengths": (7, 1, 13), "A": 3, "D": 72}, frozenset({"odd"})),
    # One key alone has no gradient but what cancels; two have.
    Case("tiny", {"lengths": (2,), "A": 1, "D": 64}, frozenset({"tiny"})),
    Case("empty", {"lengths": (), "A": 2, "D": 72}, frozenset({"empty"})),
    Case("empty_sequences", {"lengths": (0, 3, 0), "A": 1, "D": 72}, frozenset({"empty"})),
)
_PERF = (
    Case("4x1024_d72", {"lengths": (1024,) * 4, "A": 16, "D": 72}, frozenset({"perf"})),
    Case("16x256_d72", {"lengths": (256,) * 16, "A": 16, "D": 72}, frozenset({"perf"})),
    Case("1x4096_d72", {"lengths": (4096,), "A": 16, "D": 72}, frozenset({"perf"})),
)
_GPU = tuple(
    Case(f"{S}x{n}_d72", {"lengths": (n,) * S, "A": 16, "D": 72}, frozenset({"perf"}))
    for S, n in ((16, 1024), (64, 1024), (64, 256), (28, 576), (4, 4096))
)
_BAD = (
    BadCall("v_heads", lambda a: {**a, "v": a["v"][:, :1]}, ValueError, ("v", "A=")),
    BadCall("k_dtype", lambda a: {**a, "k": a["k"].half()}, TypeError, ("k", "as q")),
    BadCall("sections_sum", lambda a: {**a, "sections": [18, 17]}, ValueError, ("sections", "D/2 = 36")),
    BadCall("sections_zero", lambda a: {**a, "sections": [36, 0]}, ValueError, ("sections", "[36, 0]")),
    BadCall("sections_axes", lambda a: {**a, "sections": [12, 12, 12]}, ValueError, ("positions", "2 axes")),
    BadCall("theta", lambda a: {**a, "theta": 0.0}, ValueError, ("theta", "0.0")),
    BadCall("scale", lambda a: {**a, "scale": float("nan")}, ValueError, ("scale", "nan")),
    BadCall("ends_short", _ends_short, ValueError, ("cu_seqlens_k", "N="), values=True),
    BadCall("ends_fall", _ends_fall, ValueError, ("cu_seqlens_q", "never to fall"), values=True),
)

ROPE_ATTENTION = Op(
    name="rope_attention",
    summary="2D or 3D rotary of q and k in registers, then varlen non-causal attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor positions_q, Tensor positions_k, Tensor cu_seqlens_q,"
        " Tensor cu_seqlens_k, int[] sections, float theta, float scale) -> (Tensor, Tensor)"
    ),
    tensors=_ATTENTION,
    dtype_of="q",
    sample=_sample,
    cases=_CASES,
    perf_cases=_PERF,
    gpu_cases=_GPU,
    cost=_cost,
    # A logit sums D products, an output up to the longest sequence.
    reduction=lambda a: int(a["q"].shape[2]) + int(a["k"].shape[0]),
    exact=lambda a: False,
    plain=_plain,
    differentiable=("q", "k", "v"),
    backends={
        "reference": "reference:rope_attention",
        "cpu": "native:rope_attention",
        "triton": "triton_kernels:rope_attention",
        "cuda": "native:rope_attention",
    },
    uninterpreted=DOT_UNINTERPRETED,
    check=lambda a, letters: _check_attention("rope_attention", a, letters),
    check_backend=lambda backend, a: _check_head_dim("rope_attention", backend, a),
    bad_calls=_BAD,
)

ROPE_ATTENTION_BACKWARD = Op(
    name="rope_attention_backward",
    summary="gradients of rope_attention, from the saved log-sum-exp",
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor positions_q, Tensor positions_k,"
        " Tensor cu_seqlens_q, Tensor cu_seqlens_k, int[] sections, float theta, float scale)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    tensors=(
        *_ATTENTION,
        TensorArg("grad", "Nq A D", FLOATS, "of the output"),
        TensorArg("out", "Nq A D", FLOATS, "the output"),
        TensorArg("lse", "A Nq", (torch.float32,), "log-sum-exp of the logits"),
    ),
    dtype_of="q",
    sample=_sample_backward,
    cases=_CASES,
    perf_cases=_PERF[:1],
    gpu_cases=(*_PERF[1:], *_GPU),
    cost=_cost,
    reduction=lambda a: int(a["q"].shape[2]) + int(a["k"].shape[0]) + int(a["q"].shape[0]),
    exact=lambda a: False,
    plain=_plain_backward,
    backends={
        "reference": "reference:rope_attention_backward",
        "cpu": "native:rope_attention_backward",
        "triton": "triton_backward:rope_attention_backward",
        "cuda": "native:rope_attention_backward",
    },
    uninterpreted=DOT_UNINTERPRETED,
    check=lambda a, letters: _check_attention("rope_attention_backward", a, letters),
    check_backend=lambda backend, a: _check_head_dim("rope_attention_backward", backend, a),
    bad_calls=(
        *_BAD,
        BadCall("lse_shape", lambda a: {**a, "lse": a["lse"].t()}, ValueError, ("lse", "A=")),
    ),
)

ROPE_ATTENTION_ROTATE = Op(
    name="rope_attention_rotate",
    summary="the rotary alone, forwards or backwards",
    schema="(Tensor x, Tensor positions, int[] sections, float theta, bool inverse) -> Tensor",
    tensors=(
        TensorArg("x", "N A D", FLOATS, "queries or keys"),
        TensorArg("positions", "N axes", (torch.int32,), "their coordinates"),
    ),
    dtype_of="x",
    sample=_sample_rotate,
    cases=(
        Case("hw", {"lengths": (40,), "A": 2, "D": 72}),
        Case("thw", {"lengths": (40,), "A": 2, "D": 72, "sections": THW[72]}),
        Case("inverse", {"lengths": (9,), "A": 4, "D": 64, "inverse": True}),
        Case("odd", {"lengths": (7,), "A": 3, "D": 96, "sections": THW[96]}, frozenset({"odd"})),
        Case("tiny", {"lengths": (1,), "A": 1, "D": 64}, frozenset({"tiny"})),
        Case("empty", {"lengths": (), "A": 2, "D": 72}, frozenset({"empty"})),
    ),
    perf_cases=(Case("n8192_d72", {"lengths": (8192,), "A": 16, "D": 72}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"lengths": (n,), "A": 16, "D": 72}),
    cost=_cost_rotate,
    reduction=lambda a: 2,
    exact=lambda a: False,
    plain=rope_attention_rotate,
    differentiable=("x",),
    backends={
        "reference": "reference:rope_attention_rotate",
        "cpu": "native:rope_attention_rotate",
        "triton": "triton_kernels:rope_attention_rotate",
        "cuda": "native:rope_attention_rotate",
    },
    check=lambda a, letters: _check_sections("rope_attention_rotate", a, letters),
    check_backend=lambda backend, a: _check_head_dim("rope_attention_rotate", backend, a),
    bad_calls=(
        BadCall("sections_sum", lambda a: {**a, "sections": [18, 17]}, ValueError, ("sections", "D/2 = 36")),
        BadCall("positions_rows", lambda a: {**a, "positions": a["positions"][1:]}, ValueError, ("positions", "N=")),
    ),
)

SPECS = (ROPE_ATTENTION, ROPE_ATTENTION_BACKWARD, ROPE_ATTENTION_ROTATE)
