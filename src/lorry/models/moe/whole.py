"""An expert that is a whole dense model of the base's shape (`lorry sft lora=null trainable=mlp`, or
anybody's): its MLPs go into a mixture, and what it changes outside of them is found by name.

    expert = WholeExpert.open(Path("runs/maths"), model)
    expert.tensor("model.layers.0.mlp.up_proj.weight")       # fp32, read from its file
    expert.changes_outside(["model.norm.weight"], base)      # those that are not the base's

Nothing but one tensor is held at a time: K whole models need not fit beside the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from lorry.errors import ModelError
from lorry.models.decoder.model import Decoder
from lorry.models.loading.describe import describe_model
from lorry.models.loading.tensor_files import (
    FLOAT_DTYPES,
    TensorEntry,
    read_tensor_entries,
    read_tensors,
)
from lorry.models.loading.weights import match_tensor_names, refuse_damaged_buffers
from lorry.notes import ignore_note


@dataclass(frozen=True)
class WholeExpert:
    """The tensors of a model's directory by our names. A head that is tied to the embedding has
    that one's."""

    folder: Path
    entries: Mapping[str, TensorEntry]

    @staticmethod
    def open(folder: Path, base: Decoder) -> WholeExpert:
        """Raises ModelError for a model of another shape than ``base``, and for tensors that are
        missing, unknown or of another shape."""
        described = describe_model(folder, native=True, add_note=ignore_note)
        if described.family is not base.family:
            kinds = " and ".join(
                str(config.get("model_type")) for config in (described.config, base.config)
            )
            raise ModelError(
                f"{folder}: not an expert of this base ({kinds}: {described.why or 'other families'})"
            )
        own, its = base.geometry, base.family.geometry(described.config)
        for field in fields(own):
            here, there = getattr(own, field.name), getattr(its, field.name)
            if here != there:
                raise ModelError(
                    f"{folder}: not an expert of this base: {field.name} is {there}, and {here} in the base"
                )
        entries = read_tensor_entries(folder)
        refuse_damaged_buffers(entries)
        shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
        names = match_tensor_names(entries, base.family, shapes, tied=own.tied, where=folder)
        embed = names[f"{base.family.embed}.weight"]
        return WholeExpert(folder, {n: entries[names.get(n, embed)] for n in shapes})

    def tensor(self, name: str) -> Tensor:
        """In fp32, on the CPU. Raises ModelError for a value that is not finite."""
        return read_tensors({name: self.entries[name]}, torch.float32, torch.device("cpu"))[name]

    def changes_outside(self, names: Iterable[str], base: Callable[[str], Tensor]) -> Iterable[str]:
        """Those of ``names`` whose values are not the base's, rounded as this model is stored."""
        for name in names:
            stored = FLOAT_DTYPES[self.entries[name].dtype]
            if not torch.equal(self.tensor(name), base(name).to(stored).float()):
                yield name
