"""Every op, every backend, every case of its spec, through the one harness."""

from __future__ import annotations

import os

import pytest
import torch
import torch.utils._pytree as pytree

import hulukern
from hulukern.backends import BackendUnavailable, runs_on, unavailable
from hulukern.spec import Case, Op
from hulukern.testing import harness
from hulukern.testing.buffers import LAYOUTS

DEVICE = os.environ.get("HULUKERN_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPECS = [registered.spec for registered in hulukern.OPS.values()]


def backends(op: Op) -> list[str]:
    """What can run here, the reference included: it must survive its own harness."""
    return [b for b in op.backends if runs_on(b, DEVICE) and not unavailable(b)]


def grid(*, layouts: tuple[str, ...] = ("contiguous",), grads: bool = False) -> list[object]:
    """One parameter set per op, backend, case, dtype and layout."""
    found = []
    for op in SPECS:
        for backend in backends(op):
            for case in op.cases:
                for dtype in op.dtypes:
                    if grads and not harness.differentiable(op, harness.sample(op, case, dtype, "cpu")):
                        continue
                    reason = op.uninterpreted.get(dtype) if backend == "triton" and INTERPRETED else None
                    marks = [pytest.mark.skip(reason=f"{op.name}: {reason}")] if reason else []
                    for layout in layouts:
                        name = "-".join([op.name, backend, case.name, str(dtype).removeprefix("torch."), layout])
                        found.append(pytest.param(op, backend, case, dtype, layout, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("op", "backend", "case", "dtype", "layout"), grid(layouts=LAYOUTS))
def test_forward(op: Op, backend: str, case: Case, dtype: torch.dtype, layout: str) -> None:
    harness.check_forward(op, case, dtype, backend, DEVICE, layout)


@pytest.mark.parametrize(
    ("op", "backend", "case", "dtype", "layout"), grid(layouts=("contiguous", "strided"), grads=True)
)
def test_backward(op: Op, backend: str, case: Case, dtype: torch.dtype, layout: str) -> None:
    harness.check_backward(op, case, dtype, backend, DEVICE, layout)


def first_and_tagged(op: Op, backend: str) -> list[Case]:
    """torch's own checks look at form, not at numbers: the first case and the awkward ones will do, and of the latter
    only the empty ones where a kernel is interpreted or simulated, a thousand times as slowly."""
    slow = DEVICE == "cpu" and backend in ("triton", "cuda")
    return [c for i, c in enumerate(op.cases) if i == 0 or c.tags & ({"empty"} if slow else {"ragged", "empty"})]


FORM = [
    pytest.param(op, backend, case, id=f"{op.name}-{backend}-{case.name}")
    for op in SPECS
    for backend in backends(op)
    for case in first_and_tagged(op, backend)
]


@pytest.mark.parametrize(("op", "backend", "case"), FORM)
def test_opcheck(op: Op, backend: str, case: Case) -> None:
    harness.check_opcheck(op, case, op.dtypes[0], backend, DEVICE)


@pytest.mark.parametrize(("op", "backend", "case"), FORM)
def test_compile(op: Op, backend: str, case: Case) -> None:
    harness.check_compile(op, case, op.dtypes[0], backend, DEVICE, "aot_eager")


@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.name)
def test_every_op_has_the_awkward_cases(op: Op) -> None:
    tags = frozenset().union(*(case.tags for case in op.cases))
    assert {"odd", "tiny", "empty"} <= tags
    assert op.perf_cases, f"{op.name} has nothing to be timed on"


BAD = [
    pytest.param(op, bad, backend, id=f"{op.name}-{bad.name}-{backend}")
    for op in SPECS
    for bad in op.bad_calls
    for backend in backends(op)
    if DEVICE == "cpu" or not bad.values
]


@pytest.mark.parametrize(("op", "bad", "backend"), BAD)
def test_bad_call(op: Op, bad, backend: str) -> None:  # type: ignore[no-untyped-def]
    arguments = bad.change(harness.sample(op, op.cases[0], op.dtypes[0], "cpu"))
    arguments = pytree.tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), arguments)
    with pytest.raises(bad.error) as caught:
        harness.call(op, arguments, backend)
    for text in (op.name, *bad.says):
        assert text in str(caught.value), f"{text!r} is not in {caught.value}"


TENSORS = [pytest.param(op, t, id=f"{op.name}-{t.name}") for op in SPECS for t in op.tensors]


@pytest.mark.parametrize(("op", "tensor"), TENSORS)
def test_wrong_dtype_shape_and_device_name_the_argument(op: Op, tensor) -> None:  # type: ignore[no-untyped-def]
    """What every tensor argument of every op refuses, whatever its spec's own bad calls say."""
    arguments = harness.sample(op, op.cases[0], op.dtypes[0], "cpu")
    if arguments[tensor.name] is None:
        arguments[tensor.name] = torch.zeros([2] * len(tensor.shape.split()), dtype=tensor.dtypes[0])

    def changed(change):  # type: ignore[no-untyped-def]
        value = arguments[tensor.name]
        return {**arguments, tensor.name: [change(x) for x in value] if tensor.many else change(value)}

    with pytest.raises(TypeError, match=rf"{op.name}: {tensor.name}.*complex64, expected"):
        harness.call(op, changed(lambda x: x.to(torch.complex64)), "cpu")
    if not tensor.shape.endswith("..."):
        with pytest.raises(ValueError, match=rf"{op.name}: {tensor.name} has shape .*, expected \["):
            harness.call(op, changed(lambda x: x[None]), "cpu")
    if tensor is not op.tensors[0]:
        with pytest.raises(ValueError, match=rf"{op.name}: {tensor.name}.* has device meta, expected cpu"):
            harness.call(op, changed(lambda x: x.to("meta")), "cpu")


def test_backend_that_is_absent_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = hulukern.OPS["patch_embed_cut"]
    monkeypatch.delitem(registered.spec.backends, "triton")
    monkeypatch.setattr(registered, "implementations", {})
    monkeypatch.setattr(registered, "_resolved", {})
    frames = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
    with pytest.raises(BackendUnavailable, match="patch_embed_cut: backend 'triton' cannot run: "):
        hulukern.patch_embed_cut(frames, backend="triton")
    with pytest.raises(BackendUnavailable, match="expected one of reference, cpu, triton, cuda"):
        hulukern.patch_embed_cut(frames, backend="tritn")


def test_default_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from hulukern.backends import choose

    choose.cache_clear()
    with caplog.at_level("INFO", logger="hulukern"):
        for _ in range(3):
            hulukern.token_score_frames(torch.zeros(2, 28, 28, 3, dtype=torch.uint8))
    assert [r.getMessage() for r in caplog.records] == ["token_score_frames on cpu: backend cpu"]


def test_attention_in_triton_names_the_head_dims_that_it_has() -> None:
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    x = torch.zeros(3, 1, 48, device=DEVICE)
    positions, ends = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"rope_attention: q has D=48, expected one of 64, 72, 80, 96, 128 for"):
        hulukern.rope_attention(x, x, x, positions, ends.to(DEVICE), backend="triton")
