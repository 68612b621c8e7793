"""Open again what was just written, as the library that will read it does, and compare logits:
before it gets its name.

    model = reopened(folder, torch.float32)                # transformers' own reading of the files, and ours of the headers
    compare(exact, logits(model, rows), 0.1, "bfloat16")   # ContractError above a tenth of the largest logit

Writing a model is a claim that others can read it. `merge`, `export` and the conversion of a GGUF
file make it only after this; where it fails the folder, which still has a temporary name, goes, and
the exit code is 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.errors import ContractError, ModelError
from lorry.models.loading.accounting import refuse_unfit_tensors
from lorry.models.loading.describe import describe_model, model_file_errors, silence_transformers
from lorry.models.loading.tensor_files import read_tensor_entries
from lorry.notes import ignore_note

# Largest logit difference, as a share of the largest logit, between two libraries that compute in a
# number format with the same weights: its rounding on the way. A wrong scale, a lost module or
# another rotary base is far beyond it.
LOGIT_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


def reopen_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model in ``folder`` as transformers reads it, every tensor accounted for. Raises
    ContractError if it, or Lorry, cannot open what was written."""
    from transformers import AutoModelForCausalLM

    try:
        describe_model(folder, add_note=ignore_note)
        entries = read_tensor_entries(folder)
        with model_file_errors(f"{folder}: transformers cannot load it"), silence_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        refuse_unfit_tensors(folder, model, info, entries, ignore_note)
    except ModelError as error:
        raise ContractError(
            f"the model written cannot be loaded again and was removed: {error}"
        ) from error
    return model.eval()


def compute_fp32_logits(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """[T, V] in fp32 on the CPU of all ``rows`` ([1, t] each), one after the other. ``model``:
    transformers', PEFT's or ours.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(input_ids=ids.to(device)).logits[0].float().cpu() for ids in rows])


def compare_logits(
    exact: Tensor, stored_logits: Tensor, share: float, stored: str
) -> tuple[float, float]:
    """(largest difference of two models' logits, the bound on it: ``share`` of the largest logit).
    Raises ContractError above it, naming the number format the weights were ``stored`` in."""
    difference, bound = float((exact - stored_logits).abs().max()), share * float(exact.abs().max())
    # this way round: NaN fails
    if not difference <= bound:
        raise ContractError(
            f"the model read back differs by {difference:.2e} in its logits, more "
            f"than rounding to {stored} can explain ({bound:.2e}); it was removed"
        )
    return difference, bound


def free_model_memory(model: torch.nn.Module) -> None:
    """Give a model's memory back: it is of no use afterwards. What was written is opened in the
    room that it leaves.
    """
    model.to("meta")
