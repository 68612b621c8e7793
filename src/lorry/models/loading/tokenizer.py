"""The tokenizer that lies beside a model. Read by transformers, without code from the checkpoint; one
that transformers has read before and adds nothing to, by `tokenizers` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from lorry.errors import ModelError
from lorry.models.loading.describe import (
    hear_transformers,
    model_file_errors,
    read_model_json,
)
from lorry.models.loading.known.tokenizer import (
    keep_tokenizer,
    read_tokenizer_files,
    recall_tokenizer,
)
from lorry.notes import NoteCallback

# Ways to cut text before byte-pair merges, by GGUF's name: GPT-2's own, and GPT-2's with every
# digit apart (what SmolLM does).
AS_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"})
DIGITS_APART = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
TOKENIZER_FILE_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer.tiktoken",
)


def load_tokenizer(
    directory: Path, *, trust_remote_code: bool = False, add_note: NoteCallback
) -> Any | None:
    """transformers' tokenizer of a directory, or one that answers as it does (`KnownTokenizer`); None
    with a note when there is none. Raises ModelError when it is unusable.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILE_NAMES):
        add_note(f"{directory} has no tokenizer; only token ids can be used")
        return None
    if not trust_remote_code:
        known = recall_tokenizer(directory, _load_whole)
        if known is not None:
            return known
    return _load_whole(directory, trust_remote_code=trust_remote_code)


def whole_tokenizer(tokenizer: Any | None) -> Any | None:
    """transformers' own, for those who hand it on to other libraries."""
    return getattr(tokenizer, "whole", tokenizer)


def _load_whole(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer; what it says is kept. Raises ModelError."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file() and path.stat().st_size <= 1 << 24:
            document = read_model_json(path)
            if name == TOKENIZER_FILE_NAMES[0]:
                _expect_whole(document, path)
    from transformers import AutoTokenizer

    files = None if trust_remote_code else read_tokenizer_files(directory)
    with (
        model_file_errors(f"{directory}: its tokenizer cannot be read"),
        hear_transformers() as warnings,
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    # a warning is to be heard the next time as well
    if not warnings:
        keep_tokenizer(directory, files, tokenizer)
    return tokenizer


def _expect_whole(document: Mapping[str, Any], path: Path) -> None:
    """What every tokenizer.json has; without it transformers fails with a bare KeyError. Raises
    ModelError naming the file.
    """
    for key, kind, what in (("model", dict, "an object"), ("added_tokens", list, "a list")):
        if not isinstance(document.get(key), kind):
            fault = "is missing" if key not in document else f"is not {what}"
            raise ModelError(
                f"{path}: {key!r} {fault}; tokenizer.json is incomplete, download "
                "or save the tokenizer again"
            )


def set_pre_tokenizer(pre: str, tokenizer: Any) -> list[str]:
    """Let a tokenizer made from GGUF cut text as the file's ``tokenizer.ggml.pre`` says, where
    transformers fell back to GPT-2's way without a word. Returns a note if that way is unknown here
    too.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or pre in AS_GPT2:
        return []
    if pre not in DIGITS_APART:
        return [
            (
                f"this GGUF file's tokenizer splits text in an unknown way ({pre!r}); "
                "token ids may differ from the original's"
            )
        ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    return []
