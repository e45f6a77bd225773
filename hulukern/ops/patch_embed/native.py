"""patch_embed through the C ABI: cutting and normalising in kernels, the product by torch (oneDNN, cuBLAS).

Patches pass in blocks of a few thousand rows through one scratch buffer that stays in the cache: the
embedding is all that reaches memory. Measured against cutting everything first (32x504x504, bf16,
E 1152, 2 cores): the same time within noise, and 2.4 MB of scratch instead of 49.

On CUDA a block is what half of a 50 MB L2 holds. The product stays with cuBLAS: at K = 588 it is 9 % of its time in
bytes, so a product of our own that reads pixels could win little and would have to match cuBLAS first. Rows of 588
16-bit values are no multiple of 16 bytes, which cuBLAS's fast kernels ask for: scratch and weight are padded
with zeros to 592 (1.4 MB copied per call).
"""

from __future__ import annotations

import torch

from hulukern import _C
from hulukern.ops.common import native_target, rows_dense

BLOCK_ROWS = 2048  # x 588 bf16 = 2.4 MB: the two cores' share of a last-level cache
BLOCK_ROWS_CUDA = 16384  # 19 MB


def patch_embed_resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 ``[T, H, W, C]`` to ``[T, height, width, C]``: Pillow's bicubic, bit for bit, on all threads."""
    frames = rows_dense(frames, 2)
    T, _, _, C = frames.shape
    out = torch.empty((T, height, width, C), dtype=torch.uint8)
    _C.patch_embed_resize(*native_target(frames), frames, out)
    return out


def patch_embed_normalize(
    patches: torch.Tensor, channels: int, mean: list[float] | None, std: list[float] | None, dtype: torch.dtype
) -> torch.Tensor:
    patches = rows_dense(patches, 1)
    out = torch.empty(patches.shape, dtype=dtype, device=patches.device)
    _C.patch_embed_normalize(*native_target(patches), patches, out, channels, mean, std)
    return out


def patch_embed_cut(
    frames: torch.Tensor,
    patch_size: int,
    merge_size: int,
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
    window: list[int],
    dtype: torch.dtype,
    with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    frames = rows_dense(frames, 2)
    T, H, W, _ = frames.shape
    n_patches = T * (H // patch_size) * (W // patch_size)
    cells = n_patches // merge_size**2 if with_scores else 0
    patches = torch.empty((n_patches, channels * patch_size**2), dtype=dtype, device=frames.device)
    scores = torch.empty(cells, dtype=torch.float32, device=frames.device)
    lo, hi = window or (0, 255)
    _C.patch_embed_cut(
        *native_target(frames), frames, None, patches, scores if with_scores else None,
        patch_size, merge_size, channels, lo, hi, mean, std,
    )  # fmt: skip
    return patches, scores


def patch_embed(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    channels: int,
    mean: list[float] | None,
    std: list[float] | None,
) -> torch.Tensor:
    out = torch.empty((patches.shape[0], weight.shape[0]), dtype=weight.dtype, device=weight.device)
    if patches.dtype != torch.uint8:
        return _project(patches.to(weight.dtype), weight, bias, out)
    patches = rows_dense(patches, 1)
    target = native_target(patches)
    step = BLOCK_ROWS_CUDA if target[0] else BLOCK_ROWS
    scratch, weight = _scratch(target[0], min(step, patches.shape[0]), weight)
    length = patches.shape[1]
    for start in range(0, patches.shape[0], step):
        block = patches[start : start + step]
        x = scratch[: block.shape[0]]
        _C.patch_embed_normalize(*target, block, x[:, :length], channels, mean, std)
        _project(x, weight, bias, out[start : start + step])
    return out


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
) -> tuple[torch.Tensor, torch.Tensor]:
    frames = rows_dense(frames, 2)
    T, H, W, _ = frames.shape
    per_frame = (H // patch_size) * (W // patch_size)
    channels = weight.shape[1] // patch_size**2
    cells = per_frame // merge_size**2
    out = torch.empty((T * per_frame, weight.shape[0]), dtype=weight.dtype, device=frames.device)
    scores = torch.empty(T * cells if with_scores else 0, dtype=torch.float32, device=frames.device)
    target = native_target(frames)
    length = weight.shape[1]
    step = max(1, (BLOCK_ROWS_CUDA if target[0] else BLOCK_ROWS) // max(per_frame, 1))  # frames a block
    scratch, weight = _scratch(target[0], min(step, T) * per_frame, weight)
    lo, hi = window or (0, 255)
    for t in range(0, T, step):
        block = frames[t : t + step]
        x = scratch[: block.shape[0] * per_frame]
        _C.patch_embed_cut(
            *target, block, frames[t - 1] if t else None, x[:, :length],
            scores[t * cells : (t + block.shape[0]) * cells] if with_scores else None,
            patch_size, merge_size, channels, lo, hi, mean, std,
        )  # fmt: skip
        _project(x, weight, bias, out[t * per_frame : (t + block.shape[0]) * per_frame])
    return out, scores


def _scratch(on_cuda: bool, rows: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for normalised rows, and the weight to multiply them with; on CUDA padded to multiples of 16 bytes."""
    length = weight.shape[1]
    pad = -length % (16 // weight.element_size()) if on_cuda else 0
    scratch = torch.empty((rows, length + pad), dtype=weight.dtype, device=weight.device)
    if pad:
        scratch[:, length:] = 0
        weight = torch.nn.functional.pad(weight, (0, pad))
    return scratch, weight


def _project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
