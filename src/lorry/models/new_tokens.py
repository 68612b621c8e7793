"""The new tokens of a run (`lora.new_tokens`): read from its settings or a file, added to its tokenizer and
its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorry.adapters.peft.files import grow_base
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.new_tokens import (
    NewTokens,
    add_to_tokenizer,
    grown_with,
    token_settings,
)
from lorry.config.schema.lora import LoraConfig
from lorry.disk import documents
from lorry.errors import ConfigError
from lorry.models.loading.open import OpenedModel


def read_new_tokens(given: list[str] | str) -> list[str]:
    """The tokens of a list; or of a file, in the order of their ids (added_tokens.json: {token: id}), or
    one a line. Raises ConfigError."""
    if not isinstance(given, str):
        return list(given)
    file = Path(given)
    if not file.is_file():
        raise ConfigError(
            f"lora.new_tokens={given}: no such file; write tokens as a list, new_tokens=[{given}]"
        )
    if file.suffix == ".json":
        ids = documents.read_object(file, error=ConfigError)
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids.values()):
            raise ConfigError(
                f"{file}: not an added_tokens file, an object of tokens and their ids"
            )
        return sorted(ids, key=lambda token: int(ids[token]))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read ({e})") from e
    return [line for line in lines if line]


def add_new_tokens(
    opened: OpenedModel, lora: LoraConfig, spec: LoraSpec
) -> tuple[LoraSpec, NewTokens | None]:
    """Give tokenizer and base the new tokens of a run that has any, once for all of its jobs: the spec that
    trains their rows, and they. Raises ConfigError."""
    if lora.new_tokens is None:
        return spec, None
    tokens = read_new_tokens(lora.new_tokens)
    if (new := grown_with(opened.model)) is None:
        new = add_to_tokenizer(opened.tokenizer, tokens, lora.new_token_init)
        grow_base(opened.model, new)
    elif new.ids != opened.tokenizer.convert_tokens_to_ids(tokens):
        raise ConfigError(
            "lora.new_tokens: jobs of one run share its base and tokenizer; give all of them the same tokens"
        )
    indices = token_settings(opened.model, new.ids, spec.trainable_token_indices)
    return replace(spec, trainable_token_indices=indices), new
