"""`lorry export RUN to=hf|peft`: a run for another library, reloaded by that library before we say that it worked."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError, ContractError
from lorry.verbs.merge import write_merged
from lorry.verbs.opening import chosen_adapter, opened, tell

if TYPE_CHECKING:
    from torch import Tensor

    from lorry.models.open import Opened

PROBE = "The quick brown fox jumps over the lazy dog, and 12 x 7 = 84."
# Largest logit difference between the other library's model and ours with the adapter beside the base, both computed in fp32, as
# a share of the largest logit: the rounding of the format that was stored. A wrong scale or a lost module is far beyond it.
BOUND = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


def main(settings: ExportSettings, notes: list[str]) -> int:
    """Write the export, reload it in its own library, compare logits, print where it is."""
    from lorry.models.open import stored_dtype

    if settings.to == "peft" and settings.dtype != "auto":
        raise ConfigError(f"dtype={settings.dtype} is for to=hf; an adapter is stored in float32, as it was trained")
    found = opened(ModelConfig(name=settings.run, dtype="float32"))
    name = chosen_adapter(found, settings.adapter, settings.run)
    if settings.to == "hf":
        kind = stored_dtype(settings.run) if settings.dtype == "auto" else settings.dtype
        write_merged(found, name, settings.output_dir, kind)
    else:
        kind = "float32"
        write_peft(found, name, settings.output_dir)
    compare(found, name, reader(settings.to, settings.output_dir, found.source["path"]), settings.to, kind)
    print(settings.output_dir)
    return 0


def write_peft(found: Opened, name: str, output: Path) -> None:
    """The adapter's directory as PEFT writes it, with the tokenizer, whole or not at all."""
    from lorry.bank.peft_io import adapter_files
    from lorry.disk import durable

    files = adapter_files(found.model, name, base_name=found.source["path"])
    with durable.building(output) as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        found.tokenizer.save_pretrained(folder)


def reader(to: str, output: Path, base: str) -> Callable[[], Any] | None:
    """The other library's way to load what was written, in fp32, or None where that library is not installed."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    def hf() -> Any:
        return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)

    def peft() -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(output))

    if to == "peft" and importlib.util.find_spec("peft") is None:
        return None
    return hf if to == "hf" else peft


def compare(found: Opened, name: str, read: Callable[[], Any] | None, to: str, kind: str) -> None:
    """Tell the largest logit difference. Raises ContractError above the bound."""
    import torch

    from lorry.bank.attach import bank_of
    from lorry.bank.mix import Mix

    if read is None:
        tell("note: peft is not installed, so the export was not reloaded by it (pip install 'lorry[peft]')")
        return
    bank_of(found.model).activate(Mix.one(name))
    ids: Tensor = found.tokenizer(PROBE, return_tensors="pt").input_ids[:, : found.model.context]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the two libraries' own affair
        other = read().eval()
    with torch.no_grad():
        ours, theirs = found.model(ids.to(found.model.device)).logits.float().cpu(), other(input_ids=ids).logits.float()
    difference, bound = float((ours - theirs).abs().max()), BOUND[kind] * float(ours.abs().max())
    if not difference <= bound:
        raise ContractError(
            f"the export reloaded by {to} differs by {difference:.2e} in its logits, more than rounding to {kind} can explain "
            f"({bound:.2e}); do not use it"
        )
    tell(f"reloaded by {to}: largest logit difference {difference:.1e} (bound {bound:.1e}, stored in {kind})")
