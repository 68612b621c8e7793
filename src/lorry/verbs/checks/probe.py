"""The few rows on which a verb compares a model's logits before and after it wrote it, and the
number format to do it in.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorry.config.schema.model import ModelConfig
from lorry.errors import DataError
from lorry.notes import ignore_note
from lorry.runs.layout import SAMPLES
from lorry.runs.read import SampleRecord, read_samples

if TYPE_CHECKING:
    from torch import Tensor

    from lorry.models.loading.open import OpenedModel

PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and 12 x 7 = 84."
# at most; logits of 256,000 tokens' vocabulary on them take 200 MB
PROBE_ROWS, PROBE_TOKENS = 4, 48
PROBE_LENGTH_FACTOR = 2.25  # of a model's bytes: merging in memory keeps the weights it had


def probe_rows(opened: OpenedModel) -> tuple[list[Tensor], str]:
    """([1, t] token ids of each row, what they are): rows of the run's own data from its
    samples.json, else one built-in text.
    """
    texts = [text for text in _run_texts(opened.source.get("adapter")) if text.strip()][:PROBE_ROWS]
    rows_words = f"{len(texts)} rows of the run's data" if texts else "a built-in text"
    # cut, not left out: any prefix shows whether two models agree
    longest = min(PROBE_TOKENS, opened.model.context or PROBE_TOKENS)
    ids = [
        opened.tokenizer(text, return_tensors="pt").input_ids[:, :longest]
        for text in texts or [PROBE_TEXT]
    ]
    # a tokenizer may make no token of a text
    return [row for row in ids if row.numel()], rows_words


def _run_texts(adapter: str | None) -> list[str]:
    """Texts that a run was trained or evaluated on; none where there is no run, or its samples.json
    is not what we write.
    """
    # the folder of one adapter among several lies in the run's
    folders = [] if adapter is None else [Path(adapter), Path(adapter).parent]
    folder = next((parent for parent in folders if (parent / SAMPLES).is_file()), None)
    if folder is None:
        return []
    try:
        return [text for text in map(_sample_text, read_samples(folder)) if text]
    # a probe needs any text; that samples.json is damaged is for other verbs to say
    except (DataError, OSError):
        return []


def _sample_text(sample: SampleRecord) -> str:
    if sample.tokens is not None:
        return "".join(token.text for token in sample.tokens)
    return f"{sample.prompt} {sample.reference}" if sample.reference is not None else ""


def logits_dtype_name(run: str, stored: str) -> str:
    """In what to compute the logits: float32, where rounding of weights alone shows, or the stored
    format where there is no memory for it: on the device that the verb opens the model on, or here,
    where transformers reads what was written.
    """
    import math

    import torch

    from lorry.adapters.bank import free_memory
    from lorry.models.loading.load import pick_device
    from lorry.models.loading.sources import resolve_model
    from lorry.models.loading.tensor_files import read_tensor_entries

    needed = 4 * sum(
        math.prod(entry.shape)
        for entry in read_tensor_entries(
            resolve_model(run, add_note=ignore_note).directory
        ).values()
    )
    device, cpu = pick_device(ModelConfig().device), torch.device("cpu")
    fits = free_memory(device) > PROBE_LENGTH_FACTOR * needed and (
        device.type == "cpu" or free_memory(cpu) > needed
    )
    return "float32" if fits else stored
