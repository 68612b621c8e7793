"""`lorry merge RUN`: fold an adapter into its base's weights and write a plain Hugging Face model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema import ModelConfig
from lorry.config.settings import MergeSettings
from lorry.verbs.opening import chosen_adapter, opened, tell

if TYPE_CHECKING:
    from lorry.models.open import Opened

RECORD = "lorry_merge.json"


def main(settings: MergeSettings, notes: list[str]) -> int:
    """Merge, write, say how much rounding cost and where the model is."""
    from lorry.models.open import stored_dtype

    dtype = stored_dtype(settings.run) if settings.dtype == "auto" else settings.dtype
    found = opened(ModelConfig.model_validate({"name": settings.run, "dtype": dtype}))
    write_merged(found, chosen_adapter(found, settings.adapter, settings.run), settings.output_dir, dtype)
    print(settings.output_dir)
    return 0


def write_merged(found: Opened, name: str, output: Path, dtype: str) -> None:
    """Stream base + adapter into ``output``, one tensor at a time, in fp32 and rounded once to ``dtype``.

    The base's place and digests are recorded beside it, so that `lorry unmerge` can give it back. Tells what rounding cost as
    |stored - exact| / |delta|. Raises ConfigError for a place that is taken, ModelError if a merged weight is not finite.
    """
    import torch

    from lorry.bank.merge import MergeReport, MergeRow, merged_tensors, unties
    from lorry.disk import durable
    from lorry.models.store import save_model

    kind: torch.dtype = getattr(torch, dtype)
    weights, rows = {name: 1.0}, list[MergeRow]()
    untied = unties(found.model, weights)
    save_model(
        found.model, output,
        tensors=merged_tensors(found.model, weights, dtype=kind, rows=rows),
        config_overrides={"tie_word_embeddings": False} if untied else {},
        tokenizer=found.tokenizer, generation_config=found.source["generation_config"] or None, dtype=kind,
    )  # fmt: skip
    durable.write_files(output, {RECORD: (json.dumps(record(found, name), indent=1) + "\n").encode()})
    report = MergeReport(tuple(rows), kind, untied)
    tell(f"merged {len(rows)} modules into {dtype}; rounding changed {report.ratio:.2%} of the adapter's effect")
    if untied:
        tell("note: head and embedding shared a weight and no longer do; config.json says tie_word_embeddings=false")
    if report.warning:
        tell(f"warning: {report.warning}{' (dtype=float32)' if dtype != 'float32' else ''}")


def record(found: Opened, name: str) -> dict[str, Any]:
    """What a merge was made of: the base's directory, what it was opened as, the SHA-256 of its weight files, the adapter."""
    base = Path(found.source["path"])
    digests = {file.name: sha256(file) for file in weight_files(base)}
    asked = Path(found.source["name"])
    opened_as = str(asked.resolve()) if asked.exists() else found.source["name"]
    return {"base": str(base), "opened_as": opened_as, "base_weights": digests, "adapter": name}


def weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold a model's tensors."""
    yield from sorted(folder.glob("*.safetensors"))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
