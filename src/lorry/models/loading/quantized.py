"""A frozen model whose matrices are held in 4 or 8 bits, by transformers and bitsandbytes: a
teacher that takes little room.

model = open_quantized(resolve_model("runs/large-merged", add_note=print), "nf4", "auto", "cpu", print)
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorry.errors import ConfigError
from lorry.models.hf.model import HfModel
from lorry.models.loading.accounting import refuse_unfit_tensors
from lorry.models.loading.describe import describe_model, model_file_errors, silence_transformers
from lorry.models.loading.load import pick_device, pick_dtype
from lorry.models.loading.sources import ModelLocation
from lorry.models.loading.weights import read_tensor_entries, read_tensors
from lorry.models.proofs import prove_hf_model
from lorry.notes import NoteCallback

QUANTIZED_FORMATS = ("nf4", "fp4", "int8")


def open_quantized(
    place: ModelLocation, quantize: str, dtype: str, device: str, add_note: NoteCallback
) -> HfModel:
    """A causal model with its linear layers quantised as it is read; products are computed in
    ``dtype``.

    Raises ConfigError when bitsandbytes is not installed, ModelError when the checkpoint cannot be
    used.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"distill.teacher_quantize={quantize} needs the package bitsandbytes, "
            "which is not installed here (pip install bitsandbytes); leave out "
            "teacher_quantize to load the teacher unquantized"
        )
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    described = describe_model(place.directory, native=False, add_note=add_note)
    # refuses pickles, broken shards and paths that lead elsewhere
    entries = read_tensor_entries(place.directory)
    for (
        entry
    ) in entries.values():  # before they are packed: a quantised block hides a NaN in its scale
        read_tensors({entry.name: entry}, kind, torch.device("cpu"))
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if quantize == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": quantize, "bnb_4bit_compute_dtype": kind}
    )
    with (
        model_file_errors(f"{place.directory}: transformers cannot load it as {quantize}"),
        silence_transformers(),
    ):
        inner, info = AutoModelForCausalLM.from_pretrained(
            str(place.directory),
            config=described.hf,
            dtype=kind,
            use_safetensors=True,
            local_files_only=True,
            quantization_config=BitsAndBytesConfig(**options),
            device_map={"": where},
            output_loading_info=True,
        )
    refuse_unfit_tensors(place.directory, inner, info, entries, add_note)
    model = HfModel(inner, add_note)
    prove_hf_model(model, add_note, str(place.directory))
    return model
