"""`lorry export RUN to=hf|dense|peft|gguf|gguf-lora|hf-moe`: a run for another library, reloaded before we say
that it worked: by that library, where it is installed.
"""

from __future__ import annotations

from pathlib import Path

from lorry.config.schema.model import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError
from lorry.verbs.checks import probe
from lorry.verbs.exports.gguf import (
    GGUF_OUTTYPES,
    export_gguf,
    export_gguf_lora,
    export_gguf_mixture,
)
from lorry.verbs.exports.mixture import export_mixture, is_mixture
from lorry.verbs.exports.moe import export_experts
from lorry.verbs.exports.peft import export_peft
from lorry.verbs.merge import write_merged
from lorry.verbs.open_model import (
    open_to_write,
    open_with_adapters,
    print_note,
    resolve_adapter_name,
)


def main(settings: ExportSettings) -> int:
    """Write the export, open it again in its own library, compare logits, print where it is."""
    from lorry.adapters.quantization.linear import quantization_of
    from lorry.models.loading.open import stored_dtype

    _refuse_unused(settings)
    if settings.run is None:
        export_experts(settings)
        print(settings.output_dir)
        return 0
    if _is_of_several(settings):
        print(export_mixture(settings))
        return 0
    stored = stored_dtype(settings.run)
    if settings.to == "gguf" and (folder := _mixture_folder(settings.run)) is not None:
        outtype = GGUF_OUTTYPES[stored] if settings.outtype == "auto" else settings.outtype
        title = Path(settings.run).name
        if settings.adapter is not None or settings.weight != 1.0:
            raise ConfigError(
                f"{settings.run} is a plain model: it has no adapter, so weight= does not apply"
            )
        print(export_gguf_mixture(folder, settings.output_dir, outtype, title=title))
        return 0
    # an adapter alone says which base it belongs to, with what that was held in
    open_run = open_with_adapters if settings.to in ("peft", "gguf-lora") else open_to_write
    opened = open_run(
        ModelConfig.model_validate(
            {"name": settings.run, "dtype": probe.logits_dtype_name(settings.run, stored)}
        )
    )
    quantization = quantization_of(opened.model)
    if (
        settings.to in ("peft", "gguf-lora")
        and quantization is not None
        and not quantization.keeps_values
    ):
        print_note(
            f"note: the adapter was trained over a base held in {quantization.name}; over the plain weights its "
            "answers are not quite those that were measured. to=hf or to=gguf writes the model it was trained as"
        )
    if settings.to == "gguf":
        # a model without an adapter has something to say to llama.cpp, too
        plain = not opened.adapters and settings.adapter is None and settings.weight == 1.0
        weights = (
            {}
            if plain
            else {resolve_adapter_name(opened, settings.adapter, settings.run): settings.weight}
        )
        outtype = GGUF_OUTTYPES[stored] if settings.outtype == "auto" else settings.outtype
        title = Path(settings.run).name
        print(export_gguf(opened, weights, settings.output_dir, outtype, title=title))
        return 0
    name = resolve_adapter_name(opened, settings.adapter, settings.run)
    if settings.to == "gguf-lora":
        outtype = "f32" if settings.outtype == "auto" else settings.outtype
        print(export_gguf_lora(opened, name, settings.output_dir, outtype, settings.weight))
        return 0
    if settings.to == "hf":
        write_merged(
            opened,
            {name: settings.weight},
            settings.output_dir,
            stored if settings.dtype == "auto" else settings.dtype,
        )
    else:
        export_peft(opened, name, settings.output_dir, settings.weight)
    print(settings.output_dir)
    return 0


def _is_of_several(settings: ExportSettings) -> bool:
    """Whether all experts of a run are meant, and not one adapter."""
    if settings.to in ("hf-moe", "dense") or settings.weights:
        return True
    mixture = settings.to in ("gguf", "peft") and is_mixture(str(settings.run))
    return mixture and settings.adapter is None


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
            f"dtype={settings.dtype} is for to=hf; with to={settings.to} give "
            "outtype= (f32, f16 or bf16; for a model also q8_0 or q4_0)"
        )
    if settings.to == "peft" and settings.dtype != "auto":
        raise ConfigError(
            f"dtype={settings.dtype} is for to=hf; an adapter is stored in float32, as it was trained"
        )
    if not gguf and settings.outtype != "auto":
        raise ConfigError(f"outtype={settings.outtype} is for to=gguf; to=hf has dtype=")
    if settings.to == "gguf-lora" and settings.outtype in ("q8_0", "q4_0"):
        raise ConfigError(
            f"outtype={settings.outtype}: the short rows of an adapter do not "
            "divide into blocks of 32; give f32, f16 or bf16"
        )
