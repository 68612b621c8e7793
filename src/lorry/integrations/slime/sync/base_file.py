"""The base's own files: what the weights that are sent are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorry.adapters.peft.base_digest import digest_samples, sample_positions, values_at_positions
from lorry.models.loading.tensor_files import TensorEntry, read_tensor_entries, read_tensors
from lorry.models.megatron.layout import FAMILY, hugging_face_tree

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BaseFile:
    """The tensors of a Hugging Face directory by name, read when they are asked for."""

    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: str | Path) -> BaseFile:
        """Raises ModelError for a directory without safetensors."""
        return cls(read_tensor_entries(Path(directory)))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in the trainer's dtype."""
        return read_tensors({name: self.entries[name]}, dtype, CPU)[name]

    def digest(self, config: object) -> str | None:
        """What `gathered_base_digest` is of a model with these weights; None where the file does not
        hold them all under Hugging Face's names. ``config``: a TransformerConfig."""
        tree = hugging_face_tree(config)
        paths = [path for path, module in tree.named_modules() if isinstance(module, nn.Linear)]
        samples = {}
        for path in (*paths, FAMILY.embed, FAMILY.head):
            name = f"{path}.weight"
            if path == FAMILY.head and name not in self.entries:
                name = f"{FAMILY.embed}.weight"  # a tied head
            if name not in self.entries:
                return None
            weight = self.read(name, torch.bfloat16)
            positions = sample_positions(weight.numel())
            samples[path] = (tuple(weight.shape), values_at_positions(weight, positions))
        return digest_samples(samples)
