"""`lorry unmerge MERGED`: write the base a merged model came from, bit for bit, by re-reading it (never by subtracting)."""

from __future__ import annotations

import json
from pathlib import Path

from lorry.config.schema import ModelConfig
from lorry.config.settings import UnmergeSettings
from lorry.errors import ModelError
from lorry.verbs.merge import RECORD


def main(settings: UnmergeSettings, notes: list[str]) -> int:
    """Find the base in the record of the merge, check its digest, write it."""
    from lorry.bank.peft_io import base_digest
    from lorry.models.open import open_model
    from lorry.models.store import save_model

    record = Path(settings.run) / RECORD
    if not record.is_file():
        raise ModelError(f"{settings.run} has no {RECORD}; only a model written by `lorry merge` knows the base it came from")
    said = json.loads(record.read_text())
    opened = open_model(ModelConfig(name=said["base"]["name"]), notes)
    if base_digest(opened.model) != said["base_digest"]:
        raise ModelError(f"{said['base']['name']} is not the base that was merged: its weights have changed since")
    save_model(opened.model, Path(settings.output_dir), tokenizer=opened.tokenizer)
    print(settings.output_dir)
    return 0
