"""patch_embed in plain torch: what every backend must equal."""

from __future__ import annotations

import torch

from hulukern.ops.common import divided


def normalize(values: torch.Tensor, mean: list[float] | None, std: list[float] | None) -> torch.Tensor:
    """0..1 ``[..., C]`` -> (value - mean) / std per channel, or 0..255 without mean and std. fp32 or wider."""
    if mean is None or std is None:
        return values * 255
    m, s = (torch.tensor(x, dtype=values.dtype, device=values.device) for x in (mean, std))
    return (values - m) / s


def patch_embed_normalize(
    patches: torch.Tensor,  # [N, L] u8
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # [N, L] dtype
    if mean is None:
        return patches.to(dtype)
    planes = patches.unflatten(1, (channels, patches.shape[1] // channels))
    unit = divided(planes.to(torch.promote_types(dtype, torch.float32)), 255)
    return normalize(unit.movedim(1, -1), mean, std).movedim(-1, 1).reshape(patches.shape).to(dtype)


def patch_embed_cut(
    frames: torch.Tensor,  # [T, H, W, C] u8 or i16
    patch_size: int,
    merge_size: int,
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
    window: list[int],
    dtype: torch.dtype,
    with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # [N, channels P P] dtype, [cells] f32
    from hulukern.ops.token_score.reference import token_score_frames

    T, H, W, _ = frames.shape
    P, M = patch_size, merge_size
    wide = torch.promote_types(dtype, torch.float32)
    if frames.dtype == torch.uint8:
        unit = divided(frames.to(wide), 255)
    else:
        lo, hi = window
        unit = divided((frames.int().clamp(lo, hi) - lo).to(wide), hi - lo)
    if mean is None and frames.dtype == torch.uint8:
        values = frames.to(wide)  # 0..255 as they are, not u / 255 * 255
    else:
        values = normalize(unit.expand(-1, -1, -1, channels), mean, std)
    values = values.expand(-1, -1, -1, channels).reshape(T, H // (P * M), M, P, W // (P * M), M, P, channels)
    patches = values.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, channels * P * P).to(dtype)
    if not with_scores:
        return patches, patches.new_empty(0, dtype=torch.float32)
    return patches, token_score_frames(frames, P, M, window, "previous", 0.0)


def patch_embed(
    patches: torch.Tensor,  # [N, L] u8, or normalised floats
    weight: torch.Tensor,  # [E, L]
    bias: torch.Tensor | None,  # [E]
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
) -> torch.Tensor:  # [N, E] weight.dtype
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = patches.to(wide)
    if patches.dtype == torch.uint8:
        x = patch_embed_normalize(patches, channels, mean, std, wide)
    embedding = x @ weight.to(wide).t()
    return (embedding if bias is None else embedding + bias.to(wide)).to(weight.dtype)


def patch_embed_frames(
    frames: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patch_size: int,
    merge_size: int,
    mean: list[float] | None,
    std: list[float] | None,
    window: list[int],
    with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # [N, E], [cells] f32
    channels = weight.shape[1] // patch_size**2
    wide = torch.promote_types(weight.dtype, torch.float32)
    patches, scores = patch_embed_cut(frames, patch_size, merge_size, channels, mean, std, window, wide, with_scores)
    return patch_embed(patches, weight, bias, channels, None, None), scores
