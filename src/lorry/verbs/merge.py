"""`lorry merge RUN`: fold an adapter into its base's weights and write a plain Hugging Face model.
Of several adapters it makes one (`merge_adapters.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.evaluation import EvalSettings
from lorry.config.merge import MergeSettings
from lorry.config.schema.model import ModelConfig
from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError
from lorry.formatting import format_count
from lorry.verbs.checks import probe
from lorry.verbs.checks.logit_check import LogitsBeforeMerge
from lorry.verbs.eval import encode_eval_rows, open_eval_source
from lorry.verbs.merge_adapters import merge_several
from lorry.verbs.open_model import (
    open_to_write,
    open_with_adapters,
    print_note,
    resolve_adapter_name,
)

if TYPE_CHECKING:
    import torch

    from lorry.adapters.mix import Mix
    from lorry.evaluate.rows import EvalRows
    from lorry.models.loading.open import OpenedModel

MERGE_RECORD_FILE = "lorry_merge.json"


def main(settings: MergeSettings) -> int:
    """Merge, write, say how much rounding cost and where the model is."""
    from lorry.models.loading.open import stored_dtype

    if settings.several:
        return merge_several(settings)
    if settings.onto == "original":
        return merge_onto_original(settings)
    stored = stored_dtype(settings.run)
    opened = open_to_write(
        ModelConfig.model_validate(
            {"name": settings.run, "dtype": probe.logits_dtype_name(settings.run, stored)}
        )
    )
    dtype = stored if settings.dtype == "auto" else settings.dtype
    write_merged(
        opened,
        {resolve_adapter_name(opened, settings.adapter, settings.run): settings.weight},
        settings.output_dir,
        dtype,
    )
    print(settings.output_dir)
    return 0


def merge_onto_original(settings: MergeSettings) -> int:
    """Merge onto the weights of the base's files, which the adapter was not trained over; tell the loss on
    the given rows of the adapter over what it was trained over, and of what was written. Raises
    ConfigError where there are no two bases."""
    from lorry.adapters.mix import Mix
    from lorry.models.loading.describe import has_packed_matrices
    from lorry.models.loading.open import stored_dtype
    from lorry.models.loading.reopen import free_model_memory

    stored = stored_dtype(settings.run)
    computed = probe.logits_dtype_name(settings.run, stored)
    model = {"name": settings.run, "dtype": computed}
    trained = open_with_adapters(ModelConfig.model_validate(model))
    name = resolve_adapter_name(trained, settings.adapter, settings.run)
    held = trained.source["quantize"]
    if held is None or has_packed_matrices(Path(trained.source["path"])):
        raise ConfigError(
            f"onto=original: {settings.run} was trained over {'' if held is None else 'packed '}weights that its "
            "base's files hold, and there are no others; leave onto out"
        )
    evaluation = EvalSettings.model_validate(
        {"model": {"name": settings.run}, "data": settings.data.model_dump()}
    )
    rows = encode_eval_rows(evaluation, trained, open_eval_source(evaluation))
    mix = Mix.constants({name: settings.weight}) if settings.weight else Mix.none()
    losses = [loss_of_rows(trained, rows, mix, evaluation.batch_size)]
    free_model_memory(trained.model)
    opened = open_with_adapters(ModelConfig.model_validate({**model, "other_base": True}))
    dtype = stored if settings.dtype == "auto" else settings.dtype
    write_merged(opened, {name: settings.weight}, settings.output_dir, dtype)
    written = open_with_adapters(
        ModelConfig.model_validate({"name": str(settings.output_dir), "dtype": computed})
    )
    losses.append(loss_of_rows(written, rows, Mix.none(), evaluation.batch_size))
    print_note(
        f"loss on {format_count(len(rows.rows), 'row')} of {settings.data.path}: {losses[0]:.4f} over the base "
        f"held in {held}, as trained; {losses[1]:.4f} merged onto the original weights and stored in {dtype} "
        f"({losses[1] - losses[0]:+.4f}, of which rounding to {dtype} is a part); computed in {computed}"
    )
    print(settings.output_dir)
    return 0


def loss_of_rows(opened: OpenedModel, rows: EvalRows, mix: Mix, batch_rows: int) -> float:
    """Nats a supervised token."""
    from lorry.evaluate.rows import evaluate_rows

    return evaluate_rows(opened.model, rows, mix, batch_rows=batch_rows).metrics["loss"]


def write_merged(
    opened: OpenedModel,
    weights: dict[str, float],
    output: Path,
    dtype: str,
    measure: Callable[[Any], list[str]] | None = None,
) -> None:
    """Stream base + ``weights`` {adapter: g} times the adapters, what they were trained over
    included, into ``output``, one tensor at a time, in fp32 and rounded once to ``dtype``; open it
    again with transformers and compare logits on a few rows before it gets its name. ``measure``:
    what else to tell of the model opened again. ``opened`` is of no use afterwards.

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
    rows = list[MergeRow]()
    untied = separates_tied_head(opened.model, weights)
    before = LogitsBeforeMerge.of(opened, weights)
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
            json.dumps(merge_record(opened, weights), indent=1) + "\n", encoding="utf-8"
        )
        # after everything is written, for it changes the model in memory
        rounded = before.rounded(opened, weights, torch_dtype)
        free_model_memory(opened.model)
        again = reopen_model(folder, before.dtype)
        lines = before.compare(again, dtype, rounded=rounded)
        lines += [] if measure is None else measure(again)
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
            "note: output head and embedding were tied and no longer are; "
            "config.json has tie_word_embeddings=false"
        )
    if report.warning:
        print_note(f"warning: {report.warning}{' (dtype=float32)' if dtype != 'float32' else ''}")


def merge_record(opened: OpenedModel, weights: Mapping[str, float]) -> dict[str, Any]:
    """What a merge was made of: the base's directory, what it was opened as, the SHA-256 of its
    weight files, the adapter and its weight (of several ``adapters``), and what that was trained
    over.
    """
    from lorry.adapters.attach import get_bank

    base = Path(opened.source["path"])
    # of the base as it is now: unmerge must be able to tell that nobody changed it since
    digests = {file.name: file_digest(file) for file in weight_files(base)}
    model_path = Path(opened.source["name"])
    # absolute: unmerge may be called from another folder
    opened_as = str(model_path.resolve()) if model_path.exists() else opened.source["name"]
    record = {"base": str(base), "opened_as": opened_as, "base_weights": digests}
    start = get_bank(opened.model).start
    over = {} if start is None else {"start": {"path": start.path, "sha256": start.sha256}}
    if len(weights) > 1:
        return {**record, "adapters": dict(weights), **over}
    ((name, weight),) = weights.items()
    return {**record, "adapter": name, "weight": weight, **over}


def weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold a model's tensors."""
    yield from sorted(folder.glob("*.safetensors"))
