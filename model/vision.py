"""The vision encoder: patches of any number of images, clips and volumes, packed into one sequence.

Every step is a hulukern op or a linear layer. Where the caller knows which cells survive pruning, the last
layer's queries, output projection and MLP, the final norm and the merge run for those only; attention still
sees every key, so the result equals computing everything and dropping later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import hulukern
from hulukern.ops.common import GridTHW, flat_grid_thw
from hulukern.validation import require
from model.config import HuluMedVisionConfig
from model.product import PackedProduct, is_plain


class Rows(NamedTuple):
    """Packed rows: their coordinates and where frames begin and end."""

    positions: torch.Tensor  # [N, 2] i32
    cu_seqlens: torch.Tensor  # [S+1] i32


@dataclass(frozen=True)
class Plan:
    """What the encoder must know of a batch beside its pixels, made on the host from grids.

    ``kept`` names the rows of the surviving cells' patches, ``survivors`` describes them; None keeps all.
    ``merges`` lists (rows, merge_size) of runs of surviving rows with one merge size.
    """

    rows: Rows
    merges: tuple[tuple[int, int], ...]
    kept: torch.Tensor | None = None  # [K] i64
    survivors: Rows | None = None


def plan(
    grid_thw: GridTHW,
    merge_sizes: Sequence[int],
    keep: torch.Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a batch.

    Args:
        grid_thw: ``[G, 3]`` on the host. merge_sizes: one per grid.
        keep: bool ``[V]``, one per cell of all grids in order. Reading it waits for the mask, which needs the
            pixels only: call this before the encoder is launched.
    """
    # The released merge is a bilinear resize; it is the mean that spatial_merge takes for these two only.
    for m in merge_sizes:
        require(m in (1, 2), "plan", "merge_sizes", f"value {m}", "1 or 2")
    sizes = flat_grid_thw("plan", grid_thw)
    grids = list(zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    positions = hulukern.grid_positions(grid_thw, merge_sizes)
    ends = hulukern.grid_cu_seqlens(grid_thw)
    rows = Rows(positions.to(device), ends.to(device))
    counts = [t * h * w for t, h, w in grids]
    if keep is None:
        return Plan(rows, _runs(counts, merge_sizes))
    cells = [n // m**2 for n, m in zip(counts, merge_sizes, strict=True)]
    require(keep.shape == (sum(cells),), "plan", "keep", f"shape {list(keep.shape)}", f"[{sum(cells)}], one a cell")
    parts = keep.cpu().split(cells)
    by_row = torch.cat([part.repeat_interleave(m**2) for part, m in zip(parts, merge_sizes, strict=True)])
    kept = by_row.nonzero().flatten()
    survivors = Rows(positions[kept].to(device), torch.searchsorted(kept, ends).int().to(device))
    left = [int(part.sum()) * m**2 for part, m in zip(parts, merge_sizes, strict=True)]
    return Plan(rows, _runs(left, merge_sizes), kept.to(device), survivors)


def _runs(counts: Sequence[int], merge_sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for n, m in zip(counts, merge_sizes, strict=True):
        if runs and runs[-1][1] == m:
            runs[-1] = (runs[-1][0] + n, m)
        else:
            runs.append((n, m))
    return tuple(runs)


class HuluMedVisionEmbeddings(nn.Module):
    def __init__(self, config: HuluMedVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=True
        )
        self.mean, self.std = [config.image_mean] * config.num_channels, [config.image_std] * config.num_channels

    def forward(self, pixel_values: torch.Tensor, backend: str | None) -> torch.Tensor:
        conv = self.patch_embedding
        norm: dict[str, Any] = {"mean": self.mean, "std": self.std} if pixel_values.dtype == torch.uint8 else {}
        return hulukern.patch_embed(pixel_values, conv.weight, conv.bias, backend=backend, **norm)


class HuluMedVisionAttention(nn.Module):
    def __init__(self, config: HuluMedVisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.theta = config.num_attention_heads, config.head_dim, config.rope_theta
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self._qkv, self._kv, self._out = (PackedProduct() for _ in range(3))

    def forward(
        self, h: torch.Tensor, rows: Rows, survivors: Rows | None, kept: torch.Tensor | None, backend: str | None
    ) -> torch.Tensor:
        """``[N, E]`` -> ``[N, E]``, or ``[K, E]`` for the kept rows."""
        heads, projections = (self.num_heads, self.head_dim), (self.q_proj, self.k_proj, self.v_proj)
        # With gradients one product is no faster than three.
        qkv = self._qkv(h, *projections) if kept is None else None
        kv = self._kv(h, self.k_proj, self.v_proj) if kept is not None else None
        if qkv is not None:
            q, k, v = qkv.unflatten(1, (3, *heads)).unbind(1)
        else:
            q = self.q_proj(h if kept is None else h[kept]).unflatten(1, heads)
            if kv is not None:
                k, v = kv.unflatten(1, (2, *heads)).unbind(1)
            else:
                k, v = self.k_proj(h).unflatten(1, heads), self.v_proj(h).unflatten(1, heads)
        out = hulukern.rope_attention(
            q, k, v, rows.positions, rows.cu_seqlens, theta=self.theta, backend=backend,
            positions_q=None if survivors is None else survivors.positions,
            cu_seqlens_q=None if survivors is None else survivors.cu_seqlens,
        )  # fmt: skip
        projected = self._out(out.flatten(1), self.out_proj)
        return self.out_proj(out.flatten(1)) if projected is None else projected


class HuluMedVisionMLP(nn.Module):
    def __init__(self, config: HuluMedVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self._up, self._down = PackedProduct(), PackedProduct()

    def forward(self, h: torch.Tensor, backend: str | None) -> torch.Tensor:
        x = self._up(h, self.fc1, with_bias=False)
        if x is None and is_plain(self.fc1):
            x = F.linear(h, self.fc1.weight)  # of another dtype under autocast
        if x is None:
            x = hulukern.bias_gelu(self.fc1(h), backend=backend)
        else:
            x = hulukern.bias_gelu(x, self.fc1.bias.to(x.dtype), backend=backend)
        out = self._down(x, self.fc2)
        return self.fc2(x) if out is None else out


class HuluMedVisionLayer(GradientCheckpointingLayer):
    """A pre-norm block. The residual travels as a sum not yet taken, x + delta, since the next norm takes it."""

    def __init__(self, config: HuluMedVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = HuluMedVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HuluMedVisionMLP(config)

    def forward(
        self,
        x: torch.Tensor,  # [N, E]
        delta: torch.Tensor | None,  # [N, E]
        rows: Rows,
        survivors: Rows | None,
        kept: torch.Tensor | None,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # the next x and delta, [N, E] or [K, E]
        first, second = self.layer_norm1, self.layer_norm2
        if delta is None:
            h = hulukern.layer_norm(x, first.weight, first.bias, eps=first.eps, backend=backend)
        else:
            h, x = hulukern.layer_norm(delta, first.weight, first.bias, residual=x, eps=first.eps, backend=backend)
        # Under autocast the linear layers give 16 bits and the residual keeps its own dtype.
        attended = self.self_attn(h, rows, survivors, kept, backend).to(x.dtype)
        x = x if kept is None else x[kept]
        h, x = hulukern.layer_norm(attended, second.weight, second.bias, residual=x, eps=second.eps, backend=backend)
        return x, self.mlp(h, backend).to(x.dtype)


class HuluMedVisionEncoder(nn.Module):
    def __init__(self, config: HuluMedVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HuluMedVisionLayer(config) for _ in range(config.num_hidden_layers))


class HuluMedVisionModel(PreTrainedModel):
    """``pixel_values [N, C·P·P]`` to one row per (surviving) cell.

    ``backend`` names the implementation of every op, None chooses by device; it may be set at any time.
    """

    config_class = HuluMedVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HuluMedVisionLayer"]

    def __init__(self, config: HuluMedVisionConfig, backend: str | None = None) -> None:
        super().__init__(config)
        self.backend = backend
        self.embeddings = HuluMedVisionEmbeddings(config)
        self.encoder = HuluMedVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: GridTHW,
        merge_sizes: Sequence[int] | torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode packed patches.

        Args:
            pixel_values: ``[N, C·P·P]`` in merge-block order, uint8 pixels (normalised here) or normalised floats.
            grid_thw: ``[G, 3]`` (t, h, w) in patches, on the host; frames attend to themselves only.
            merge_sizes: ``[G]``.
            keep: bool ``[V]``: the cells that survive pruning, in order; None is all.

        Returns:
            ``[V, E]``, or ``[K, E]`` for the kept cells: equal to ``forward(...)[keep]``.

        Raises:
            ValueError: grids that do not match N, or are no whole cells.
        """
        merges = [int(m) for m in merge_sizes]
        grid_thw = torch.as_tensor(grid_thw).reshape(-1, 3).cpu()
        total = int(grid_thw.prod(1).sum())
        n = pixel_values.shape[0]
        require(total == n, "HuluMedVisionModel", "grid_thw", f"{total} patches in all", f"N={n} from pixel_values")
        return self.encode(pixel_values, plan(grid_thw, merges, keep, device=pixel_values.device))

    def encode(self, pixel_values: torch.Tensor, p: Plan) -> torch.Tensor:
        """:meth:`forward` on a plan: no host work, hence ``torch.compile(model.encode, fullgraph=True)``."""
        x = self.embeddings(pixel_values, self.backend)
        delta: torch.Tensor | None = None
        last = len(self.encoder.layers) - 1
        for i, layer in enumerate(self.encoder.layers):
            chosen = (p.survivors, p.kept) if i == last else (None, None)
            x, delta = layer(x, delta, p.rows, *chosen, self.backend)
        if delta is not None:
            x = x + delta
        blocks = x.split([n for n, _ in p.merges])
        parts = [self._merged(block, m) for block, (_, m) in zip(blocks, p.merges, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])

    def _merged(self, x: torch.Tensor, merge_size: int) -> torch.Tensor:
        """The final norm and the merge: rows of whole cells to one row per cell."""
        norm = self.post_layernorm
        return hulukern.spatial_merge(
            x, norm.weight, norm.bias, merge_size=merge_size, eps=norm.eps, backend=self.backend
        )

    def hidden_states(self, pixel_values: torch.Tensor, p: Plan) -> list[torch.Tensor]:
        """After the embedding, every layer and the final norm, ``[N, E]`` each, nothing pruned: to verify."""
        x = self.embeddings(pixel_values, self.backend)
        delta: torch.Tensor | None = None
        states = [x]
        for layer in self.encoder.layers:
            x, delta = layer(x, delta, p.rows, None, None, self.backend)
            states.append(x + delta)
        return [*states, self._merged(states[-1], 1)]


AutoModel.register(HuluMedVisionConfig, HuluMedVisionModel, exist_ok=True)
