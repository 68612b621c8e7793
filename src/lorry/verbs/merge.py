"""`lorry merge RUN`: fold an adapter into its base's weights and write a plain Hugging Face model.
Of several adapters it makes one (`merge_adapters.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.merge import MergeSettings
from lorry.config.schema import ModelConfig
from lorry.disk.integrity import file_digest
from lorry.verbs import probe
from lorry.verbs.logit_check import LogitsBeforeMerge
from lorry.verbs.merge_adapters import merge_several
from lorry.verbs.open_model import open_with_adapters, print_note, resolve_adapter_name

if TYPE_CHECKING:
    import torch

    from lorry.models.loading.open import OpenedModel

MERGE_RECORD_FILE = "lorry_merge.json"


def main(settings: MergeSettings) -> int:
    """Merge, write, say how much rounding cost and where the model is."""
    from lorry.models.loading.open import stored_dtype

    if settings.several:
        return merge_several(settings)
    stored = stored_dtype(settings.run)
    opened = open_with_adapters(
        ModelConfig.model_validate(
            {"name": settings.run, "dtype": probe.logits_dtype_name(settings.run, stored)}
        )
    )
    dtype = stored if settings.dtype == "auto" else settings.dtype
    write_merged(
        opened,
        resolve_adapter_name(opened, settings.adapter, settings.run),
        settings.output_dir,
        dtype,
        settings.weight,
    )
    print(settings.output_dir)
    return 0


def write_merged(
    opened: OpenedModel, name: str, output: Path, dtype: str, weight: float = 1.0
) -> None:
    """Stream base + ``weight`` times the adapter, what it was trained over included, into
    ``output``, one tensor at a time, in fp32 and rounded once to
    ``dtype``; open it again with transformers and compare logits on a few rows before it gets its
    name. ``opened`` is of no use afterwards.

    The base's place and digests are recorded beside it, so that `lorry unmerge` can give it back. Tells what rounding cost as
    |stored - exact| / |delta| of the weights, and in logits against what the adapter moves them. Raises ConfigError for a place
    that is taken, ModelError if a merged weight is not finite, ContractError if the model opened again is another one.
    """
    import torch

    from lorry.adapters.merge import MergeReport, MergeRow, merged_tensors, separates_tied_head
    from lorry.disk import durable
    from lorry.models.loading.reopen import free_model_memory, reopen_model
    from lorry.models.loading.store import save_model

    torch_dtype: torch.dtype = getattr(torch, dtype)
    weights, rows = {name: weight}, list[MergeRow]()
    untied = separates_tied_head(opened.model, weights)
    before = LogitsBeforeMerge.of(opened, name, weight)
    with durable.build_directory(output) as folder:
        save_model(
            opened.model,
            folder,
            tensors=merged_tensors(opened.model, weights, dtype=torch_dtype, rows=rows),
            # an adapter on a tied head changes the head only, so the two can no longer be one
            # tensor
            config_overrides={"tie_word_embeddings": False} if untied else {},
            tokenizer=opened.tokenizer,
            generation_config=opened.source["generation_config"] or None,
            dtype=torch_dtype,
        )
        # in the folder that is being built, so that a model and its record appear together
        (folder / MERGE_RECORD_FILE).write_text(
            json.dumps(merge_record(opened, name, weight), indent=1) + "\n", encoding="utf-8"
        )
        # after everything is written, for it changes the model in memory
        rounded = before.rounded(opened, weights, torch_dtype)
        free_model_memory(opened.model)
        lines = before.compare(reopen_model(folder, before.dtype), dtype, rounded=rounded)
    # rows are complete only now: `merged_tensors` fills them while the file is written
    report = MergeReport(tuple(rows), torch_dtype, untied)
    whose = "the adapter's effect" if before.side == "base" else "the effect of adapter and start"
    print_note(
        f"merged {len(rows)} modules into {dtype}; rounding changed {report.ratio:.2%} of {whose}"
    )
    for line in lines:
        print_note(line)
    if untied:
        print_note(
            "note: head and embedding shared a weight and no longer do; config.json says tie_word_embeddings=false"
        )
    if report.warning:
        print_note(f"warning: {report.warning}{' (dtype=float32)' if dtype != 'float32' else ''}")


def merge_record(opened: OpenedModel, name: str, weight: float = 1.0) -> dict[str, Any]:
    """What a merge was made of: the base's directory, what it was opened as, the SHA-256 of its
    weight files, the adapter and its weight, and what that was trained over.
    """
    from lorry.adapters.attach import get_bank

    base = Path(opened.source["path"])
    # of the base as it is now: unmerge must be able to tell that nobody changed it since
    digests = {file.name: file_digest(file) for file in weight_files(base)}
    model_path = Path(opened.source["name"])
    # absolute: unmerge may be called from another folder
    opened_as = str(model_path.resolve()) if model_path.exists() else opened.source["name"]
    record = {"base": str(base), "opened_as": opened_as, "base_weights": digests, "adapter": name}
    start = get_bank(opened.model).start
    over = {} if start is None else {"start": {"path": start.path, "sha256": start.sha256}}
    return {**record, "weight": weight, **over}


def weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold a model's tensors."""
    yield from sorted(folder.glob("*.safetensors"))
