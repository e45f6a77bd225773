"""Kernels that are wrong on purpose, each in one way that real ones are: the harness must reject them all.

A wrong kernel has the signature of a backend. Most are the reference with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
import wrong_encoder_kernels

from hulukern.ops.patch_embed import reference as patch_embed
from hulukern.ops.token_compact import reference as token_compact
from hulukern.ops.token_score import reference as token_score

Kernel = Callable[..., Any]
Wrap = Callable[[Kernel], Kernel]


# --- wrong for any op -------------------------------------------------------------------------------------


def _first_tensor(outputs: Any) -> torch.Tensor:
    """The first that has elements; an empty one when all are empty."""
    leaves = pytree.tree_leaves(outputs)
    return next((y for y in leaves if y.numel()), leaves[0])


def _replace_first(outputs: Any, new: torch.Tensor) -> Any:
    leaves, tree = pytree.tree_flatten(outputs)
    at = next((i for i, y in enumerate(leaves) if y.numel()), 0)
    return pytree.tree_unflatten([*leaves[:at], new, *leaves[at + 1 :]], tree)


def unwritten_last_element(run: Kernel) -> Kernel:
    def kernel(*arguments: Any) -> Any:
        outputs = run(*arguments)
        good = _first_tensor(outputs)
        out = torch.empty(good.shape, dtype=good.dtype, device=good.device)
        out.view(-1)[:-1] = good.reshape(-1)[:-1]
        return _replace_first(outputs, out)

    return kernel


def writes_one_past_the_end(run: Kernel) -> Kernel:
    def kernel(*arguments: Any) -> Any:
        outputs = run(*arguments)
        good = _first_tensor(outputs)
        out = torch.empty(good.shape, dtype=good.dtype, device=good.device)
        out.copy_(good)
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(0)
        return _replace_first(outputs, out)

    return kernel


def ignores_strides(run: Kernel) -> Kernel:
    """Reads every tensor as if its rows were dense."""

    def dense(x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous() or x.numel() == 0:
            return x
        return torch.as_strided(x, x.shape, x.new_empty(x.shape).stride())

    def kernel(*arguments: Any) -> Any:
        return run(*pytree.tree_map_only(torch.Tensor, dense, list(arguments)))

    return kernel


def modifies_an_input(run: Kernel) -> Kernel:
    def kernel(*arguments: Any) -> Any:
        outputs = run(*arguments)
        for x in pytree.tree_leaves(list(arguments)):
            if isinstance(x, torch.Tensor) and x.numel() and x.dtype != torch.bool:
                x.view(-1)[:1].add_(1) if x.is_contiguous() else x.add_(1)
                break
        return outputs

    return kernel


def one_element_off(run: Kernel) -> Kernel:
    """One value wrong by a few percent of the largest, or by one: what a race or a bad tail leaves."""

    def kernel(*arguments: Any) -> Any:
        outputs = run(*arguments)
        good = _first_tensor(outputs).clone()
        flat = good.view(-1)
        if not flat.numel():
            return outputs
        if good.dtype == torch.bool:
            flat[-1] = ~flat[-1]
        elif good.is_floating_point():
            finite = flat[flat.isfinite()]
            flat[-1] = (finite.abs().max() if finite.numel() else 1.0) * 1.05 + 1.0
        else:
            flat[-1] += 1
        return _replace_first(outputs, good)

    return kernel


def returns_the_first_answer_again(run: Kernel) -> Kernel:
    answers: dict[Any, Any] = {}

    def kernel(*arguments: Any) -> Any:
        leaves = pytree.tree_leaves(list(arguments))
        key = tuple(str((x.shape, x.dtype)) if isinstance(x, torch.Tensor) else str(x) for x in leaves)
        return pytree.tree_map(lambda y: y.clone(), answers.setdefault(key, run(*arguments)))

    return kernel


def wrong_result_dtype(run: Kernel) -> Kernel:
    def kernel(*arguments: Any) -> Any:
        outputs = run(*arguments)
        good = _first_tensor(outputs)
        return _replace_first(outputs, good.to(torch.int16 if good.dtype == torch.float64 else torch.float64))

    return kernel


FOR_ANY_OP: tuple[Wrap, ...] = (
    unwritten_last_element,
    writes_one_past_the_end,
    ignores_strides,
    modifies_an_input,
    one_element_off,
    returns_the_first_answer_again,
    wrong_result_dtype,
)


# --- token_score ------------------------------------------------------------------------------------------


def score_first_frame_zero(*a: Any) -> torch.Tensor:
    return token_score.token_score(*a).nan_to_num(posinf=0.0)


def score_sum_instead_of_mean(patches: torch.Tensor, grid: list[int], m: int, *rest: Any) -> torch.Tensor:
    return token_score.token_score(patches, grid, m, *rest) * (m * m * patches.shape[1])


def score_across_grids(patches: torch.Tensor, grid: list[int], m: int, *rest: Any) -> torch.Tensor:
    """Compares the first frame of a grid with the last rows of the one before."""
    good = token_score.token_score(patches, grid, m, *rest)
    first = grid[0] * grid[1] * grid[2] // m**2 if grid else 0
    return torch.cat([good[:first], good[first:].nan_to_num(posinf=1.0)])


def score_next_instead_of_previous(patches: torch.Tensor, grid: list[int], m: int, *rest: Any) -> torch.Tensor:
    return token_score.token_score(patches.flip(0), grid, m, *rest).flip(0)


def score_kept_treated_as_previous(p: torch.Tensor, grid: list[int], m: int, _: str, limit: float) -> torch.Tensor:
    return token_score.token_score(p, grid, m, "previous", limit)


def score_previous_treated_as_kept(p: torch.Tensor, grid: list[int], m: int, _: str, limit: float) -> torch.Tensor:
    return token_score.token_score(p, grid, m, "kept", limit)


def score_wraps_at_256(patches: torch.Tensor, *rest: Any) -> torch.Tensor:
    """uint8 arithmetic: 3 - 5 is 254."""
    if patches.dtype != torch.uint8:
        return token_score.token_score(patches.half(), *rest)
    grid, m = rest[0], rest[1]
    parts, row = [], 0
    for t, h, w in zip(grid[::3], grid[1::3], grid[2::3], strict=True):
        clip = patches[row : row + t * h * w].reshape(t, h * w // m**2, m**2 * patches.shape[1])
        row += t * h * w
        infinite = torch.full_like(clip[:1, :, :1].float().squeeze(-1), float("inf"))
        parts.append(torch.cat([infinite, (clip[1:] - clip[:-1]).float().mean(-1)]).flatten())
    return torch.cat(parts) if parts else torch.empty(0)


def frames_score_without_clamping(f: torch.Tensor, p: int, m: int, windows: list[int], *rest: Any) -> torch.Tensor:
    wide = [w for lo, hi in zip(windows[::2], windows[1::2], strict=True) for w in (lo - 9000, hi + 9000)]
    return token_score.token_score_frames(f, p, m, wide, *rest)


def frames_score_first_window_only(f: torch.Tensor, p: int, m: int, windows: list[int], *rest: Any) -> torch.Tensor:
    return token_score.token_score_frames(f, p, m, windows[:2], *rest)


def frames_score_columns_before_rows(f: torch.Tensor, *rest: Any) -> torch.Tensor:
    return token_score.token_score_frames(f.transpose(1, 2), *rest)


def frames_score_one_patch_for_a_cell(f: torch.Tensor, p: int, m: int, *rest: Any) -> torch.Tensor:
    per_patch = token_score.token_score_frames(f, p, 1, *rest)
    return per_patch.view(-1, m * m)[:, 0].clone()


# --- token_compact ----------------------------------------------------------------------------------------


def compact_unstable(*a: Any) -> Any:
    rows, index, positions, ends, count = token_compact.token_compact(*a)
    return [x.flip(0) for x in rows], index.flip(0), positions, ends, count


def compact_positions_never_restart(*a: Any) -> Any:
    rows, index, positions, ends, count = token_compact.token_compact(*a)
    n = min(int(count), positions.numel())
    return (
        rows,
        index,
        torch.where(torch.arange(positions.numel()) < n, torch.arange(positions.numel()), 0),
        ends,
        count,
    )


def compact_old_cu_seqlens(keep: torch.Tensor, tensors: Any, ends: Any, n: int, *rest: Any) -> Any:
    rows, index, positions, _new, count = token_compact.token_compact(keep, tensors, ends, n, *rest)
    return rows, index, positions, torch.tensor([0, n], dtype=torch.int32) if ends is None else ends.clone(), count


def compact_count_stops_at_the_bound(*a: Any) -> Any:
    *rest, count = token_compact.token_compact(*a)
    return *rest, count.clamp(max=rest[1].numel())


def compact_fill_ignored(*a: Any) -> Any:
    return token_compact.token_compact(*a[:-1], [0] * len(a[-1]))


def compact_drops_the_last_row(keep: torch.Tensor, *rest: Any) -> Any:
    keep = keep.clone()
    if keep.dtype == torch.bool:
        keep[-1:] = False
    return token_compact.token_compact(keep, *rest)


def compact_backward_ignores_padding(grad: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    out = grad.new_zeros((n, *grad.shape[1:]))
    if n:
        out[index] = grad  # -1 is the last row
    return out


def compact_backward_leaves_garbage(grad: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    out = torch.empty((n, *grad.shape[1:]), dtype=grad.dtype)
    out[index[index >= 0]] = grad[index >= 0]
    return out


def compact_backward_is_another_gather(grad: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    good = token_compact.token_compact_backward(grad, index, n)
    return good.roll(1, 0)


# --- patch_embed ------------------------------------------------------------------------------------------


def embed_without_bias(patches: Any, weight: Any, _bias: Any, *rest: Any) -> torch.Tensor:
    return patch_embed.patch_embed(patches, weight, None, *rest)


def embed_drops_the_tail_of_k(patches: Any, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """588 is not a multiple of 16: a kernel that steps by 16 and forgets the rest."""
    weight = weight.clone()
    weight[:, weight.shape[1] // 16 * 16 :] = 0
    return patch_embed.patch_embed(patches, weight, *rest)


def embed_accumulates_in_half(patches: Any, weight: Any, bias: Any, channels: int, mean: Any, std: Any) -> Any:
    x = patches.float()
    if patches.dtype == torch.uint8:
        x = patch_embed.patch_embed_normalize(patches, channels, mean, std, torch.float32)
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    for k in range(0, x.shape[1], 16):
        out += (x[:, k : k + 16] @ weight[:, k : k + 16].float().t()).bfloat16()
    return (out.float() + (0 if bias is None else bias.float())).to(weight.dtype)


def embed_swaps_channels(patches: Any, weight: Any, bias: Any, channels: int, mean: Any, std: Any) -> Any:
    return patch_embed.patch_embed(patches, weight, bias, channels, mean and mean[::-1], std and std[::-1])


def frames_embed_row_major(frames: Any, weight: Any, bias: Any, p: int, m: int, *rest: Any) -> Any:
    """Patches in raster order instead of merge-block order."""
    embedding, _ = patch_embed.patch_embed_frames(frames, weight, bias, p, 1, *rest)
    _, scores = patch_embed.patch_embed_frames(frames, weight, bias, p, m, *rest)
    return embedding, scores


def frames_embed_loses_block_boundary_scores(*a: Any) -> Any:
    """Every block of frames starts afresh: its first frame scores +inf."""
    embedding, scores = patch_embed.patch_embed_frames(*a)
    per_frame = scores.numel() // max(a[0].shape[0], 1)
    scores = scores.clone()
    scores[per_frame * 2 : per_frame * 3] = float("inf")
    return embedding, scores


def frames_embed_ignores_window(
    frames: Any, weight: Any, bias: Any, p: int, m: int, mean: Any, std: Any, *rest: Any
) -> Any:
    window, with_scores = rest
    return patch_embed.patch_embed_frames(frames, weight, bias, p, m, mean, std, [w * 2 for w in window], with_scores)


def cut_row_major(frames: Any, p: int, m: int, *rest: Any) -> Any:
    patches, _ = patch_embed.patch_embed_cut(frames, p, 1, *rest)
    _, scores = patch_embed.patch_embed_cut(frames, p, m, *rest)
    return patches, scores


def cut_channels_last(frames: Any, p: int, m: int, channels: int, *rest: Any) -> Any:
    patches, scores = patch_embed.patch_embed_cut(frames, p, m, channels, *rest)
    return patches.unflatten(1, (channels, p * p)).transpose(1, 2).flatten(1), scores


def cut_one_rounding_too_few(frames: Any, p: int, m: int, channels: int, mean: Any, std: Any, *rest: Any) -> Any:
    """scale and shift folded into one fused multiply-add: right to an ulp, not bit-equal."""
    if mean is None:
        return cut_row_major(frames, p, m, channels, mean, std, *rest)
    window, dtype, with_scores = rest
    patches, scores = patch_embed.patch_embed_cut(frames, p, m, channels, mean, std, window, torch.float64, with_scores)
    return patches.to(dtype), scores


def normalize_truncates(*a: Any) -> torch.Tensor:
    """Rounds toward zero on the way to 16 bit, and by one unit in fp32."""
    good = patch_embed.patch_embed_normalize(*a)
    return torch.nextafter(good, torch.zeros_like(good)) if good.is_floating_point() else good


def normalize_one_mean_for_all(patches: Any, channels: int, mean: Any, std: Any, dtype: Any) -> torch.Tensor:
    if mean is None:
        return patch_embed.patch_embed_normalize(patches, 1, [0.0], [1.0], dtype)
    return patch_embed.patch_embed_normalize(patches, channels, [mean[0]] * channels, [std[0]] * channels, dtype)


BY_OP: dict[str, tuple[Kernel, ...]] = {
    **wrong_encoder_kernels.BY_OP,
    "token_score": (
        score_first_frame_zero,
        score_sum_instead_of_mean,
        score_across_grids,
        score_next_instead_of_previous,
        score_kept_treated_as_previous,
        score_previous_treated_as_kept,
        score_wraps_at_256,
    ),
    "token_score_frames": (
        frames_score_without_clamping,
        frames_score_first_window_only,
        frames_score_columns_before_rows,
        frames_score_one_patch_for_a_cell,
    ),
    "token_compact": (
        compact_unstable,
        compact_positions_never_restart,
        compact_old_cu_seqlens,
        compact_count_stops_at_the_bound,
        compact_fill_ignored,
        compact_drops_the_last_row,
    ),
    "token_compact_backward": (
        compact_backward_ignores_padding,
        compact_backward_leaves_garbage,
        compact_backward_is_another_gather,
    ),
    "patch_embed": (
        embed_without_bias,
        embed_drops_the_tail_of_k,
        embed_accumulates_in_half,
        embed_swaps_channels,
    ),
    "patch_embed_frames": (
        frames_embed_row_major,
        frames_embed_loses_block_boundary_scores,
        frames_embed_ignores_window,
    ),
    "patch_embed_cut": (cut_row_major, cut_channels_last, cut_one_rounding_too_few),
    "patch_embed_normalize": (normalize_truncates, normalize_one_mean_for_all),
}
