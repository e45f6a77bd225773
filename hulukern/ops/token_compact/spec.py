"""token_compact as data: the rows that a mask keeps, in order, with everything that belongs to them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hulukern.ops.common import FLOATS
from hulukern.spec import Arguments, BadCall, Case, Cost, Op, TensorArg, at_tokens
from hulukern.validation import dtype_name, fail

ROWS = (*FLOATS, torch.float64, torch.uint8, torch.bool, torch.int16, torch.int32, torch.int64)


def _check(a: Arguments, letters: dict[str, int]) -> None:
    op, n = "token_compact", a["n_rows"]
    for i, x in enumerate(a["tensors"]):
        if x.dim() > 5:
            fail(op, f"tensors[{i}]", f"{x.dim()} dimensions", "at most 5")
        if x.shape[0] != n:
            fail(op, f"tensors[{i}]", f"{x.shape[0]} rows", f"N={n}")
    if a["keep"].dtype == torch.bool and a["keep"].shape[0] != n:
        fail(op, "keep", f"shape {list(a['keep'].shape)}", f"[N={n}]")
    if a["bound"] is not None and a["bound"] < 0:
        fail(op, "bound", f"value {a['bound']}", "at least 0")
    if len(a["fill"]) != len(a["tensors"]):
        fail(op, "fill", f"{len(a['fill'])} values", f"one for each of {len(a['tensors'])} tensors")
    for value, x in zip(a["fill"], a["tensors"], strict=True):
        if not x.is_floating_point():
            low, high = (0, 1) if x.dtype == torch.bool else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
            if not low <= value <= high:
                fail(op, "fill", f"value {value}", f"{low} to {high} for {dtype_name(x.dtype)}")
    if a["cu_seqlens"] is not None and a["cu_seqlens"].shape[0] < 1:
        fail(op, "cu_seqlens", "0 entries", "S+1")


def _check_backward(a: Arguments, letters: dict[str, int]) -> None:
    if a["n_rows"] < 0:
        fail("token_compact_backward", "n_rows", f"value {a['n_rows']}", "at least 0")


def _sample(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    n = s["N"]
    keep = torch.rand(n, generator=g) < s.get("rate", 0.45)
    if s.get("indices"):
        keep = keep.nonzero().flatten()
    x = torch.randn((n, *s.get("row", (48,))), generator=g) * 100
    tensors = [(x > 0) if dtype == torch.bool else x.to(dtype)]
    if s.get("labels"):
        tensors += [
            torch.randint(0, 1000, (n,), generator=g),
            torch.randint(0, 9, (n,), generator=g, dtype=torch.int32),
        ]
    lengths = s.get("lengths")
    ends = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return {
        "keep": keep.to(device),
        "tensors": [t.to(device) for t in tensors],
        "cu_seqlens": ends,
        "n_rows": n,
        "bound": s.get("bound"),
        "fill": [0, 1, -100][: len(tensors)],
    }


def _sample_backward(case: Case, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Arguments:
    s = case.sizes
    index = (torch.rand(s["N"], generator=g) < 0.45).nonzero().flatten()
    index = torch.cat([index, torch.full((s.get("pad", 0),), -1)])
    grad = torch.randn((index.numel(), *s.get("row", (48,))), generator=g).to(dtype)
    return {"grad": grad.to(device), "index": index.to(device), "n_rows": s["N"]}


def _cost(a: Arguments) -> Cost:
    if "grad" in a:
        row = a["grad"][:1].numel() * a["grad"].element_size()
        return Cost(a["index"].numel() * (row + 8) + a["n_rows"] * row, 0)
    kept = int(a["keep"].sum()) if a["keep"].dtype == torch.bool else a["keep"].numel()
    rows = sum(2 * kept * x[:1].numel() * x.element_size() for x in a["tensors"])
    return Cost(rows + a["keep"].numel() * a["keep"].element_size() + 16 * kept, 0)


def _bytes(a: Arguments) -> torch.Tensor:
    return torch.zeros(a["n_rows"], dtype=torch.uint8)


def _with(name: str, values: list[int], dtype: torch.dtype) -> Callable[[Arguments], Arguments]:
    """An edit that puts other values there; a gradient is cut to as many rows."""

    def change(a: Arguments) -> Arguments:
        changed = {**a, name: torch.tensor(values, dtype=dtype)}
        return {**changed, "grad": a["grad"][: len(values)]} if "grad" in a else changed

    return change


TOKEN_COMPACT = Op(
    name="token_compact",
    summary="kept rows, ids, positions, labels, cu_seqlens and count, stable",
    schema=(
        "(Tensor keep, Tensor[] tensors, Tensor? cu_seqlens, SymInt n_rows, SymInt? bound, int[] fill)"
        " -> (Tensor[], Tensor, Tensor, Tensor, Tensor)"
    ),
    tensors=(
        TensorArg("keep", "K", (torch.bool, torch.int64), "mask of the N rows, or the rows to keep, increasing"),
        TensorArg("tensors", "N ...", ROWS, "what belongs to the rows", many=True),
        TensorArg("cu_seqlens", "S+1", (torch.int32,), "where sequences begin and end", optional=True),
    ),
    dtype_of="tensors",
    sample=_sample,
    cases=(
        Case("rows", {"N": 400, "row": (588,)}),
        Case("labels", {"N": 225, "row": (16,), "labels": True}),
        Case(
            "ragged", {"N": 100, "row": (7, 3), "lengths": (31, 0, 1, 68), "labels": True}, frozenset({"ragged", "odd"})
        ),
        Case("indices", {"N": 90, "row": (32,), "indices": True, "lengths": (45, 45)}),
        Case("bound", {"N": 64, "row": (8,), "bound": 50, "labels": True, "lengths": (30, 34)}),
        Case("overfull", {"N": 64, "row": (8,), "bound": 5, "labels": True, "lengths": (30, 34)}),
        Case("none_kept", {"N": 33, "row": (5,), "rate": 0.0}),
        Case("all_kept", {"N": 33, "row": (5,), "rate": 1.1}),
        Case("tiny", {"N": 1, "row": (), "rate": 1.1}, frozenset({"tiny"})),
        Case("empty", {"N": 0, "row": (16,)}, frozenset({"empty"})),
    ),
    perf_cases=(Case("n10368_2352", {"N": 10368, "row": (2352,)}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"N": n // 4, "row": (2352,)}),
    cost=_cost,
    reduction=lambda a: 1,
    exact=lambda a: True,
    differentiable=("tensors",),
    backends={
        "reference": "reference:token_compact",
        "cpu": "native:token_compact",
        "triton": "triton_kernels:token_compact",
        "cuda": "native:token_compact",
    },
    check=_check,
    bad_calls=(
        BadCall(
            "mask_length",
            lambda a: {**a, "keep": torch.ones(1 + a["n_rows"], dtype=torch.bool)},
            ValueError,
            ("keep", "N="),
        ),
        BadCall(
            "rows_length", lambda a: {**a, "tensors": [x[1:] for x in a["tensors"]]}, ValueError, ("tensors[0]", "N=")
        ),
        BadCall("float_mask", lambda a: {**a, "keep": torch.ones(a["n_rows"])}, TypeError, ("keep", "float32", "bool")),
        BadCall("bound_negative", lambda a: {**a, "bound": -1}, ValueError, ("bound", "-1")),
        BadCall("fill_outside", lambda a: {**a, "tensors": [_bytes(a)], "fill": [-100]}, ValueError, ("fill", "-100")),
        *(
            BadCall(f"rows_{name}", _with("keep", rows, torch.int64), ValueError, ("keep",), values=True)
            for name, rows in (("negative", [-1, 2]), ("falling", [2, 1]), ("twice", [1, 1]), ("outside", [0, 400]))
        ),
        *(
            BadCall(f"ends_{name}", _with("cu_seqlens", ends, torch.int32), ValueError, ("cu_seqlens",), values=True)
            for name, ends in (("short", [0, 3]), ("fall", [0, 9, 5, 400]), ("begin", [1, 400]))
        ),
    ),
)

TOKEN_COMPACT_BACKWARD = Op(
    name="token_compact_backward",
    summary="gradient of token_compact: kept rows back to their places, zero elsewhere",
    schema="(Tensor grad, Tensor index, SymInt n_rows) -> Tensor",
    tensors=(
        TensorArg("grad", "B ...", (*FLOATS, torch.float64), "gradient of the kept rows"),
        TensorArg("index", "B", (torch.int64,), "where they came from; -1 is padding"),
    ),
    dtype_of="grad",
    sample=_sample_backward,
    cases=(
        Case("rows", {"N": 200, "row": (64,)}),
        Case("padded", {"N": 51, "row": (3, 5), "pad": 7}, frozenset({"odd"})),
        Case("tiny", {"N": 1, "row": ()}, frozenset({"tiny"})),
        Case("empty", {"N": 0, "row": (8,)}, frozenset({"empty"})),
    ),
    perf_cases=(Case("n10368_1152", {"N": 10368, "row": (1152,)}, frozenset({"perf"})),),
    gpu_cases=at_tokens(lambda n: {"N": n // 4, "row": (1152,)}),
    cost=_cost,
    reduction=lambda a: 1,
    exact=lambda a: True,
    backends={
        "reference": "reference:token_compact_backward",
        "cpu": "native:token_compact_backward",
        "triton": "triton_kernels:token_compact_backward",
        "cuda": "native:token_compact_backward",
    },
    check=_check_backward,
    bad_calls=(
        BadCall("index_short", lambda a: {**a, "index": a["index"][1:]}, ValueError, ("index", "B=")),
        *(
            BadCall(f"index_{n}", _with("index", [n, 0], torch.int64), ValueError, (f"{n}",), values=True)
            for n in (-2, 200)
        ),
        BadCall("index_i32", lambda a: {**a, "index": a["index"].int()}, TypeError, ("index", "int32", "int64")),
    ),
)

SPECS = (TOKEN_COMPACT, TOKEN_COMPACT_BACKWARD)
