"""Attention on the CPU beyond the cases of every backend: logits for which the shortcut of its exponentials must not be
taken or must not show, and heads enough for the backward's single pass."""

from __future__ import annotations

import pytest
import torch

from hulukern import OPS, rope_attention
from hulukern.ops.rope_attention.reference import rope_attention as reference
from hulukern.spec import Case
from hulukern.testing import harness

DTYPES = (torch.bfloat16, torch.float32)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = "cpu") -> torch.Tensor:
    n = q.shape[0]
    return rope_attention(
        q, k, v, torch.zeros(n, 2, dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32), backend=backend
    )


def qkv(n: int, dtype: torch.dtype, spread: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 72, generator=g).mul(s).to(dtype) for s in (spread, spread, 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0, 1e3, 1e15])
@pytest.mark.parametrize("n", [1, 3, 255, 257, 520])
def test_logits_of_any_size(n: int, spread: float, dtype: torch.dtype) -> None:
    """Up to 1e30: from a few thousand on softmax is a choice, made by the same products."""
    q, k, v = qkv(n, dtype, spread)
    got, expected = attention(q, k, v).float(), attention(q, k, v, "reference").float()
    close = (got - expected).abs().amax(-1) <= (0.02 if dtype == torch.bfloat16 or spread > 3 else 1e-4)
    # Where two keys are nearly as large, rounding chooses between them.
    assert close.float().mean() > (0.97 if spread > 10 else 0.999999)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_where_it_is_seen(value: float, dtype: torch.dtype) -> None:
    q, k, v = qkv(300, dtype)
    bad = q.clone()
    bad[70, 1, 5] = value
    got, clean = attention(bad, k, v), attention(q, k, v)
    assert got[70, 1].isnan().all()
    got[70, 1] = clean[70, 1]
    torch.testing.assert_close(got, clean, rtol=0.02, atol=0.02)
    bad = k.clone()
    bad[290, 0, 7] = float("nan")
    got = attention(q, bad, v)
    assert got[:, 0].isnan().all()
    assert torch.equal(got[:, 1], clean[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_weigh_alike_and_far_ones_not_at_all(dtype: torch.dtype) -> None:
    q, k, v = qkv(129, dtype)
    k[:] = 0
    mean = v.float().mean(0).expand_as(v)
    torch.testing.assert_close(attention(q, k, v).float(), mean, rtol=0, atol=2e-3)
    q[:], k[5] = 16.0, 16.0  # a logit of 72 * 256 / sqrt(72) above the others
    torch.testing.assert_close(attention(q, k, v).float(), v[5].float().expand_as(v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-45, 1e29, 1e31, 3e37])
def test_scales_of_any_size(scale: float, dtype: torch.dtype) -> None:
    q, k, v = qkv(64, dtype)
    q[:] = 0
    positions, ends = torch.zeros(64, 2, dtype=torch.int32), torch.tensor([0, 64], dtype=torch.int32)
    got = rope_attention(q, k, v, positions, ends, scale=scale, backend="cpu")
    torch.testing.assert_close(got.float(), v.float().mean(0).expand_as(v), rtol=0, atol=2e-3)


def test_even_and_odd_keys_weigh_alike() -> None:
    q, k, v = qkv(4096, torch.bfloat16)
    v[::2], v[1::2] = 1.0, -1.0
    got, exact = attention(q, k, v).double(), attention(q.float(), k.float(), v.float(), "reference").double()
    assert abs(float((got - exact).mean())) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 32])
@pytest.mark.parametrize("spread", [10.0, 1e3, 1e5])
def test_gradients_of_large_logits_are_bounded(spread: float, heads: int, dtype: torch.dtype) -> None:
    """The rounding of their log-sum-exp is all that tells the weights: more than 1 none may be."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(64, heads, 72, generator=g).mul(s).to(dtype) for s in (spread, spread, 1.0, 1.0))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention(*leaves).backward(grad)
    most = float(grad.float().abs().sum(0).max())
    assert v.grad.float().abs().max() <= most
    slope = 2 * most * float(v.detach().float().abs().sum(-1).max()) * 72**-0.5
    for x, other in ((q, k), (k, q)):
        assert x.grad.float().abs().max() <= 64 * slope * float(other.detach().float().abs().max())


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_lse_of_bf16(spread: float) -> None:
    q, k, v = qkv(257, torch.bfloat16, spread)
    positions, ends = torch.zeros(257, 2, dtype=torch.int32), torch.tensor([0, 257], dtype=torch.int32)
    arguments = (q, k, v, positions, positions, ends, ends, [18, 18], 10000.0, 72**-0.5)
    got, expected = torch.ops.hulukern.rope_attention(*arguments, "cpu")[1], reference(*arguments)[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-3)


MANY_HEADS = (
    Case("ragged", {"lengths_q": (3, 2, 35), "lengths": (34, 0, 5), "A": 11, "D": 72}),
    Case("square", {"lengths": (70, 129), "A": 16, "D": 64}),
    Case("short", {"lengths": (1, 2, 3, 0, 4, 1, 1, 2), "A": 5, "D": 80}),
    Case("thw", {"lengths": (40,), "A": 32, "D": 96, "sections": [16, 16, 16]}),
)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("case", MANY_HEADS, ids=lambda c: c.name)
def test_gradients_of_many_heads(case: Case, dtype: torch.dtype, layout: str, seed: int) -> None:
    backward = OPS["rope_attention_backward"].spec
    harness.check_forward(backward, case, dtype, "cpu", "cpu", layout, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 32])
@pytest.mark.parametrize("n", [33, 40])
@pytest.mark.parametrize("size", [27.5, 28.0, 28.5, 32.0])
def test_gradients_where_all_logits_are_very_negative(size: float, n: int, heads: int, dtype: torch.dtype) -> None:
    """What the lanes beyond the last key hold is then infinite, and must not reach the gradients of queries."""
    g = torch.Generator().manual_seed(n)
    q, k, v, grad = (torch.randn(n, heads, 72, generator=g).to(dtype) for _ in range(4))
    q[..., 0], k[..., 0] = -size, size  # -89 to -121 in every logit; its own gradients are what rounding leaves
    found = []
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attention(*leaves, backend=backend).backward(grad)
        found.append([x.grad[..., 1:].float() for x in leaves])
    for got, expected in zip(*found, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_show_in_the_gradients_of_many_heads(dtype: torch.dtype) -> None:
    op = OPS["rope_attention_backward"].spec
    a = harness.sample(op, MANY_HEADS[1], dtype, "cpu")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            found.append(harness.call(op, a, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
