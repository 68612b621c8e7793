"""`lorry export RUN to=hf|peft`: a run for another library, reloaded by that library before we say that it worked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.config.schema import ModelConfig
from lorry.config.settings import ExportSettings
from lorry.errors import ConfigError, ContractError
from lorry.verbs.merge import merge_to

if TYPE_CHECKING:
    from torch import Tensor

    from lorry.models.decoder import Decoder
    from lorry.models.hf import HfModel

PROBE = "The quick brown fox jumps over the lazy dog, and 12 x 7 = 84."
# Largest |logit difference| between the exported model in the other library and ours with the adapter beside the base:
# rounding in the format that was stored; anything wrong (a wrong scale, a lost module) is far beyond it.
BOUND = {"float32": 1e-2, "bfloat16": 1.0, "float16": 0.2}


def main(settings: ExportSettings, notes: list[str]) -> int:
    """Write the export, reload it in its own library, compare logits, print where it is."""
    from lorry.models.open import open_model

    opened = open_model(ModelConfig(name=settings.run, dtype=settings.dtype), notes)
    if not opened.adapters:
        raise ConfigError(f"{settings.run} is a plain model; there is no adapter to export")
    name = settings.adapter or opened.adapters[0]
    output = merge_to(settings, notes) if settings.to == "hf" else _peft(settings, opened.model, name, opened.source["path"])
    ids = opened.tokenizer(PROBE, return_tensors="pt").input_ids
    _compare(opened.model, name, ids, _reader(settings.to, output, opened.source["path"]), settings.to)
    print(output)
    return 0


def _peft(settings: ExportSettings, model: Decoder | HfModel, name: str, base: str) -> Path:
    from lorry.bank.peft_io import save_adapter

    output = Path(settings.output_dir)
    save_adapter(model, output, name, base_name=base)
    return output


def _reader(to: str, output: Path, base: str) -> Callable[[Any], Any] | None:
    """The other library's way to load what was written, or None where that library is not installed."""
    from transformers import AutoModelForCausalLM

    def hf(dtype: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(output, dtype=dtype)

    def peft(dtype: Any) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), output)

    if to == "peft" and importlib.util.find_spec("peft") is None:
        return None
    return hf if to == "hf" else peft


def _compare(model: Decoder | HfModel, name: str, ids: Tensor, read: Callable[[Any], Any] | None, to: str) -> None:
    """Print the largest logit difference, or raise ContractError above the bound."""
    import torch

    from lorry.bank.attach import bank_of
    from lorry.bank.mix import Mix

    if read is None:
        print("note: peft is not installed, so the export was not reloaded by it (pip install 'lorry[peft]')", file=sys.stderr)
        return
    bank_of(model).activate(Mix.one(name))
    other = read(model.dtype).eval()
    with torch.no_grad():
        ours, theirs = model(ids.to(model.device)).logits.float().cpu(), other(input_ids=ids).logits.float()
    difference, dtype = float((ours - theirs).abs().max()), str(model.dtype).removeprefix("torch.")
    if not difference <= BOUND[dtype]:
        raise ContractError(
            f"the export reloaded by {to} differs by {difference:.2e} in its logits (at most {BOUND[dtype]} in {dtype})"
        )
    print(f"reloaded by {to}: largest logit difference {difference:.1e} (bound {BOUND[dtype]} in {dtype})", file=sys.stderr)
