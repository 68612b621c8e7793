"""PEFT's ADALORA files, read as the plain LoRA that they compute: E multiplied into A, ranks from the
tensors, the scale that of the first rank.

A, E and B lie there without `.weight`, and without the triplets that were zeroed last (`rank_pattern`);
PEFT goes on scaling by lora_alpha / init_r, whatever is left of a module, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorry.adapters.peft.tensors import TensorFile
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.adalora import plain_spec
from lorry.errors import ModelError

ADALORA = "ADALORA"
DEFAULT_RANK = 12  # PEFT's, of a file that leaves init_r out
# how the ranks came to be no longer matters; r, rank_pattern and alpha_pattern are nothing PEFT reads
# there as it does of a LORA file
SCHEDULE_KEYS = frozenset(
    {
        "target_r",
        "init_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
    }
)


def as_plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a LORA file with every rank there from the first."""
    plain = {key: value for key, value in config.items() if key not in SCHEDULE_KEYS}
    rank = config.get("init_r", DEFAULT_RANK)
    alpha = config.get("lora_alpha", 8)
    # PEFT: no scale at all where alpha is not above 0
    positive = not isinstance(alpha, (int, float)) or not alpha <= 0
    return {**plain, "peft_type": "LORA", "r": rank, "lora_alpha": alpha if positive else rank}


class PlainLoraFile:
    """The tensors of an ADALORA file under the names and with the values of a LORA file's."""

    def __init__(self, file: safe_open, where: str) -> None:
        self.file, self.where = file, where
        # by the name that a LORA file has: its own
        self.stored = dict[str, str]()
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            module, _, part = key.rpartition(".")
            if part in ("lora_A", "lora_B"):
                if part == "lora_A" and f"{module}.lora_E" not in file.keys():  # noqa: SIM118
                    raise ModelError(
                        f"{where}: {key} has no lora_E with it; the file is incomplete"
                    )
                self.stored[f"{key}.weight"] = key
            elif part != "lora_E" or f"{module}.lora_A" not in file.keys():  # noqa: SIM118
                self.stored[key] = key

    def keys(self) -> list[str]:
        """Of a LORA file."""
        return list(self.stored)

    def get_slice(self, name: str) -> Any:
        """What knows the shape of a tensor."""
        return self.file.get_slice(self.stored[name])

    def get_tensor(self, name: str) -> Tensor:
        """Its values: of an A times E, fp32. Raises ModelError for an E of another shape."""
        key = self.stored[name]
        value: Tensor = self.file.get_tensor(key)
        module, _, part = key.rpartition(".")
        if part != "lora_A":
            return value
        if not value.is_floating_point():
            raise ModelError(f"{self.where}: {key} is {value.dtype}; floats are expected")
        factor: Tensor = self.file.get_tensor(f"{module}.lora_E")
        if list(factor.shape) != [value.shape[0], 1] or not factor.is_floating_point():
            raise ModelError(
                f"{self.where}: {module}.lora_E is {list(factor.shape)} of {factor.dtype}; "
                f"{key} needs [{value.shape[0]}, 1]"
            )
        return value.to(torch.float32) * factor.to(torch.float32)


def fit_ranks(
    spec: LoraSpec, file: TensorFile, where: str, parts: Mapping[str, dict[str, str]]
) -> tuple[LoraSpec, dict[str, dict[str, str]]]:
    """The spec with the ranks that the file has, each module scaled as with its first one, and the
    parts of the modules that have any. Raises ModelError if none has."""
    shapes = {path: list(file.get_slice(sides["A"]).get_shape()) for path, sides in parts.items()}
    for path, (sides, shape) in ((p, (parts[p], shapes[p])) for p in parts):
        other = list(file.get_slice(sides["B"]).get_shape())
        # what has no rank is left out: not what is damaged
        if len(shape) != 2 or len(other) != 2 or shape[0] != other[1]:
            raise ModelError(
                f"{where}: {path} has lora_A {shape} and lora_B {other}, no ranks in common"
            )
    ranks = {path: shape[0] for path, shape in shapes.items() if shape[0]}
    if not ranks:
        raise ModelError(f"{where}: no module has a rank left; the adapter adds nothing")
    return plain_spec(spec, ranks), {path: parts[path] for path in ranks}
