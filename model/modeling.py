"""Hulu-Med: encoder, projector and a decoder from transformers, and the pruning between them.

The released checkpoints keep the encoder and the projector inside the decoder's module
(``model.vision_encoder``, ``model.mm_projector``, ``model.layers`` …); they stand there here too, so that the
keys are the released ones without any mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
    Qwen2Model,
    Qwen3Model,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import hulukern
from hulukern.ops.common import GridTHW
from hulukern.pruning import Compressed, check_rule, compress_sequence, prune_patches
from hulukern.validation import fail, require
from model.config import HuluMedConfig, HuluMedQwen2Config, HuluMedQwen3Config
from model.vision import HuluMedVisionModel
from model.weights import load_strict

DECODERS = {"hulumed_qwen2": Qwen2Model, "hulumed_qwen3": Qwen3Model}


class HuluMedProjector(nn.Module):
    """Linear, GELU (erf), Linear."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.readout = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: torch.Tensor, backend: str | None) -> torch.Tensor:
        first: Any = self.readout[0]
        second: Any = self.readout[2]
        h = F.linear(x, first.weight)  # of another dtype under autocast
        return second(hulukern.bias_gelu(h, first.bias.to(h.dtype), approximate="none", backend=backend))


@dataclass(frozen=True)
class Prompt:
    """What the decoder reads: padded again to a batch, visual tokens in place, dropped ones gone."""

    inputs_embeds: torch.Tensor  # [B, L', d]
    attention_mask: torch.Tensor  # [B, L'] i64
    position_ids: torch.Tensor  # [B, L']
    labels: torch.Tensor | None  # [B, L']
    n_visual: int  # before pruning
    n_kept: int


class HuluMedForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model. ``backend`` names the implementation of every op, None chooses by device."""

    config_class = HuluMedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HuluMedVisionLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HuluMedConfig, backend: str | None = None) -> None:
        super().__init__(config)
        self.model = DECODERS[config.model_type](config)
        self.model.vision_encoder = HuluMedVisionModel(config.vision_encoder_config, backend)
        self.model.mm_projector = HuluMedProjector(config.vision_encoder_config.hidden_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, directory: str | PathLike[str], *args: Any, backend: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint: either released key layout or transformers' ``video_llama_3``, strictly.

        Args:
            directory: a folder with ``config.json`` and safetensors, sharded or not.
            backend: of every op; None chooses by device.
            kwargs: as transformers', ``dtype`` and ``device_map`` among them.

        Raises:
            ValueError: keys missing, left over or of another shape (listed), in a folder before anything is
                allocated; an index that does not fit its shards; a config that is none of ours.
            OSError: no safetensors, or a shard that the index names is not there.
        """
        found = load_strict(super().from_pretrained, cls, directory, *args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).backend = backend
        return found

    def save_pretrained(self, directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write the released Hugging Face layout, whichever was loaded."""
        super().save_pretrained(directory, **{"save_original_format": False, **kwargs})

    @property
    def backend(self) -> str | None:
        return self.model.vision_encoder.backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self.model.vision_encoder.backend = name

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    # --- the visual side ----------------------------------------------------------------------------------

    def visual_mask(
        self,
        pixel_values: torch.Tensor,
        grid_thw: GridTHW,
        merge_sizes: Sequence[int],
        modals: Sequence[str] | None = None,
        pruning: dict[str, Any] | bool | None = None,
    ) -> torch.Tensor | None:
        """Which cells survive, bool ``[V]``, from pixels alone; None when nothing is pruned."""
        if pruning is None:
            pruning = self.config.use_token_compression
        if pruning is False:
            return None
        rule = self.config.pruning if pruning is True else pruning
        check_rule("HuluMedForConditionalGeneration", rule)
        vision = self.config.vision_encoder_config
        norm = {"mean": vision.image_mean, "std": vision.image_std}
        return prune_patches(
            pixel_values, grid_thw, merge_size=list(merge_sizes), modals=modals, backend=self.backend, **norm, **rule
        ).keep

    def visual_features(
        self,
        pixel_values: torch.Tensor,
        grid_thw: GridTHW,
        merge_sizes: Sequence[int],
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[K, d]``: encoder and projector for the cells of ``keep`` (all if None)."""
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.dtype)
        encoded = self.model.vision_encoder(pixel_values, grid_thw, merge_sizes, keep)
        return self.model.mm_projector(encoded, self.backend)

    def prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        grid_thw: GridTHW | None = None,
        merge_sizes: Sequence[int] | torch.Tensor | None = None,
        modals: Sequence[str] | None = None,
        pruning: dict[str, Any] | bool | None = None,
        keep: torch.Tensor | None = None,
    ) -> Prompt:
        """Encode what is visual, drop what is pruned, and lay the batch out again.

        Args:
            input_ids: ``[B, L]``, one image token per visual token, padded left or right; where nothing is
                padded and pruning makes rows unequal, they are padded left, as generation needs it.
            attention_mask: ``[B, L]``, 0 at padding; None has none. labels: ``[B, L]``.
            pixel_values, grid_thw, merge_sizes, modals: of all samples in order, as the processor gives them.
            pruning: arguments of :func:`hulukern.pruning.prune_patches`, False for none, None for the config's.
            keep: bool ``[V]``, a mask that is known already, in place of ``pruning``.
        """
        name = "HuluMedForConditionalGeneration"
        require(input_ids.dim() == 2, name, "input_ids", f"shape {list(input_ids.shape)}", "[B, L]")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        require(mask.shape == input_ids.shape, name, "attention_mask", f"shape {list(mask.shape)}", "input_ids' shape")
        image = self.config.image_token_index
        visual = (input_ids == image) & mask.bool()
        n_visual, features = int(visual.sum()), None
        if pixel_values is None:
            require(n_visual == 0, name, "pixel_values", "value None", f"patches for {n_visual} image tokens")
            require(keep is None, name, "keep", "a mask", "None without pixel_values")
        else:
            if grid_thw is None or merge_sizes is None:
                fail(name, "grid_thw, merge_sizes", "value None", "one row and one size per image, clip or volume")
            merges = [int(m) for m in merge_sizes]
            grids = torch.as_tensor(grid_thw).reshape(-1, 3).cpu()  # BatchFeature.to moves it to the device
            require(
                len(merges) == len(grids), name, "merge_sizes", f"{len(merges)} values", f"{len(grids)} as grid_thw"
            )
            cells = sum(t * h * w // m**2 for (t, h, w), m in zip(grids.tolist(), merges, strict=True))
            require(cells == n_visual, name, "input_ids", f"{n_visual} image tokens", f"{cells} as grid_thw")
            if keep is None:
                keep = self.visual_mask(pixel_values, grids, merges, modals, pruning)
            features = self.visual_features(pixel_values, grids, merges, keep)
        if keep is None:
            keep = torch.ones(n_visual, dtype=torch.bool, device=input_ids.device)
        return self._lay_out(input_ids, mask, labels, features, keep.to(input_ids.device))

    def _lay_out(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor | None,
        features: torch.Tensor | None,
        keep: torch.Tensor,
    ) -> Prompt:
        """Rows without padding are packed, pruned, and padded again on the side they were, left if none."""
        B = input_ids.shape[0]
        real = mask.bool()
        ends = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
        kept: Compressed = compress_sequence(
            input_ids[real], keep, image_token_id=self.config.image_token_index, cu_seqlens=ends,
            labels=None if labels is None else labels[real], backend=self.backend,
        )  # fmt: skip
        lengths = kept.cu_seqlens.diff().long()
        width = int(lengths.max()) if B else 0
        left = bool((~real[:, :1]).any()) or bool(real[:, -1:].all())
        column = torch.arange(width, device=input_ids.device).expand(B, width)
        filled = column >= (width - lengths)[:, None] if left else column < lengths[:, None]
        ids = input_ids.new_full((B, width), self.config.pad_token_id or 0).masked_scatter(filled, kept.input_ids)
        embeds = self.get_input_embeddings()(ids)
        if features is not None:
            where = (ids == self.config.image_token_index) & filled
            embeds = embeds.masked_scatter(where[..., None], features.to(embeds.dtype))
        positions = ids.new_zeros(ids.shape).masked_scatter(filled, kept.position_ids)
        if labels is not None:
            assert kept.labels is not None
            labels = labels.new_full(ids.shape, -100).masked_scatter(filled, kept.labels)
        return Prompt(embeds, filled.long(), positions, labels, keep.numel(), int(keep.sum()))

    # --- the decoder --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_values: torch.Tensor | None = None,
        grid_thw: GridTHW | None = None,
        merge_sizes: Sequence[int] | torch.Tensor | None = None,
        modals: Sequence[str] | None = None,
        pruning: dict[str, Any] | bool | None = None,
        keep: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where ``labels`` are given.

        With pixels the sequence is what :meth:`prompt` makes of it: pruned tokens have no logits, positions
        count from 0 in every sample and ``position_ids`` is not read. Without, this is the decoder.
        """
        if pixel_values is not None:
            if input_ids is None:
                fail("HuluMedForConditionalGeneration", "input_ids", "value None", "ids beside pixel_values")
            p = self.prompt(
                input_ids, attention_mask, labels, pixel_values, grid_thw, merge_sizes, modals, pruning, keep
            )
            inputs_embeds, attention_mask, position_ids, labels = (
                p.inputs_embeds, p.attention_mask, p.position_ids, p.labels,
            )  # fmt: skip
            input_ids = None
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        found = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return found.to_tuple() if return_dict is False else found

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' ``generate`` on the pruned prompt; returns the new tokens only, ``[B, new]``.

        Takes the tensors of :meth:`prompt` beside the usual options.
        """
        inputs = kwargs.pop("inputs", None)  # transformers' name for them
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            stray = [name for name in ("pixel_values", "grid_thw", "keep") if kwargs.get(name) is not None]
            if stray:
                fail("generate", ", ".join(stray), "values without ids", "input_ids beside them")
            return super().generate(**kwargs)
        names = ("attention_mask", "pixel_values", "grid_thw", "merge_sizes", "modals", "pruning", "keep")
        p = self.prompt(input_ids, **{name: kwargs.pop(name, None) for name in names})
        if bool((p.attention_mask[:, -1] == 0).any()):
            fail("generate", "input_ids", "padding on the right", "on the left: new tokens follow the last column")
        return super().generate(inputs_embeds=p.inputs_embeds, attention_mask=p.attention_mask, **kwargs)


# The Auto classes want one class per config.
class HuluMedQwen2ForConditionalGeneration(HuluMedForConditionalGeneration):
    config_class = HuluMedQwen2Config


class HuluMedQwen3ForConditionalGeneration(HuluMedForConditionalGeneration):
    config_class = HuluMedQwen3Config


for _class in (HuluMedQwen2ForConditionalGeneration, HuluMedQwen3ForConditionalGeneration):
    AutoModelForCausalLM.register(_class.config_class, _class, exist_ok=True)
    AutoModelForImageTextToText.register(_class.config_class, _class, exist_ok=True)
