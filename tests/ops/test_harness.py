"""The harness itself: it accepts the reference and rejects every wrong kernel."""

from __future__ import annotations

import pytest
import torch
import wrong_kernels
from torch.utils._python_dispatch import TorchDispatchMode

import hulukern
from hulukern.pruning import prune_frames
from hulukern.spec import Op
from hulukern.testing import harness
from hulukern.testing.buffers import LAYOUTS, lay_out, poisoned_buffers

SPECS = {name: registered.spec for name, registered in hulukern.OPS.items()}


class NoHostDivisors(TorchDispatchMode):
    """A GPU multiplies by the reciprocal of a number that the host holds: what is exact must not divide by one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and args[0].is_floating_point():
            assert isinstance(args[1], torch.Tensor), f"divides by the host's {args[1]}"
        return function(*args, **(kwargs or {}))


WRONG = [
    pytest.param(op, kernel, id=f"{name}-{kernel.__name__}")
    for name, op in SPECS.items()
    for kernel in wrong_kernels.BY_OP[name]
] + [
    pytest.param(op, wrap, id=f"{name}-{wrap.__name__}")
    for name, op in SPECS.items()
    for wrap in wrong_kernels.FOR_ANY_OP
]


def rejected(op: Op, backend: str) -> str:
    """What the first forward check to reject the backend says; empty if all accept it."""
    for case in op.cases:
        for dtype in op.dtypes:
            for layout in LAYOUTS:
                for seed in (0, 1):
                    try:
                        harness.check_forward(op, case, dtype, backend, "cpu", layout, seed)
                    except AssertionError as verdict:
                        return str(verdict)
    return ""


@pytest.mark.parametrize(("op", "kernel"), WRONG)
def test_wrong_kernel_is_rejected(op: Op, kernel: wrong_kernels.Kernel) -> None:
    if kernel in wrong_kernels.FOR_ANY_OP:
        kernel = kernel(hulukern.OPS[op.name].backend("reference", "cpu"))
    with harness.implementation(op, "wrong", kernel) as backend:
        assert rejected(op, backend), "every check accepted it"


@pytest.mark.parametrize("op", SPECS.values(), ids=lambda op: op.name)
def test_the_reference_under_another_name_is_accepted(op: Op) -> None:
    """So that a rejection means the kernel and not the harness."""
    with harness.implementation(op, "right", hulukern.OPS[op.name].backend("reference", "cpu")) as backend:
        assert not rejected(op, backend)


WRONG_GRADIENTS = {
    "weight_scaled": lambda gw, gb: (gw * 1.01, gb),
    "weight_rows_swapped": lambda gw, gb: (gw.flip(0), gb),
    "bias_of_one_row": lambda gw, gb: (gw, None if gb is None else gb * 0.5),
    "weight_missing": lambda gw, gb: (None, gb),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_wrong_gradient_is_rejected(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hulukern.ops import patch_embed  # the function shadows its module

    module = __import__("sys").modules[patch_embed.__module__]
    right = module._gradients
    monkeypatch.setattr(module, "_gradients", lambda *a: WRONG_GRADIENTS[wrong](*right(*a)))
    for name in ("patch_embed", "patch_embed_frames"):
        with pytest.raises((AssertionError, RuntimeError)):
            harness.check_backward(SPECS[name], SPECS[name].cases[0], torch.float32, "cpu", "cpu")


def test_poison_reaches_every_dtype_and_guards_are_checked() -> None:
    with poisoned_buffers():
        assert torch.empty(3, 4).isnan().all()
        assert torch.empty((2,), dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(5, dtype=torch.int64) != 0).all()

    def write_before_the_buffer() -> None:
        with poisoned_buffers():
            x = torch.empty(7)
            torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).zero_()

    with pytest.raises(AssertionError, match="wrote outside"):
        write_before_the_buffer()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 4)])
def test_layouts_keep_values(layout: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = lay_out(x, layout)
    assert torch.equal(x, y)
    if layout == "strided" and x.numel() > 1:
        assert not y.is_contiguous()


@pytest.mark.parametrize("op", SPECS.values(), ids=lambda op: op.name)
def test_exact_references_round_as_on_a_gpu(op: Op) -> None:
    for case in op.cases:
        for dtype in op.dtypes:
            arguments = harness.sample(op, case, dtype, "cpu")
            if op.exact(arguments):
                with NoHostDivisors():
                    harness.reference(op, arguments)


@pytest.mark.parametrize("rule", ["released", "videollama3"])
def test_bit_exact_rules_round_as_on_a_gpu(rule: str) -> None:
    frames = torch.randint(100, 127, (4, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = prune_frames(frames, rule=rule, backend="reference").scores
    threshold = float(scores[1].max()) / 127.5  # next to a score: their rounding decides
    with NoHostDivisors():
        prune_frames(frames, rule=rule, threshold=threshold, backend="reference")


def test_a_division_by_a_number_is_found() -> None:
    with pytest.raises(AssertionError, match="the host's 255"), NoHostDivisors():
        torch.ones(3) / 255
