"""The tokenizer that lies beside a model. Read by transformers, without code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lorry.models.describe import blaming, read_json

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer.tiktoken")


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False, notes: list[str]) -> Any | None:
    """transformers' tokenizer of a directory, or None with a note when it has none. Raises ModelError when it is unusable."""
    if not any((directory / name).is_file() for name in FILES):
        notes.append(f"{directory} has no tokenizer; only token ids can be used")
        return None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file() and path.stat().st_size <= 1 << 24:
            read_json(path)
    with blaming(f"{directory}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code, local_files_only=True)
