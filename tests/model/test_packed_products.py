"""The encoder's packed products follow their parameters, and stand aside for whoever wants the layers called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model.product
from model.config import HuluMedVisionConfig
from model.product import PackedProduct, may_pack
from model.vision import HuluMedVisionModel

PIXELS, GRID = torch.rand(2 * 64, 588, generator=torch.Generator().manual_seed(0)), [[2, 8, 8]]
KEEP = torch.rand(32, generator=torch.Generator().manual_seed(1)) < 0.5


def tiny(dtype: torch.dtype = torch.float32) -> HuluMedVisionModel:
    torch.manual_seed(0)
    config = HuluMedVisionConfig(
        hidden_size=144, intermediate_size=200, num_attention_heads=2, num_hidden_layers=2
    )  # fmt: skip
    return HuluMedVisionModel(config, backend="cpu").to(dtype).eval()


def check(model: HuluMedVisionModel) -> None:
    dtype = model.dtype
    with torch.no_grad():
        packed, chosen = model(PIXELS.to(dtype), GRID, [2]), model(PIXELS.to(dtype), GRID, [2], KEEP)
    separate = model(PIXELS.to(dtype), GRID, [2]).detach()  # gradients are recorded: every layer is called
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(packed, separate, **tolerance)
    torch.testing.assert_close(chosen, packed[KEEP], **tolerance)


@pytest.mark.parametrize("own_layout", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_follow_what_is_written_to_the_parameters(
    dtype: torch.dtype, own_layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own_layout:
        monkeypatch.setattr(model.product, "_has_own_layout", lambda x: False)
    encoder = tiny(dtype)
    keys = list(encoder.state_dict())
    check(encoder)
    for layer in encoder.encoder.layers:
        for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
            with torch.no_grad():
                linear.weight.mul_(1.5)
            check(encoder)
            linear.weight = nn.Parameter(torch.randn_like(linear.weight) / 12)
            check(encoder)
            linear.bias.data = torch.randn_like(linear.bias)
            check(encoder)
    assert list(encoder.state_dict()) == keys
    check(copy.deepcopy(encoder))
    check(pickle.loads(pickle.dumps(encoder)))
    check(encoder.to(torch.float32))


def test_writes_that_count_no_version_are_seen() -> None:
    """As weights averaged over steps are swapped in, and adapters merged."""
    encoder = tiny()
    check(encoder)
    for layer in encoder.encoder.layers:
        for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
            linear.weight.data += 0.1
            check(encoder)
            linear.weight.data[3] += 1.0  # a row
            check(encoder)
            linear.weight.data[:, 7] += 1.0  # a column
            check(encoder)
            linear.bias.data[5] += 1.0
            check(encoder)


def made_of(product: PackedProduct, *layers: nn.Linear) -> object:
    assert product(torch.randn(3, 8), *layers) is not None
    return product._made


own_layout = pytest.mark.skipif(
    not model.product._has_own_layout(PIXELS), reason="torch has no oneDNN here, so nothing is packed"
)


@own_layout
def test_weights_are_packed_once_and_let_go() -> None:
    linear, product = nn.Linear(8, 4).eval(), PackedProduct()
    with torch.no_grad():
        first = made_of(product, linear)
        assert made_of(product, linear) is first
        linear.weight.add_(1)
        assert made_of(product, linear) is not first
    assert product(torch.randn(3, 8), linear) is None  # gradients are recorded
    assert product._made is None


@own_layout
def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        a, b, product, x = nn.Linear(8, 4).eval(), nn.Linear(8, 4).eval(), PackedProduct(), torch.randn(3, 8)
        product(x, a, b)
        a.weight.mul_(2)
        torch.testing.assert_close(product(x, a, b), torch.cat([a(x), b(x)], 1))


def test_flops_are_counted() -> None:
    encoder, counted = tiny(), []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            encoder(PIXELS, GRID, [2])
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def addition(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return x[:, :1] * torch.linspace(-1, 1, linear.out_features)


class Adapter(nn.Module):
    """As LoRA puts it in a layer's place: the layer's parameters still to be seen, and something on top."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + addition(x, self.layer)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
def test_adapters_hooks_and_forwards_are_called(name: str, grad: bool) -> None:
    encoder = tiny()
    layer = encoder.encoder.layers[0]
    holder = layer.mlp if name.startswith("fc") else layer.self_attn
    linear = getattr(holder, name)
    with torch.set_grad_enabled(grad):
        before = encoder(PIXELS, GRID, [2])
        found = []
        hook = linear.register_forward_hook(lambda module, args, out: out + addition(args[0], module))
        found.append(encoder(PIXELS, GRID, [2]))
        hook.remove()
        linear.forward = lambda x: nn.Linear.forward(linear, x) + addition(x, linear)
        found.append(encoder(PIXELS, GRID, [2]))
        del linear.forward
        setattr(holder, name, Adapter(linear))
        found.append(encoder(PIXELS, GRID, [2]))
    assert not torch.allclose(before, found[0], atol=1e-3)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


class Wrapped(torch.Tensor):
    """As quantised or sharded weights are: a linear layer's, but no plain tensor."""


def test_what_may_be_packed() -> None:
    linear, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    assert not may_pack(x, linear)  # gradients are recorded
    with torch.no_grad():
        assert may_pack(x, linear)
        assert not may_pack(x.bfloat16(), linear)
        assert not may_pack(x, linear, Adapter(linear))
        assert not may_pack(x, nn.Linear(8, 4))  # in training, which reentrant checkpointing does without gradients
        assert not may_pack(x, nn.Linear(8, 4, bias=False).eval())
        wrapped = nn.Linear(8, 4).eval()
        wrapped.weight = nn.Parameter(torch.randn(4, 8).as_subclass(Wrapped))
        assert not may_pack(x, wrapped)
        with torch.autocast("cpu", torch.bfloat16):
            assert not may_pack(x, linear)
        hook = nn.modules.module.register_module_forward_hook(lambda *a: None)
        assert not may_pack(x, linear)
        hook.remove()
        hook = linear.register_full_backward_hook(lambda *a: None)
        assert not may_pack(x, linear)
        hook.remove()
        assert may_pack(x, linear)
