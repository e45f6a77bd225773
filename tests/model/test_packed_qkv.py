"""The encoder's packed q, k and v projection follows its parameters."""

from __future__ import annotations

import torch

from model.config import HuluMedVisionConfig
from model.vision import HuluMedVisionModel


def test_packed_weights_follow_what_is_written_to_the_parameters() -> None:
    torch.manual_seed(0)
    config = HuluMedVisionConfig(
        hidden_size=144, intermediate_size=200, num_attention_heads=2, num_hidden_layers=2
    )  # fmt: skip
    model = HuluMedVisionModel(config, backend="cpu").eval()
    keys = list(model.state_dict())
    pixels, grid = torch.rand(2 * 64, 588), [[2, 8, 8]]
    keep = torch.rand(32) < 0.5
    attention = model.encoder.layers[1].self_attn

    def same() -> None:
        with torch.no_grad():
            packed, chosen = model(pixels, grid, [2]), model(pixels, grid, [2], keep)
        separate = model(pixels, grid, [2])  # gradients are recorded: three products
        torch.testing.assert_close(packed, separate.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chosen, packed[keep], rtol=1e-4, atol=1e-5)

    same()
    first = attention.packed_qkv()[0]
    assert attention.packed_qkv()[0] is first
    with torch.no_grad():
        attention.k_proj.weight.mul_(1.5)
    same()
    attention.v_proj.weight = torch.nn.Parameter(torch.randn(144, 144) / 12)
    same()
    attention.q_proj.bias.data = torch.randn(144)
    same()
    assert attention.packed_qkv()[0] is not first
    assert list(model.state_dict()) == keys
