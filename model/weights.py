"""Loading checkpoints: three key layouts, strictly, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

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


def load_strict(
    from_pretrained: Callable[..., Any], name: str, directory: str | PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """transformers' ``from_pretrained`` of the class ``name``, refusing what does not fit.

    Raises:
        ValueError: keys missing or left over, or of another shape; each is listed.
        OSError: no safetensors, or a shard that the index names is not there.
    """
    if Path(directory).is_dir():
        _check_files(Path(directory))
    if kwargs.get("config") is None:
        kwargs["config"] = HuluMedConfig.from_pretrained(directory)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = from_pretrained(
        directory, *args, key_mapping=KEY_MAPPING, use_safetensors=True, output_loading_info=True, **kwargs
    )
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
        return
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: has content that cannot be read ({error}), expected a weight_map") from None
    for shard in shards:
        if Path(shard).name != shard or not (directory / shard).is_file():
            raise OSError(f"{index}: has shard {shard!r}, expected a file beside it")
