"""Loading checkpoints: three key layouts, strictly, safetensors only."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import HuluMedConfig

# The released Hugging Face layout needs no mapping. The original one has a level more; transformers'
# video_llama_3 names its three parts.
KEY_MAPPING = {
    r"^model\.vision_encoder\.vision_encoder\.": "model.vision_encoder.",
    r"^model\.vision_model\.": "model.vision_encoder.",
    r"^model\.projector\.": "model.mm_projector.",
    r"^model\.language_model\.": "model.",
}
IGNORED = "rotary_emb.inv_freq"  # a buffer in old checkpoints, which transformers leaves out as well
PROBLEMS = ("missing", "unexpected", "mismatched")  # keys, as transformers tells them
LISTED = 8  # keys that a message names
OWN = ("use_token_compression", "pruning", "image_token_index")  # config keys that a caller may replace
HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")  # where a config is too


def load_strict(
    from_pretrained: Callable[..., Any], kind: Any, directory: str | PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """transformers' ``from_pretrained`` of the class ``kind``, refusing what does not fit. In a folder, config and
    headers tell that before anything is allocated.

    Raises:
        ValueError: keys missing or left over, or of another shape (each is listed); an index that does not fit
            its shards; a config that no model can be built from.
        OSError: no safetensors, or a shard that the index names is not there.
    """
    path = Path(directory) / (kwargs.get("subfolder") or "")
    shapes = None
    if path.is_dir():
        shapes = _read_headers(path)
    elif Path(directory).is_absolute() or str(directory).startswith("."):
        raise OSError(f"{directory}: has nothing there, expected a checkpoint")
    config = kwargs.get("config")
    if config is None or isinstance(config, (str, PathLike)):
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        where = {name: kwargs[name] for name in HUB if name in kwargs}
        kwargs["config"] = HuluMedConfig.from_pretrained(config or directory, **where, **own)
    if shapes is not None:
        _compare(directory, kind, kwargs["config"], shapes)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = from_pretrained(
        directory, *args, key_mapping=KEY_MAPPING, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, **kwargs,
    )  # fmt: skip
    _refuse_keys(directory, kind, {name: map(str, info.get(f"{name}_keys", ())) for name in PROBLEMS})
    return (model, info) if wants_info else model


def _compare(directory: str | PathLike[str], kind: Any, config: HuluMedConfig, shapes: dict[str, list[int]]) -> None:
    """The keys and shapes that the config asks for against those of the files, with a model on the meta device."""
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    except Exception as error:  # sizes that overflow or do not divide, in whatever words
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{directory}: has a config that makes no model ({text}), expected one that does") from None
    wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    found: dict[str, list[int]] = {}
    twice = []
    for key, shape in shapes.items():
        for pattern, replacement in KEY_MAPPING.items():
            key = re.sub(pattern, replacement, key)
        if key in found:
            twice.append(key)
        if IGNORED not in key:
            found[key] = shape
    other = [key for key in wanted.keys() & found.keys() if wanted[key] != found[key]]
    _refuse_keys(directory, kind, {
        "missing": wanted.keys() - found.keys() - tied,
        "unexpected": found.keys() - wanted.keys(),
        "mismatched": [f"{key} {found[key]} for {wanted[key]}" for key in other],
        "repeated": twice,
    })  # fmt: skip


def _refuse_keys(directory: str | PathLike[str], kind: Any, problems: dict[str, Iterable[str]]) -> None:
    told = []
    for what, keys in problems.items():
        listed = sorted(keys)
        if listed:
            told.append(f"{len(listed)} {what} keys ({_shown(listed)})")
    if told:
        raise ValueError(f"{directory}: has {'; '.join(told)}, expected the keys of {kind.__name__}")


def _shown(keys: list[str]) -> str:
    return ", ".join(keys[:LISTED]) + (f" and {len(keys) - LISTED} more" if len(keys) > LISTED else "")


def _read_headers(directory: Path) -> dict[str, list[int]]:
    """Keys and shapes of the weights. Weights are safetensors, every shard is there and holds just what the index
    says: told before anything else is read."""
    if not (directory / "config.json").is_file():
        raise OSError(f"{directory}: has no config.json, expected a checkpoint")
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():  # transformers takes it first, too
        return _read_header(directory / "model.safetensors")
    if not index.is_file():
        raise OSError(f"{directory}: has no model.safetensors, expected weights in that format")
    try:
        data = json.loads(index.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: has content that cannot be read ({error}), expected a weight_map") from None
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: has no weight_map or an empty one, expected a shard for each key")
    for shard in places.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not (directory / shard).is_file():
            raise OSError(f"{index}: has shard {shard!r}, expected a file beside it")
    if not isinstance(data.get("metadata"), dict):
        raise ValueError(f"{index}: has no metadata, expected a dictionary, which transformers reads")
    shapes: dict[str, list[int]] = {}
    for shard in sorted(set(places.values())):
        header = _read_header(directory / shard)
        stray = sorted(header.keys() ^ {key for key, place in places.items() if place == shard})
        if stray:
            raise ValueError(
                f"{directory / shard}: has not the keys its index says ({_shown(stray)}), expected the same"
            )
        shapes |= header
    return shapes


def _read_header(file: Path) -> dict[str, list[int]]:
    """Opening reads the header and compares it with the file's length."""
    try:
        with safe_open(file, "pt") as weights:
            keys = weights.keys()
            return {key: list(weights.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{file}: has content that cannot be read ({error}), expected safetensors") from None
