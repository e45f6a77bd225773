"""Configurations as the released checkpoints write them: the decoder's keys at the top, the encoder's nested."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hulukern.pruning import check_rule

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # of encoder and decoder
MAX_LAYERS = 1000  # more than any model has; transformers lists them as soon as it reads their number


@strict
class HuluMedVisionConfig(PreTrainedConfig):
    """The vision encoder. Defaults are those of every released size (SigLIP-so400m)."""

    model_type = "hulumed_vision"
    base_config_key = "vision_encoder_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    image_mean: float = 0.5
    image_std: float = 0.5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        name = "HuluMedVisionConfig"
        _check_sizes(name, self, (*SIZES, "num_channels", "patch_size"))
        for key in ("rope_theta", "image_std"):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                _refuse(name, f"{key} {value!r}", "a number above 0")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            _refuse(
                name, f"hidden_size {self.hidden_size} and {self.num_attention_heads} heads",
                "a head_dim divisible by 4, for two axes of rotated pairs",
            )  # fmt: skip
        if self.hidden_act not in ("gelu_pytorch_tanh", "gelu_tanh"):
            _refuse(name, f"hidden_act {self.hidden_act!r}", "'gelu_pytorch_tanh'")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class HuluMedConfig(PreTrainedConfig):
    """What the released config adds to its decoder's. Use :meth:`from_pretrained`, which returns
    :class:`HuluMedQwen2Config` or :class:`HuluMedQwen3Config`.

    image_token_index: id of ``<image>``, one per visual token; it differs between the sizes, so there is
    no default. use_token_compression: whether clips are pruned. pruning: the arguments of
    :func:`hulukern.pruning.prune_patches` for that, ``{"rule": "previous"}`` unless said; the released
    code's own defects come with ``{"rule": "released"}``.
    """

    sub_configs = {"vision_encoder_config": HuluMedVisionConfig}

    vision_encoder_config: Any = None
    mm_projector_type: str = "mlp2x_gelu"
    image_token_index: int | None = None
    use_token_compression: bool = True
    pruning: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.vision_encoder_config
        if given is None:
            self.vision_encoder_config = HuluMedVisionConfig()
        elif isinstance(given, dict):
            self.vision_encoder_config = HuluMedVisionConfig(**{k: v for k, v in given.items() if k != "model_type"})
        elif not isinstance(given, HuluMedVisionConfig):
            _refuse("HuluMedConfig", f"vision_encoder_config of type {type(given).__name__}", "a dictionary")
        if self.mm_projector_type != "mlp2x_gelu":
            _refuse("HuluMedConfig", f"mm_projector_type {self.mm_projector_type!r}", "'mlp2x_gelu'")
        if self.pruning is None:
            self.pruning = {"rule": "previous"}
        check_rule("HuluMedConfig", self.pruning)
        _check_sizes("HuluMedConfig", self, (*SIZES, "vocab_size", "num_key_value_heads"))
        super().__post_init__(**kwargs)
        _check_sizes("HuluMedConfig", self, ("head_dim",))  # where the decoder has no such field, it is there by now
        heads, groups = getattr(self, "num_attention_heads", 1), getattr(self, "num_key_value_heads", 1)
        if heads % groups:
            _refuse("HuluMedConfig", f"num_attention_heads {heads}", f"a multiple of num_key_value_heads = {groups}")

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str], **kwargs: Any) -> HuluMedConfig:
        """Read a folder's ``config.json``: either released layout, or transformers' ``video_llama_3``.

        Raises:
            ValueError: another ``model_type``, no id for the image token, a size that cannot be, or a key that
            would have other files than the folder's safetensors read.
        """
        data, kwargs = PreTrainedConfig.get_config_dict(directory, **kwargs)
        return config_from_dict(data, str(Path(directory) / "config.json"), **kwargs)


@strict
class HuluMedQwen2Config(HuluMedConfig, Qwen2Config):
    model_type = "hulumed_qwen2"


@strict
class HuluMedQwen3Config(HuluMedConfig, Qwen3Config):
    model_type = "hulumed_qwen3"


FAMILIES = {"qwen2": HuluMedQwen2Config, "qwen3": HuluMedQwen3Config}


def config_from_dict(data: dict[str, Any], source: str, **overrides: Any) -> HuluMedConfig:
    """A config from the dictionary in ``source``, which error messages name."""
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind == "video_llama_3":
        data = _from_video_llama_3(data, source)
        kind = data["model_type"]
    if not isinstance(data, dict):
        _refuse(source, f"a {type(data).__name__}", "a dictionary")
    family = next((f for f in FAMILIES if kind == f"hulumed_{f}"), None)
    if family is None:
        wanted = ", ".join(f"'hulumed_{f}'" for f in FAMILIES)
        _refuse(source, f"model_type {kind!r}", f"{wanted} or 'video_llama_3'")
    data = {k: v for k, v in data.items() if k not in ("model_type", "transformers_version")}
    if isinstance(data.get("vision_encoder_config"), str):
        del data["vision_encoder_config"]  # the original layout names a path; every released encoder is the default
    _check_names(source, data, FAMILIES[family])
    _check_reach(source, data)
    if isinstance(data.get("vision_encoder_config"), dict):
        _check_names(source, data["vision_encoder_config"], HuluMedVisionConfig)
        _check_reach(source, data["vision_encoder_config"])
    try:
        config = FAMILIES[family](**{**data, **overrides})
    except Exception as error:  # a value of the wrong type, by huggingface_hub's checks or ours
        raise ValueError(f"{source}: has a value that does not fit ({' '.join(str(error).split())})") from None
    token = config.image_token_index
    if token is None:
        _refuse(source, "no image_token_index", "the id of the image token")
    if type(token) is not int or not 0 <= token < config.vocab_size:
        _refuse(source, f"image_token_index {token!r}", f"0 to below vocab_size = {config.vocab_size}")
    if config.dtype is not None and not (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point):
        _refuse(source, f"dtype {config.dtype!r}", "a floating-point type")
    return config


def _check_reach(source: str, data: dict[str, Any]) -> None:
    """A config says what its own weights are. What would have transformers open another file (a pickle among them),
    or fetch and run code of a hub repository, is refused."""
    for key in ("transformers_weights", "quantization_config"):
        if data.get(key) is not None:
            _refuse(source, f"{key} {data[key]!r}", "none: weights are model.safetensors, as they are")
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        value = data.get(key)
        if value is not None and (not isinstance(value, str) or "/" in value):
            _refuse(source, f"{key} {value!r}", "a name without '/', an implementation of transformers' own")


def _check_sizes(name: str, config: Any, keys: Sequence[str]) -> None:
    """Those that are there are whole numbers from 1; None is transformers' own default."""
    for key in keys:
        value = getattr(config, key, None)
        most = MAX_LAYERS if key == "num_hidden_layers" else math.inf
        if value is not None and not (type(value) is int and 1 <= value <= most):
            _refuse(name, f"{key} {value!r}", f"1 to {most}" if most < math.inf else "at least 1")


def _check_names(source: str, data: dict[str, Any], kind: Any) -> None:
    """A key that is nearly one of ours is a typing error, and what it meant would be lost; released configs
    hold other keys that mean nothing here."""
    fields = set(kind.__dataclass_fields__)
    for key in data:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.9) if key not in fields else []
        if near and near[0] not in data and not hasattr(PreTrainedConfig, key):
            _refuse(source, f"key {key!r}", f"{near[0]!r}")


def _from_video_llama_3(data: dict[str, Any], source: str) -> dict[str, Any]:
    text, vision = dict(data.get("text_config") or {}), dict(data.get("vision_config") or {})
    rope = vision.pop("rope_parameters", None) or {}
    known = {k: v for k, v in vision.items() if k in HuluMedVisionConfig.__dataclass_fields__}
    family = text.pop("model_type", "qwen2")
    if family not in FAMILIES:
        _refuse(source, f"text_config.model_type {family!r}", " or ".join(map(repr, FAMILIES)))
    text["tie_word_embeddings"] = text.get("tie_word_embeddings", False) or data.get("tie_word_embeddings", False)
    return {
        **text,
        "model_type": f"hulumed_{family}",
        "image_token_index": data.get("image_token_id"),
        "vision_encoder_config": {**known, "rope_theta": rope.get("rope_theta", 10000.0)},
    }


def _refuse(source: str, came: str, expected: str) -> NoReturn:
    raise ValueError(f"{source}: has {came}, expected {expected}")


AutoConfig.register("hulumed_vision", HuluMedVisionConfig, exist_ok=True)
for _config in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
