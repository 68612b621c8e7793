"""`lorry export RUN to=hf|peft|gguf|gguf-lora|hf-moe`: a run for another library, reloaded before we say
that it worked: by that library, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorry.config.schema import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError
from lorry.verbs import probe
from lorry.verbs.export_gguf import (
    GGUF_OUTTYPES,
    export_gguf,
    export_gguf_lora,
    export_gguf_mixture,
)
from lorry.verbs.export_moe import export_experts
from lorry.verbs.logit_check import LogitsBeforeMerge, load_adapted_model
from lorry.verbs.merge import write_merged
from lorry.verbs.open_model import open_with_adapters, print_note, resolve_adapter_name

if TYPE_CHECKING:
    from lorry.models.loading.open import OpenedModel


def main(settings: ExportSettings) -> int:
    """Write the export, open it again in its own library, compare logits, print where it is."""
    from lorry.models.loading.open import stored_dtype

    _refuse_unused(settings)
    if settings.to == "hf-moe":
        export_experts(settings)
        print(settings.output_dir)
        return 0
    assert settings.run is not None  # the settings say so
    stored = stored_dtype(settings.run)
    if settings.to == "gguf" and (folder := _mixture_folder(settings.run)) is not None:
        outtype = GGUF_OUTTYPES[stored] if settings.outtype == "auto" else settings.outtype
        title = Path(settings.run).name
        if settings.adapter is not None or settings.weight != 1.0:
            raise ConfigError(
                f"{settings.run} is a plain model and has no adapter or weight of one"
            )
        print(export_gguf_mixture(folder, settings.output_dir, outtype, title=title))
        return 0
    opened = open_with_adapters(
        ModelConfig.model_validate(
            {"name": settings.run, "dtype": probe.logits_dtype_name(settings.run, stored)}
        )
    )
    if settings.to == "gguf":
        # a model without an adapter has something to say to llama.cpp, too
        plain = not opened.adapters and settings.adapter is None and settings.weight == 1.0
        name = None if plain else resolve_adapter_name(opened, settings.adapter, settings.run)
        outtype = GGUF_OUTTYPES[stored] if settings.outtype == "auto" else settings.outtype
        title = Path(settings.run).name
        print(export_gguf(opened, name, settings.output_dir, outtype, settings.weight, title=title))
        return 0
    name = resolve_adapter_name(opened, settings.adapter, settings.run)
    if settings.to == "gguf-lora":
        outtype = "f32" if settings.outtype == "auto" else settings.outtype
        print(export_gguf_lora(opened, name, settings.output_dir, outtype, settings.weight))
        return 0
    if settings.to == "hf":
        write_merged(
            opened,
            name,
            settings.output_dir,
            stored if settings.dtype == "auto" else settings.dtype,
            settings.weight,
        )
    else:
        export_peft(opened, name, settings.output_dir, settings.weight)
    print(settings.output_dir)
    return 0


def _mixture_folder(run: str) -> Path | None:
    """The directory of a plain mixture of experts; None for anything else."""
    from lorry.models.gguf.architecture import MIXTURES
    from lorry.models.loading.describe import read_model_json
    from lorry.models.loading.sources import resolve_model
    from lorry.notes import ignore_note

    location = resolve_model(run, add_note=ignore_note)
    kind = read_model_json(location.directory / "config.json").get("model_type")
    return location.directory if location.adapter is None and kind in MIXTURES else None


def _refuse_unused(settings: ExportSettings) -> None:
    """Raise ConfigError for a number format that this kind of export does not use."""
    gguf = settings.to.startswith("gguf")
    if gguf and settings.dtype != "auto":
        raise ConfigError(
            f"dtype={settings.dtype} is for to=hf; of to={settings.to} outtype= names how values are stored "
            "(outtype=f32, f16, bf16, and of a model q8_0, q4_0)"
        )
    if settings.to == "peft" and settings.dtype != "auto":
        raise ConfigError(
            f"dtype={settings.dtype} is for to=hf; an adapter is stored in float32, as it was trained"
        )
    if not gguf and settings.outtype != "auto":
        raise ConfigError(f"outtype={settings.outtype} is for to=gguf; to=hf has dtype=")
    if settings.to == "gguf-lora" and settings.outtype in ("q8_0", "q4_0"):
        raise ConfigError(
            f"outtype={settings.outtype}: the short rows of an adapter do not divide into blocks of 32; "
            "take f32, f16 or bf16"
        )


def export_peft(opened: OpenedModel, name: str, output: Path, weight: float = 1.0) -> None:
    """The adapter's directory as PEFT writes it, ``weight`` times the adapter and what it was
    trained over in one, opened again before it gets its name. ``opened`` is of no use afterwards.

    Raises ConfigError for a place that is taken, ContractError if the adapter opened again is
    another one.
    """
    from lorry.disk import durable
    from lorry.models.loading.reopen import free_model_memory

    # of the model in memory, which is freed before the export is opened
    before = LogitsBeforeMerge.of(opened, name, weight)
    with durable.build_directory(output) as folder:
        write_peft(opened, name, folder, weight)
        # two models at once need not fit
        free_model_memory(opened.model)
        model, library = load_adapted_model(folder, opened.source["path"], before.dtype)
        lines = before.compare(model, "float32", library)
    for line in lines:
        print_note(line)


def write_peft(opened: OpenedModel, name: str, folder: Path, weight: float = 1.0) -> None:
    """The files of the adapter and its tokenizer, into an existing folder."""
    from lorry.adapters.peft.files import plain_adapter_files

    files = plain_adapter_files(opened.model, name, weight=weight, base_name=opened.source["path"])
    for file, content in files.items():
        (folder / file).write_bytes(content)
    opened.tokenizer.save_pretrained(folder)
