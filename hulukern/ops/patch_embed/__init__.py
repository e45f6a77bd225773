"""patch_embed: pixels to embeddings. A GEMM on patches that need not exist in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hulukern.backends import without_autocast
from hulukern.ops.common import listed, per_channel, whole
from hulukern.ops.patch_embed.spec import PATCH_EMBED, PATCH_EMBED_CUT, PATCH_EMBED_FRAMES, PATCH_EMBED_NORMALIZE
from hulukern.registry import register
from hulukern.validation import fail

HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std, which Hulu-Med uses


def _n_patches(frames: torch.Tensor, patch_size: int) -> int:
    return frames.shape[0] * (frames.shape[1] // patch_size) * (frames.shape[2] // patch_size)


def _fake_scores(frames: torch.Tensor, patch_size: int, merge_size: int, with_scores: bool) -> torch.Tensor:
    cells = _n_patches(frames, patch_size * merge_size) if with_scores else 0
    return frames.new_empty(cells, dtype=torch.float32)


def _fake_normalize(patches: torch.Tensor, channels: int, mean: Any, std: Any, dtype: torch.dtype) -> torch.Tensor:
    return patches.new_empty(patches.shape, dtype=dtype)


def _fake_cut(
    frames: torch.Tensor, patch_size: int, merge_size: int, channels: int, mean: Any, std: Any, window: list[int],
    dtype: torch.dtype, with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    patches = frames.new_empty((_n_patches(frames, patch_size), channels * patch_size**2), dtype=dtype)
    return patches, _fake_scores(frames, patch_size, merge_size, with_scores)


def _fake_embed(
    patches: torch.Tensor, weight: torch.Tensor, bias: Any, channels: int, mean: Any, std: Any
) -> torch.Tensor:
    return weight.new_empty((patches.shape[0], weight.shape[0]))


def _fake_frames(
    frames: torch.Tensor, weight: torch.Tensor, bias: Any, patch_size: int, merge_size: int, mean: Any, std: Any,
    window: list[int], with_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    embedding = weight.new_empty((_n_patches(frames, patch_size), weight.shape[0]))
    return embedding, _fake_scores(frames, patch_size, merge_size, with_scores)


_normalize_op = register(PATCH_EMBED_NORMALIZE, __name__, _fake_normalize)
_cut_op = register(PATCH_EMBED_CUT, __name__, _fake_cut)


def _gradients(
    ctx: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of weight and bias; x is what the weight was multiplied with."""
    grad_weight = (grad.t() @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def _setup_embed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    patches, weight, _bias, *ctx.options = inputs
    ctx.save_for_backward(patches, weight)


@without_autocast
def _backward_embed(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    patches, weight = ctx.saved_tensors
    channels, mean, std, backend = ctx.options
    x = patches.to(weight.dtype)
    if patches.dtype == torch.uint8:
        x = _normalize_op(patches, channels, mean, std, weight.dtype, backend)
    grad_patches = (grad @ weight).to(patches.dtype) if ctx.needs_input_grad[0] else None
    return grad_patches, *_gradients(ctx, grad, x, weight), None, None, None, None


def _setup_frames(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    frames, weight, _bias, *ctx.options = inputs
    ctx.save_for_backward(frames, weight)
    ctx.mark_non_differentiable(output[1])


@without_autocast
def _backward_frames(ctx: Any, grad: torch.Tensor, _grad_scores: Any) -> tuple[Any, ...]:
    frames, weight = ctx.saved_tensors
    patch_size, merge_size, mean, std, window, _, backend = ctx.options
    channels = weight.shape[1] // patch_size**2
    x, _ = _cut_op(frames, patch_size, merge_size, channels, mean, std, window, weight.dtype, False, backend)
    return None, *_gradients(ctx, grad, x, weight), None, None, None, None, None, None, None


_embed_op = register(PATCH_EMBED, __name__, _fake_embed, _backward_embed, _setup_embed)
_frames_op = register(PATCH_EMBED_FRAMES, __name__, _fake_frames, _backward_frames, _setup_frames)


def patch_embed(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Embed patches that are cut already: normalise, times weight, plus bias.

    Args:
        patches: ``[N, L]``, L = C·P·P in (channel, y, x) order. uint8 pixels, or float values that are
            normalised already (any float dtype; they are cast to the weight's).
        weight: ``[E, L]`` or a convolution's ``[E, C, P, P]``; float32, bfloat16 or float16.
        bias: ``[E]``, the weight's dtype.
        mean, std: per channel, in units of 0..1: uint8 pixels become (u8 / 255 - mean) / std in fp32,
            rounded to the weight's dtype. Without them uint8 pixels enter as 0..255, for weights that
            :func:`fold_normalization` has prepared. Not allowed with float patches. As many as a
            convolution's C; of ``[E, L]`` their number is C.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``; None chooses by device.

    Returns:
        ``[N, E]`` in the weight's dtype, accumulated in fp32. Differentiable in weight, bias and float
        patches.

    Raises:
        TypeError: wrong type or dtype. ValueError: shapes, std not above 0, mean without std.
        BackendUnavailable: the backend cannot run here.

    Source: Hulu-Med's ``embeddings.patch_embedding``, a Conv2d whose stride is its kernel.
    """
    op, rows = "patch_embed", _rows_of(weight)
    m, s = per_channel(op, "mean", mean), per_channel(op, "std", std)
    if m is not None and isinstance(patches, torch.Tensor) and patches.is_floating_point():
        fail(op, "mean", f"value {tuple(m)}", "None for float patches, which are normalised already")
    channels = 1 if m is None else _channels(m) if rows is weight else weight.shape[1]
    return _embed_op(patches, rows, bias, channels, m, s, backend or "")


def patch_embed_frames(
    frames: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    mean: Sequence[float] | None = HALF,
    std: Sequence[float] | None = HALF,
    window: tuple[int, int] | None = None,
    with_scores: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Embed one clip of whole frames: no patch and no float image is ever written.

    Args:
        frames: ``[T, H, W, C]`` uint8, or int16 with ``window``; H and W divisible by
            ``patch_size * merge_size``. C is the weight's channels, or 1 (gray) and then repeated.
        weight, bias, mean, std: as in :func:`patch_embed`.
        window: int16 only, (lo, hi) in the frames' own unit, which becomes 0..1.
        with_scores: also return the temporal scores of :func:`hulukern.token_score_frames` against the
            previous frame, from the same pass.

    Returns:
        ``[N, E]`` in merge-block order (t, h/M, w/M, M, M), or (that, ``[N / M**2]`` float32 scores).
        Differentiable in weight and bias.
    """
    op = "patch_embed_frames"
    embedding, scores = _frames_op(
        frames, _rows_of(weight), bias, patch_size, merge_size, per_channel(op, "mean", mean),
        per_channel(op, "std", std), _ints(op, window), with_scores, backend or "",
    )  # fmt: skip
    return (embedding, scores) if with_scores else embedding


def patch_embed_cut(
    frames: torch.Tensor,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    channels: int = 3,
    mean: Sequence[float] | None = HALF,
    std: Sequence[float] | None = HALF,
    window: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    with_scores: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The first half of :func:`patch_embed_frames`: frames to normalised patches.

    Returns:
        ``[N, channels·P·P]`` of ``dtype`` (float32, bfloat16 or float16) in merge-block order, bit-equal
        to normalising in fp32 and rounding; with ``with_scores`` also ``[N / M**2]`` float32 scores.
    """
    op = "patch_embed_cut"
    patches, scores = _cut_op(
        frames, patch_size, merge_size, channels, per_channel(op, "mean", mean), per_channel(op, "std", std),
        _ints(op, window), dtype, with_scores, backend or "",
    )  # fmt: skip
    return (patches, scores) if with_scores else patches


def patch_embed_normalize(
    patches: torch.Tensor,
    *,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> torch.Tensor:
    """Normalise cut uint8 patches ``[N, C·P·P]`` to ``dtype``: (u8 / 255 - mean) / std in fp32, rounded."""
    op = "patch_embed_normalize"
    m, s = _both(op, mean, std)
    return _normalize_op(patches, _channels(m), m, s, dtype, backend or "")


def fold_normalization(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that take raw pixels 0..255, which are exact even in bf16, in place of normalised ones.

    ``patch_embed(u8, *fold_normalization(w, b, mean, std))`` equals ``patch_embed(u8, w, b, mean=mean,
    std=std)`` up to rounding: in bf16 the weight is rounded after the fold instead of the pixel before
    the product, and the bias, which takes up the means, loses some digits; keep it in fp32 where the
    caller can. Differentiable.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    means, stds = _both("fold_normalization", mean, std)
    rows, channels = weight.flatten(1), len(means) if weight.dim() == 2 else weight.shape[1]
    for name, values in (("mean", means), ("std", stds)):
        if not channels or len(values) != channels or rows.shape[1] % channels:
            fail("fold_normalization", name, f"{len(values)} values", f"one per channel of weight {list(weight.shape)}")
    planes = rows.to(wide).unflatten(1, (channels, rows.shape[1] // channels))  # [E, C, P*P]
    m = torch.tensor(means, dtype=wide, device=weight.device)[:, None]
    s = torch.tensor(stds, dtype=wide, device=weight.device)[:, None]
    shift = (planes * (m / s)).sum((1, 2))
    folded_bias = -shift if bias is None else bias.to(wide) - shift
    return (planes / (255 * s)).flatten(1).to(weight.dtype), folded_bias.to(weight.dtype)


def _both(op: str, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    m, s = per_channel(op, "mean", mean), per_channel(op, "std", std)
    if m is None or s is None:
        fail(op, "mean, std", "value None", "numbers, one per channel", TypeError)
    return m, s


def _channels(mean: list[float]) -> int:
    """As many as means; an empty list is the op's to refuse, by its name."""
    return max(len(mean), 1)


def _rows_of(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's ``[E, C, P, P]`` as ``[E, L]``; anything else is the op's to refuse."""
    return weight.flatten(1) if isinstance(weight, torch.Tensor) and weight.dim() > 2 else weight


def _ints(op: str, window: Sequence[int] | None) -> list[int]:
    return [] if window is None else [whole(op, "window", v) for v in listed(op, "window", window, "(lo, hi)")]
