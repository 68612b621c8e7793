"""Model families as data: which Hugging Face names hold what, and how a config describes the
computation. No torch here.

A family answers five questions: which `model_type`s it covers, where each part lies in the state
dict, which target names people use, which role each target and norm has in a layer, and how
`config.json` turns into a `ModelGeometry`. Nobody else derives a role from a name or a position.
`find_family` returns None for an architecture nobody described; the loader then takes transformers'
own implementation.
"""

from __future__ import annotations

from lorry.families.family import (
    SITES,
    ConfigMapping,
    LayerLinears,
    LayerNorms,
    ModelFamily,
    ModelGeometry,
    RotaryConfig,
    Site,
    unsupported_fields,
)
from lorry.families.gpt2 import GPT2
from lorry.families.llama import LLAMA, QWEN2, QWEN3
from lorry.families.neox import NEOX

__all__ = [
    "SITES",
    "ConfigMapping",
    "LayerLinears",
    "LayerNorms",
    "ModelFamily",
    "ModelGeometry",
    "RotaryConfig",
    "Site",
    "find_family",
    "unsupported_fields",
]


def find_family(model_type: str) -> ModelFamily | None:
    """The family of a config's `model_type`, or None."""
    return next((f for f in (LLAMA, QWEN2, QWEN3, GPT2, NEOX) if model_type in f.model_types), None)
