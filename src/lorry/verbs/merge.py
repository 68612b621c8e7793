"""`lorry merge RUN`: fold an adapter into its base's weights and write a plain Hugging Face model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lorry.config.schema import ModelConfig
from lorry.config.settings import ExportSettings, MergeSettings
from lorry.errors import ConfigError

RECORD = "lorry_merge.json"


def main(settings: MergeSettings, notes: list[str]) -> int:
    """Merge, write, say how much rounding cost and where the model is."""
    print(merge_to(settings, notes))
    return 0


def merge_to(settings: MergeSettings | ExportSettings, notes: list[str]) -> Path:
    """Stream base + adapter into `output_dir` (one tensor at a time, in fp32, rounded once); the source is recorded beside it,
    so that `lorry unmerge` can re-read the base. Prints |stored - exact| / |delta| and warns above a tenth."""
    import torch

    from lorry.bank.attach import bank_of
    from lorry.bank.merge import MergeReport, MergeRow, merged_tensors, unties
    from lorry.bank.peft_io import base_digest
    from lorry.disk import durable
    from lorry.models.open import open_model
    from lorry.models.store import save_model

    opened = open_model(ModelConfig(name=settings.run), notes)
    if not opened.adapters:
        raise ConfigError(f"{settings.run} is a plain model; there is no adapter to merge")
    name = settings.adapter or opened.adapters[0]
    bank_of(opened.model)[name]
    weights, rows = {name: 1.0}, list[MergeRow]()
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    untied = unties(opened.model, weights)
    tensors = merged_tensors(opened.model, weights, dtype=dtype, rows=rows)
    overrides = {"tie_word_embeddings": False} if untied else {}
    output = Path(settings.output_dir)
    save_model(opened.model, output, tensors=tensors, config_overrides=overrides, tokenizer=opened.tokenizer, dtype=dtype)
    record = {"base": opened.source, "base_digest": base_digest(opened.model), "adapter": settings.run, "weights": weights}
    durable.write_files(output, {RECORD: (json.dumps(record, indent=1, default=str) + "\n").encode()})
    report = MergeReport(tuple(rows), dtype or opened.model.dtype, untied)
    print(f"merged {len(rows)} modules; rounding changed {report.ratio:.2%} of the adapter's effect", file=sys.stderr)
    if report.warning:
        print(f"warning: {report.warning}", file=sys.stderr)
    return output
