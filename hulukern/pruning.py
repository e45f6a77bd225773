"""Which visual tokens to keep: the rules, and what follows for the packed sequence.

A visual token is a cell of M x M patches. Every rule reads pixels only, so its mask is ready before the
encoder starts. Scores are in steps of 0..255 for pixels; *normalised* units are those of the model's
input, (u8 / 255 - mean) / std, so a score in steps is ``score / (255 * std)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hulukern.ops.common import GridTHW, divided, flat_grid_thw
from hulukern.ops.token_compact import token_compact
from hulukern.ops.token_score import token_score, token_score_frames
from hulukern.validation import fail, require

# Half-width, in normalised units and relative above 1, of the zone around a threshold in which fp32
# rounding could decide. 2352 terms of magnitude up to 2, each off by up to 4 * 2**-24, and a pairwise sum
# give less than 1e-6; ten times that costs nothing, the zone is nearly always empty.
ROUNDING_ZONE = 1e-5


@dataclass(frozen=True)
class Rule:
    """A pruning rule as data. ``threshold`` None: the rule takes ``keep`` instead."""

    name: str
    threshold: float | None
    min_tokens: int
    units: str
    summary: str


RULES = {
    rule.name: rule
    for rule in (
        Rule("released", 0.1, 1, "normalised", "the released Hulu-Med code, bit for bit: loses the first frame"),
        Rule("videollama3", 0.1, 1, "normalised x 255", "transformers' video_llama_3, bit for bit"),
        Rule("previous", 0.1, 1, "normalised", "the paper: changed since the previous frame, first frame kept"),
        Rule("bounded", 0.1, 0, "normalised", "changed since last kept: a dropped cell differs by at most that"),
        Rule("budget", None, 0, "tokens", "exactly so many, those that changed most since the previous frame"),
    )
}


@dataclass(frozen=True)
class Pruned:
    """keep: bool [cells]; scores: float32 [cells]. Clip after clip, each in (t, h/M, w/M) order.

    Scores are what the rule looked at: steps of 0..255 for pixels, the input's unit for float patches.
    """

    keep: torch.Tensor
    scores: torch.Tensor

    @property
    def reduction(self) -> float:
        """Share of tokens dropped, 0..1. Reads the mask: a sync on a device."""
        return 1 - self.keep.sum().item() / max(self.keep.numel(), 1)


def prune_frames(
    frames: torch.Tensor,
    *,
    rule: str,
    patch_size: int = 14,
    merge_size: int = 2,
    threshold: float | None = None,
    min_tokens: int | None = None,
    keep: int | float | None = None,
    windows: Sequence[tuple[int, int]] | None = None,
    mean: float = 0.5,
    std: float = 0.5,
    scores: torch.Tensor | None = None,
    backend: str | None = None,
) -> Pruned:
    """Prune one clip of whole frames.

    Args:
        frames: ``[T, H, W, C]`` uint8, or int16 with ``windows``; H, W divisible by patch_size * merge_size.
        rule: a key of :data:`RULES`.
        threshold: in the rule's units, at least 0; None is the rule's own. Not for ``budget``. Of the first
            frame ``previous`` and ``bounded`` drop nothing, however high it is.
        min_tokens: frames that keep fewer get their first ``min_tokens`` cells; None is the rule's own.
            Not for ``bounded`` (it would break its bound) and ``budget``.
        keep: for ``budget``: how many tokens, or which share of them as a float in 0..1.
        windows: int16 only, see :func:`hulukern.token_score_frames`; each window counts as the whole
            range of values. Not for the two bit-exact rules, which know pixels only.
        mean, std: of the model's normalisation, one for all channels.
        scores: scores against the previous frame, if a pass over the pixels has them already
            (``patch_embed_frames(..., with_scores=True)``). Not for ``bounded``.
        backend: as for every op.

    Returns:
        :class:`Pruned` with T * H/(P M) * W/(P M) cells. A single frame is kept whole, except by budget.
        NaN counts as changed, except in the two bit-exact rules.

    Raises:
        ValueError: an unknown rule, a threshold below 0, a budget above N, arguments the rule has not.
    """
    op = "prune_frames"
    chosen = _options(op, rule, threshold, min_tokens, keep)
    _check_norm(op, mean, std)
    require(isinstance(frames, torch.Tensor), op, "frames", f"type {type(frames).__name__}", "a torch.Tensor")
    sizes = f"values {patch_size}, {merge_size}"
    require(patch_size >= 1 and merge_size >= 1, op, "patch_size, merge_size", sizes, "at least 1")
    if windows is not None and frames.dtype != torch.int16:
        fail(op, "windows", f"{len(windows)} rows", f"None for {frames.dtype} frames")
    if frames.dtype == torch.int16 and rule in ("released", "videollama3"):
        fail(op, "frames", "dtype int16", f"uint8 for rule {rule!r}")

    def run(reference: str, steps: float) -> torch.Tensor:
        return token_score_frames(
            frames, patch_size=patch_size, merge_size=merge_size, windows=windows, reference=reference,
            threshold=steps, backend=backend,
        )  # fmt: skip

    if scores is None or rule == "bounded":
        require(scores is None, op, "scores", "a tensor", "None: rule 'bounded' compares with kept versions")
        scores = _scores(run, rule, chosen.threshold, 255 * std)
    T, cells = frames.shape[0], scores.numel() // max(frames.shape[0], 1)
    expected = (frames.shape[1] // (patch_size * merge_size)) * (frames.shape[2] // (patch_size * merge_size))
    require(scores.shape == (T * expected,), op, "scores", f"shape {list(scores.shape)}", f"[{T * expected}]")

    def pair(t: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        side = patch_size * merge_size
        grid = frames.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(1, 2)
        return _normalise(_merge_order(grid[t, cell], patch_size), mean, std), _normalise(
            _merge_order(grid[t - 1, cell], patch_size), mean, std
        )

    mask = _apply(chosen, scores.view(T, cells), 255 * std, pair)
    return Pruned(mask.flatten(), scores)


def prune_patches(
    patches: torch.Tensor,
    grid_thw: GridTHW,
    *,
    rule: str,
    merge_size: int | Sequence[int] = 2,
    modals: Sequence[str] | None = None,
    threshold: float | None = None,
    min_tokens: int | None = None,
    keep: int | float | None = None,
    mean: float = 0.5,
    std: float = 0.5,
    backend: str | None = None,
) -> Pruned:
    """Prune packed, cut patches of any number of clips and images.

    Args:
        patches: ``[N, L]`` uint8 pixels or normalised floats, in merge-block order.
        grid_thw: ``[G, 3]`` (t, h, w) in patches.
        merge_size: one M, or one per grid.
        modals: per grid, ``"image"`` (kept whole) or ``"video"``; None is all video. A grid of one frame
            is kept whole in any case, except by ``budget``.
        threshold, min_tokens, keep, mean, std, backend: as in :func:`prune_frames`. ``budget`` counts
            over all grids together; images score +inf and go first.

    Returns:
        :class:`Pruned` with N / M² cells, grid after grid.
    """
    op = "prune_patches"
    chosen = _options(op, rule, threshold, min_tokens, keep)
    _check_norm(op, mean, std)
    sizes = flat_grid_thw(op, grid_thw)
    grids = list(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    merges = [merge_size] * len(grids) if isinstance(merge_size, int) else [int(m) for m in merge_size]
    require(
        len(merges) == len(grids), op, "merge_size", f"{len(merges)} values", f"one, or one for each of {len(grids)}"
    )
    kinds = ["video"] * len(grids) if modals is None else list(modals)
    require(
        len(kinds) == len(grids) and set(kinds) <= {"image", "video"},
        op, "modals", f"value {kinds}", f"'image' or 'video' for each of {len(grids)} grids",
    )  # fmt: skip
    total = sum(t * h * w for t, h, w in grids)
    require(total == patches.shape[0], op, "grid_thw", f"{total} patches in all", f"N={patches.shape[0]} from patches")

    steps = 255 * std if patches.dtype == torch.uint8 else 1.0
    masks, all_scores, row = [], [], 0
    for (t, h, w), m, kind in zip(grids, merges, kinds, strict=True):
        clip = patches[row : row + t * h * w]
        row += t * h * w

        def run(
            reference: str, limit: float, clip: torch.Tensor = clip, grid: tuple[int, ...] = (t, h, w), m: int = m
        ) -> torch.Tensor:
            return token_score(clip, [grid], merge_size=m, reference=reference, threshold=limit, backend=backend)

        scores = _scores(run, rule, chosen.threshold, steps)
        if kind == "image":
            scores = torch.full_like(scores, float("inf"))
        all_scores.append(scores)
        if rule == "budget":
            continue
        if kind == "image" or t <= 1:
            masks.append(torch.ones_like(scores, dtype=torch.bool))
            continue
        cells = clip.reshape(t, h * w // m**2, -1)

        def pair(
            at: torch.Tensor, cell: torch.Tensor, cells: torch.Tensor = cells
        ) -> tuple[torch.Tensor, torch.Tensor]:
            new, old = cells[at, cell], cells[at - 1, cell]
            if cells.dtype != torch.uint8:
                return new, old
            return _normalise(new, mean, std), _normalise(old, mean, std)

        masks.append(_apply(chosen, scores.view(t, -1), steps, pair, patches.dtype).flatten())
    if not all_scores:
        empty = torch.empty(0, device=patches.device)
        return Pruned(empty.bool(), empty)
    scores = torch.cat(all_scores)
    if rule == "budget":
        return Pruned(_budget(scores, chosen.keep), scores)
    return Pruned(torch.cat(masks), scores)


@dataclass(frozen=True)
class Compressed:
    """A packed sequence after dropping; None where nothing came in. K' tokens, of which K visual."""

    input_ids: torch.Tensor  # [K']
    features: torch.Tensor | None  # [K, E]
    attention_mask: torch.Tensor | None  # [K']
    labels: torch.Tensor | None  # [K']
    position_ids: torch.Tensor  # [K'] from 0 in every sample
    cu_seqlens: torch.Tensor  # [S+1] int32
    index: torch.Tensor  # [K'] rows of the input


def compress_sequence(
    input_ids: torch.Tensor,
    keep: torch.Tensor,
    *,
    image_token_id: int,
    features: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> Compressed:
    """Drop visual tokens from a packed row of any number of samples, and all that belongs to them.

    Args:
        input_ids: ``[N]`` int64, samples packed one after the other.
        keep: ``[V]`` bool, one per token equal to ``image_token_id``, in order. Text is always kept.
        features: ``[V, E]`` projector output; differentiable.
        attention_mask, labels: ``[N]``.
        position_ids: ``[N]``, from 0 in every sample; read only to find where samples begin.
        cu_seqlens: ``[S+1]`` int32, the same told directly. None of the two: one sample.

    Source: the released ``_compress_visual_tokens``, equal where every sample begins with a kept token
    (the released code joins a sample whose first token it drops to the one before).
    """
    op = "compress_sequence"
    require(input_ids.dim() == 1, op, "input_ids", f"shape {list(input_ids.shape)}", "[N], samples packed")
    require(keep.dtype == torch.bool, op, "keep", f"dtype {keep.dtype}", "bool")
    visual = input_ids == image_token_id
    n_visual = int(visual.sum())
    require(keep.shape == (n_visual,), op, "keep", f"shape {list(keep.shape)}", f"[{n_visual}] as image tokens")
    if cu_seqlens is None and position_ids is not None:
        require(position_ids.shape == input_ids.shape, op, "position_ids", f"shape {list(position_ids.shape)}", "[N]")
        starts = (position_ids == 0).nonzero().flatten()
        if starts.numel() == 0 or starts[0] != 0:
            starts = torch.cat([starts.new_zeros(1), starts])
        cu_seqlens = torch.cat([starts, starts.new_tensor([input_ids.numel()])]).int()
    wanted = torch.ones_like(visual).masked_scatter(visual, keep)
    rows = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    present = {name: x for name, x in rows.items() if x is not None}
    tokens = token_compact(wanted, *present.values(), cu_seqlens=cu_seqlens, backend=backend)
    kept = dict(zip(present, tokens.tensors, strict=True))
    kept_features = None if features is None else token_compact(keep, features, backend=backend).tensors[0]
    return Compressed(
        input_ids=kept["input_ids"],
        features=kept_features,
        attention_mask=kept.get("attention_mask"),
        labels=kept.get("labels"),
        position_ids=tokens.position_ids,
        cu_seqlens=tokens.cu_seqlens,
        index=tokens.index,
    )


@dataclass(frozen=True)
class Drift:
    """How far dropped cells are from what stands in for them: the last kept version of the same cell.
    Normalised units, mean |difference| per cell. ``lost``: dropped before any version was kept."""

    max: float
    mean: float
    lost: int


def drift(
    frames: torch.Tensor, keep: torch.Tensor, *, patch_size: int = 14, merge_size: int = 2, std: float = 0.5
) -> Drift:
    """Of uint8 ``frames [T, H, W, C]`` under ``keep [T * cells]``."""
    T, H, W, _ = frames.shape
    side = patch_size * merge_size
    mask = keep.view(T, -1)
    versions = torch.arange(T, device=keep.device)[:, None].expand(mask.shape)
    stand_in = torch.where(mask, versions, -1).cummax(0).values
    cells = frames.reshape(T, H // side, side, W // side, side, -1).transpose(2, 3).reshape(T, mask.shape[1], -1)
    differences = []
    for t in range(T):
        dropped = (~mask[t] & (stand_in[t] >= 0)).nonzero().flatten()
        new, old = cells[t, dropped].int(), cells[stand_in[t, dropped], dropped].int()
        differences.append((new - old).abs().float().mean(-1) / (255 * std))
    values = torch.cat(differences)
    lost = int((~mask & (stand_in < 0)).sum())
    if values.numel() == 0:
        return Drift(0.0, 0.0, lost)
    return Drift(values.max().item(), values.mean().item(), lost)


# --- the rules ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    rule: str
    threshold: float
    min_tokens: int
    keep: int | float


def check_rule(op: str, options: Mapping[str, Any]) -> None:
    """Whether ``options`` are rule, threshold, min_tokens and keep of :func:`prune_patches`, before there are
    pixels. Raises ValueError."""
    require(isinstance(options, Mapping), op, "pruning", f"value {options!r}", "a mapping such as {'rule': 'previous'}")
    unknown = set(options) - {"rule", "threshold", "min_tokens", "keep"}
    require(not unknown, op, "pruning", f"keys {sorted(map(str, unknown))}", "rule, threshold, min_tokens and keep")
    require("rule" in options, op, "rule", "no value", "one of " + ", ".join(map(repr, RULES)))
    _options(op, *(options.get(name) for name in ("rule", "threshold", "min_tokens", "keep")))  # type: ignore[arg-type]


def _check_norm(op: str, mean: float, std: float) -> None:
    require(0 < std < math.inf, op, "std", f"value {std}", "above 0")
    require(math.isfinite(mean), op, "mean", f"value {mean}", "a finite number")


def _options(op: str, rule: str, threshold: float | None, min_tokens: int | None, keep: int | float | None) -> _Chosen:
    if not isinstance(rule, str) or rule not in RULES:
        fail(op, "rule", f"value {rule!r}", "one of " + ", ".join(map(repr, RULES)))
    known = RULES[rule]
    if rule == "budget":
        require(threshold is None, op, "threshold", f"value {threshold}", "None: rule 'budget' takes keep")
        require(keep is not None, op, "keep", "value None", "a number of tokens or a share of them")
    else:
        require(keep is None, op, "keep", f"value {keep}", f"None: rule {rule!r} takes a threshold")
    if rule in ("bounded", "budget"):
        require(min_tokens is None, op, "min_tokens", f"value {min_tokens}", f"None for rule {rule!r}")
    for name, value in (("threshold", threshold), ("min_tokens", min_tokens), ("keep", keep)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(value is None or number, op, name, f"value {value!r}", "a number")
    limit = threshold if threshold is not None else known.threshold or 0.0
    fill = known.min_tokens if min_tokens is None else min_tokens
    require(limit >= 0, op, "threshold", f"value {threshold}", "at least 0")
    require(fill >= 0, op, "min_tokens", f"value {min_tokens}", "at least 0")
    return _Chosen(rule, limit, fill, 0 if keep is None else keep)


def _scores(run: Callable[[str, float], torch.Tensor], rule: str, threshold: float, steps: float) -> torch.Tensor:
    """Of one clip; ``run`` takes the reference and the threshold in the score's own unit."""
    if rule == "bounded":
        return run("kept", threshold * steps)
    return run("previous", 0.0)


def _apply(
    chosen: _Chosen,
    scores: torch.Tensor,  # [T, cells]
    steps: float,  # score units per normalised unit
    pair: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:  # [T, cells] bool
    rule, threshold = chosen.rule, chosen.threshold
    if rule == "budget":
        return _budget(scores.flatten(), chosen.keep).view_as(scores)
    if scores.shape[0] <= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    if rule == "bounded":
        # The kernel's own decision, on the very number it compared.
        mask = ~(scores <= torch.tensor(threshold * steps, dtype=scores.dtype))
    elif rule == "previous":
        mask = ~(scores <= threshold * steps)
    else:
        mask = _bit_exact(rule, threshold, scores, steps, pair, dtype)
    if rule in ("previous", "bounded"):
        mask[:1] = True  # also under a threshold that fp32 rounds to the +inf it scores
    if chosen.min_tokens:
        few = mask.sum(1, keepdim=True) < chosen.min_tokens
        first = torch.arange(mask.shape[1], device=mask.device) < chosen.min_tokens
        mask |= few & first
    return mask


def _bit_exact(
    rule: str,
    threshold: float,
    scores: torch.Tensor,
    steps: float,
    pair: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The two fp32 formulations, rounding included. Our scores are exact, theirs are not; they can
    disagree only next to the threshold, so the few cells there are computed their way."""
    released = rule == "released"
    difference = divided(scores, steps)
    limit = threshold if released else threshold / 255
    mask = difference > limit
    # Their first frame: threshold + 1, which the released code then divides by 255.
    first = torch.tensor(threshold + 1, dtype=torch.float32)
    mask[0] = bool((divided(first, 255) if released else first) > threshold)
    if dtype in (torch.bfloat16, torch.float16):  # their rounding reaches everywhere
        near = torch.ones_like(mask)
    else:
        near = (difference - limit).abs() <= ROUNDING_ZONE * difference.clamp(min=1)
    near[0] = False
    t, cell = near.nonzero(as_tuple=True)
    if t.numel():
        new, old = pair(t, cell)
        theirs = torch.abs(new - old).mean(dim=-1) * 255
        mask[t, cell] = (divided(theirs, 255) if released else theirs) > threshold
    return mask


def _budget(scores: torch.Tensor, keep: int | float) -> torch.Tensor:
    """Exactly ``keep`` of them, highest first, ties to the earliest; NaN counts as highest."""
    n = scores.numel()
    if isinstance(keep, float):
        require(0 <= keep <= 1, "prune", "keep", f"share {keep}", "0.0 to 1.0")
        keep = round(keep * n)
    require(0 <= keep <= n, "prune", "keep", f"{keep} tokens", f"0 to N={n}")
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    values = scores.nan_to_num(nan=float("inf"), posinf=float("inf"))
    limit = values.topk(keep, sorted=True).values[-1]
    above, ties = values > limit, values == limit
    room = keep - above.sum()
    return above | (ties & (ties.cumsum(0) <= room))


def _merge_order(cells: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Pixels of cells [k, side, side, C] as the rows of their patches: [k, M * M * C * P * P]."""
    k, side, _, C = cells.shape
    M = side // patch_size
    grid = cells.reshape(k, M, patch_size, M, patch_size, C)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(k, -1)


def _normalise(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return divided(divided(pixels.float(), 255) - mean, std)
