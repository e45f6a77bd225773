"""Loading checkpoints: three key layouts, strictly, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

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
LISTED = 8  # keys that a message names
OWN = ("use_token_compression", "pruning", "image_token_index")  # config keys that a caller may replace
HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")  # where a config is too


def load_strict(
    from_pretrained: Callable[..., Any], name: str, directory: str | PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """transformers' ``from_pretrained`` of the class ``name``, refusing what does not fit.

    Raises:
        ValueError: keys missing or left over, or of another shape; each is listed.
        OSError: no safetensors, or a shard that the index names is not there.
    """
    path = Path(directory) / (kwargs.get("subfolder") or "")
    if path.is_dir():
        _check_files(path)
    elif Path(directory).is_absolute() or str(directory).startswith("."):
        raise OSError(f"{directory}: has nothing there, expected a checkpoint")
    if kwargs.get("config") is None:
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        where = {name: kwargs[name] for name in HUB if name in kwargs}
        kwargs["config"] = HuluMedConfig.from_pretrained(directory, **where, **own)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = from_pretrained(
        directory, *args, key_mapping=KEY_MAPPING, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, **kwargs,
    )  # fmt: skip
    problems = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(what, ()))
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            problems.append(f"{len(keys)} {what.replace('_', ' ')} ({', '.join(keys[:LISTED])}{more})")
    if problems:
        raise ValueError(f"{directory}: has {'; '.join(problems)}, expected the keys of {name}")
    return (model, info) if wants_info else model


def _check_files(directory: Path) -> None:
    """Weights are safetensors, and every shard is there: said before anything is read."""
    if not (directory / "config.json").is_file():
        raise OSError(f"{directory}: has no config.json, expected a checkpoint")
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise OSError(f"{directory}: has no model.safetensors, expected weights in that format")
        _check_header(directory / "model.safetensors")
        return
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: has content that cannot be read ({error}), expected a weight_map") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (directory / shard).is_file():
            raise OSError(f"{index}: has shard {shard!r}, expected a file beside it")
        _check_header(directory / shard)


def _check_header(file: Path) -> None:
    """Opening reads the header and compares it with the file's length."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file}: has content that cannot be read ({error}), expected safetensors") from None
