"""Model families as data: which Hugging Face names hold what, and how a config describes the computation. No torch here.

A family answers four questions: which `model_type`s it covers, where each part lies in the state dict, which target names
people use, and how `config.json` turns into a `Geometry`. `find` returns None for an architecture nobody described;
the loader then takes transformers' own implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: base frequency, how many of the head's dimensions turn, and a scaling rule with its numbers."""

    theta: float
    dim: int
    kind: Literal["default", "linear", "llama3"] = "default"
    scaling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything the decoder needs to know beyond names."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    rotary: Rotary | None
    biased: frozenset[str]
    parallel_residual: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Paths are Hugging Face module names; `{i}` is the layer number.

    targets: canonical target name -> path inside a layer; the layer's linears in the order they run.
    qkv: `separate` (three linears), `thirds` (one linear, rows q|k|v) or `heads` (one linear, q,k,v interleaved by head).
    on_disk: module names that checkpoints spell otherwise, {ours (transformers' module name): the file's}.
    reads: config keys `geometry` understands; ignores: keys that change nothing here, with a test of their value.
    """

    name: str
    model_types: tuple[str, ...]
    embed: str
    positions: str | None
    layer: str
    final_norm: str
    head: str
    attention_norm: str
    mlp_norm: str
    targets: Mapping[str, str]
    norm: Literal["rms", "layer"]
    qkv: Literal["separate", "thirds", "heads"]
    gated: bool
    qk_norm: tuple[str, str] | None = None
    transposed: bool = False
    on_disk: Mapping[str, str] = field(default_factory=dict)
    geometry: Callable[[Config], Geometry]
    reads: frozenset[str]
    ignores: Mapping[str, Callable[[Any, Config], bool]]

    def path(self, target: str, layer: int) -> str:
        """Full module name of a canonical target, e.g. `q_proj` of layer 3."""
        return f"{self.layer.format(i=layer)}.{self.targets[target]}"


def find(model_type: str) -> Family | None:
    """The family of a config's `model_type`, or None."""
    from lorry.families.gpt2 import GPT2
    from lorry.families.llama import LLAMA, QWEN2, QWEN3
    from lorry.families.neox import NEOX

    return next((f for f in (LLAMA, QWEN2, QWEN3, GPT2, NEOX) if model_type in f.model_types), None)


def unsupported(family: Family, config: Config, defaults: Config) -> list[str]:
    """Config fields that the native decoder would have to ignore although they change the model, as `key=value` words.

    ``defaults`` are the values transformers' own config class starts with: a key that class does not know is metadata,
    and a key at its default changes nothing.
    """
    found = []
    for key, value in config.items():
        if key in family.reads or key not in defaults:
            continue
        harmless = family.ignores.get(key)
        if harmless is not None:
            if not harmless(value, config):
                found.append(f"{key}={value!r}")
        elif value != defaults[key]:
            found.append(f"{key}={value!r}")
    return found
