"""`lorry export RUN to=hf|peft`: a run for another library, reloaded by that library before we say that it worked."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.verbs import probe
from lorry.verbs.merge import Before, write_merged
from lorry.verbs.open_model import chosen_adapter, opened, tell

if TYPE_CHECKING:
    import torch

    from lorry.models.loading.open import Opened


def main(settings: ExportSettings, notes: list[str]) -> int:
    """Write the export, open it again in its own library, compare logits, print where it is."""
    from lorry.models.loading.open import stored_dtype

    if settings.to == "peft" and settings.dtype != "auto":
        raise ConfigError(f"dtype={settings.dtype} is for to=hf; an adapter is stored in float32, as it was trained")
    stored = stored_dtype(settings.run)
    found = opened(ModelConfig.model_validate({"name": settings.run, "dtype": probe.number_format(settings.run, stored)}))
    name = chosen_adapter(found, settings.adapter, settings.run)
    if settings.to == "hf":
        write_merged(found, name, settings.output_dir, stored if settings.dtype == "auto" else settings.dtype)
    else:
        export_peft(found, name, settings.output_dir)
    print(settings.output_dir)
    return 0


def export_peft(found: Opened, name: str, output: Path) -> None:
    """The adapter's directory as PEFT writes it, opened again before it gets its name. ``found`` is of no use afterwards.

    Raises ConfigError for a place that is taken, ContractError if the adapter opened again is another one."""
    from lorry.disk import durable
    from lorry.models.loading.reopen import release

    before = Before.of(found, name)
    with durable.building(output) as folder:
        write_peft(found, name, folder)
        release(found.model)
        model, by = adapted(folder, found.source["path"], before.dtype)
        lines = before.compare(model, "float32", by)
    for line in lines:
        tell(line)


def write_peft(found: Opened, name: str, folder: Path) -> None:
    """The files of the adapter and its tokenizer, into an existing folder."""
    from lorry.adapters.peft.files import adapter_files

    for file, content in adapter_files(found.model, name, base_name=found.source["path"]).items():
        (folder / file).write_bytes(content)
    found.tokenizer.save_pretrained(folder)


def adapted(folder: Path, base: str, dtype: torch.dtype) -> tuple[Any, str]:
    """(the base with the adapter of ``folder``, who opened it): PEFT on transformers, or Lorry where PEFT is not installed.

    Raises ContractError when it cannot be opened."""
    from safetensors import SafetensorError

    from lorry.models.loading.describe import blaming
    from lorry.models.loading.reopen import reopened

    try:
        if importlib.util.find_spec("peft") is None:
            tell("note: peft is not installed, so Lorry itself opened the export again (pip install 'lorry[peft]')")
            kind = str(dtype).removeprefix("torch.")
            return opened(ModelConfig.model_validate({"name": base, "adapter": str(folder), "dtype": kind})).model, "lorry"
        from peft import PeftModel

        with warnings.catch_warnings(), blaming(f"{folder}: PEFT cannot load it"):
            warnings.simplefilter("ignore", (FutureWarning, UserWarning))  # the two libraries' own affair
            return PeftModel.from_pretrained(reopened(Path(base), dtype), str(folder)).eval(), "peft"
    except (ModelError, SafetensorError) as error:
        raise ContractError(f"what was written cannot be opened again, so it was not kept: {error}") from error
