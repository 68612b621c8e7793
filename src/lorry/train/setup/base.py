"""The model that a run begins with, refused where it cannot be this run's."""

from __future__ import annotations

from pathlib import Path

from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.config import RunConfig
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError
from lorry.models.converter import ModelConverter
from lorry.models.layer_weights import Sharder
from lorry.models.loading.describe import has_packed_matrices
from lorry.models.loading.open import OpenedModel, open_model, refuse_mixture
from lorry.models.loading.sources import resolve_model
from lorry.notes import NoteCallback, ignore_note
from lorry.tasks.registry import TASKS


def open_base(
    run: RunConfig,
    add_note: NoteCallback,
    ranks: TensorRanks | None = None,
    shard: Sharder | None = None,
    convert: ModelConverter | None = None,
) -> OpenedModel:
    """The model that the run begins with. ``ranks``: those that share it; ``shard``, ``convert``: as in
    `load_model`. Raises ConfigError where it cannot be this run's, and what `open_model` raises.
    """
    if ranks is not None and run.lora is None:
        raise ConfigError(
            f"lora=null with backend.tensor_parallel={ranks.size}: base weights train where each "
            "process has whole ones; leave tensor_parallel out, or train an adapter"
        )
    if run.lora is None:
        _refuse_packed_files(run.model)
    opened = open_model(
        run.model,
        add_note,
        as_start=TASKS[run.task].over_start,
        ranks=ranks,
        shard=shard,
        convert=convert,
    )
    if opened.tokenizer is None:
        raise ConfigError(
            f"{run.model.name} has no tokenizer files; put tokenizer.json beside the weights"
        )
    if opened.mixture is not None:
        refuse_mixture(run.model.name)
    if len(run.jobs) > 1 and opened.adapters:
        raise ConfigError(
            f"{run.model.name} already has an adapter, and jobs start with new "
            "ones; name its base model, or merge it"
        )
    # the files to read would be moved to previous/N, or written over at the end
    begins_with = {Path(opened.source["path"]).resolve()}
    if TASKS[run.task].over_start:
        adapters = (opened.source.get("adapter"), run.model.adapter)
        begins_with |= {Path(path).resolve() for path in adapters if path}
    if run.output_dir.resolve() in begins_with:
        raise ConfigError(
            f"{run.output_dir} holds the model that this run starts from and would "
            "move away; give another output_dir"
        )
    return opened


def _refuse_packed_files(model: ModelConfig) -> None:
    """Raises ConfigError for a base whose own weights should train and are packed in its files."""
    directory = resolve_model(model.name, revision=model.revision, add_note=ignore_note).directory
    if has_packed_matrices(directory):
        raise ConfigError(
            f"lora=null: {directory} holds its matrices packed, and packed weights cannot train; give the "
            "unquantised checkpoint, or train an adapter"
        )
