"""Models to measure, of random weights: the vision encoder beside its peer, transformers' port, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model.config import HuluMedQwen2Config, HuluMedQwen3Config, HuluMedVisionConfig
from model.modeling import HuluMedForConditionalGeneration
from model.vision import HuluMedVisionModel

REAL = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
PATCH = 3 * 14 * 14
IMAGE_TOKEN = 7
# Hulu-Med-7B's, which is Qwen2.5-7B's.
DECODER_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip


def encoders(layers: int, device: str = "cpu", sizes: Mapping[str, int] = REAL) -> tuple[HuluMedVisionModel, Any]:
    """Ours and transformers' in bf16."""
    from transformers.models.video_llama_3.configuration_video_llama_3 import VideoLlama3VisionConfig
    from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionModel

    torch.manual_seed(0)
    config = VideoLlama3VisionConfig(patch_size=14, num_hidden_layers=layers, **sizes)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        theirs = VideoLlama3VisionModel(config).eval()
        ours = HuluMedVisionModel(HuluMedVisionConfig(num_hidden_layers=layers, **sizes), backend=device)
    # Initial weights make all logits alike: attention would be a mean, whatever the rotary. Sharper than this, and what
    # bf16 rounds would grow over 27 layers.
    with torch.no_grad():
        for layer in theirs.encoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight *= 2 * (1152 / sizes["hidden_size"]) ** 0.5
    frequencies = theirs.rotary_pos_emb.inv_freq.clone()
    theirs = theirs.to(torch.bfloat16)
    theirs.rotary_pos_emb.inv_freq = frequencies  # as from_pretrained leaves them
    ours = ours.to(torch.bfloat16).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def decoder_shape(text: str) -> dict[str, int]:
    """``7b``, or WIDTHxLAYERS of a smaller one with heads of 128. Raises ValueError."""
    if text.lower() == "7b":
        return dict(DECODER_7B)
    try:
        width, layers = (int(x) for x in text.split("x"))
    except ValueError:
        width = layers = 0
    if width < 128 or width % 128 or layers < 1:
        raise ValueError(f"--decoder: has {text!r}, expected 7b or WIDTHxLAYERS with a width divisible by 128")
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 128, "num_key_value_heads": max(width // 512, 1), "vocab_size": 1024,
    }  # fmt: skip


def whole(
    encoder: Mapping[str, int], decoder: Mapping[str, int], dtype: torch.dtype, device: str
) -> HuluMedForConditionalGeneration:
    """Encoder, projector and decoder, made where and as they are used: 7 B weights in fp32 are too many."""
    kind = HuluMedQwen2Config if decoder == DECODER_7B else HuluMedQwen3Config
    more = {} if kind is HuluMedQwen2Config else {"head_dim": 128}
    config = kind(**decoder, **more, image_token_index=IMAGE_TOKEN, vision_encoder_config=dict(encoder))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return HuluMedForConditionalGeneration(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def patches(frames: int, side: int = 32, device: str = "cpu") -> torch.Tensor:
    """Normalised patches of frames of side x side."""
    return torch.rand(frames * side**2, PATCH, device=device).mul(2).sub(1).to(torch.bfloat16)


def flops(layers: int, frames: int, side: int, sizes: Mapping[str, int] = REAL) -> int:
    """Of one forward, useful ones only: products, each a multiplication and an addition."""
    n, E, inner = side**2, sizes["hidden_size"], sizes["intermediate_size"]
    layer = 2 * n * (4 * E**2 + 2 * E * inner) + 4 * n**2 * E
    return frames * (layers * layer + 2 * n * PATCH * E)
