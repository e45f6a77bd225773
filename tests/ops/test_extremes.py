"""What no case of a spec has: values whose powers overflow, and nothing kept of something."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_ops import DEVICE, backends

import hulukern

FAR = (-3.3e38, -1e35, -1e20, -1e12, -60.0, -40.0, -12.0, 12.0, 40.0, 60.0, 1e12, 1e20, 1e35, 3.3e38)


def native(name: str) -> list[str]:
    return [b for b in backends(hulukern.OPS[name].spec) if b != "reference"]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", native("bias_gelu"))
def test_gelu_far_from_zero(backend: str, dtype: torch.dtype, approximate: str) -> None:
    x = torch.tensor([*FAR, float("inf"), float("nan")], device=DEVICE).to(dtype)[None].requires_grad_()
    y = hulukern.bias_gelu(x, None, approximate=approximate, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double()
    assert torch.allclose(y[:, :-1].double(), F.relu(wide)[:, :-1], rtol=1e-6, atol=1e-6)
    assert torch.allclose(slope[:, :-2].double(), (wide > 0).double()[:, :-2], rtol=0, atol=1e-6)
    assert y[0, -1].isnan()
    assert slope[0, -1].isnan()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", native("spatial_merge_backward"))
def test_gradients_where_no_cell_is_kept(backend: str, norm: bool) -> None:
    dirty = [torch.full((16, 64), 7.0, device=DEVICE) for _ in range(20)]
    x = torch.randn(16, 64, device=DEVICE, requires_grad=True)
    weights = [torch.randn(64, device=DEVICE, requires_grad=True) for _ in range(2)] if norm else [None, None]
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    y = hulukern.spatial_merge(x, *weights, keep=none, backend=backend)
    assert y.shape == (0, 64)
    del dirty
    y.sum().backward()
    for leaf in (x, *weights):
        assert leaf is None or (leaf.grad is not None and not leaf.grad.any())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800000], ids=hex)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", native("rope_attention"))
def test_attention_to_no_number_is_none(backend: str, dtype: torch.dtype, bits: int) -> None:
    """Whatever a NaN carries (0x7fffffff is a GPU's own), and in no other sequence."""
    if dtype in hulukern.OPS["rope_attention"].spec.uninterpreted and backend == "triton" and DEVICE == "cpu":
        pytest.skip("rope_attention: " + hulukern.OPS["rope_attention"].spec.uninterpreted[dtype])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, 64, generator=generator).to(DEVICE, dtype) for _ in range(3))
    k[1, 0, 0] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    positions = torch.zeros(9, 2, dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    out = hulukern.rope_attention(q, k, v, positions, ends, sections=(16, 16), backend=backend)
    assert out[:5, 0].isnan().all()
    assert out[:5, 1].isfinite().all()
    assert out[5:].isfinite().all()
