"""The kinds of router, and what each reads of the settings. No torch here.

A new kind has a row here; its maker in `adapters.routing.files.MAKERS`, or, where its gates are
numbers, nothing more; and, where nothing trains, a function in `verbs.mixture.router.UNTRAINED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RouterKindName = Literal[
    "token", "sequence", "prototype", "phatgoose", "arrow", "spectr", "uniform", "fixed"
]

# settings of `router` that only some kinds read; one that is given and not read is an error
KIND_FIELDS = (
    "level",
    "input",
    "top_k",
    "normalize",
    "temperature",
    "straight_through",
    "init",
    "label_loss",
    "aux_loss",
    "z_loss",
    "train_experts",
    "experts_learning_rate",
    "gates",
    "train",
    "layer",
    "pooling",
    "prompts",
    "hidden",
    "dropout",
    "train_split",
    "val_split",
    "test_split",
    "lora",
)
# of a router of the whole sequence
OF_PROMPTS = ("layer", "pooling", "top_k", "normalize", "temperature")


@dataclass(frozen=True)
class RouterKind:
    """A kind of router. ``reads``: which of `KIND_FIELDS`; ``trains``: whether a run of its own makes
    it (`RouterRunConfig`; a classifier with a LoRA of its own trains in one, too:
    `RouterConfig.is_trained_by_run`); ``needs_rows``: whether every expert has to have data; ``top_k``: its
    default: a sequence is one expert's as a rule, its tokens are of several."""

    reads: tuple[str, ...]
    trains: bool = False
    needs_rows: bool = False
    top_k: int = 2

    @property
    def has_top_k(self) -> bool:
        """Whether a token or sequence has some of the experts."""
        return "top_k" in self.reads


ROUTER_KINDS: dict[RouterKindName, RouterKind] = {
    "token": RouterKind(
        (
            *("level", "input", "top_k", "normalize", "temperature", "straight_through"),
            *("hidden", "init", "label_loss", "aux_loss", "z_loss", "train"),
            *("train_experts", "experts_learning_rate"),
        ),
        trains=True,
        needs_rows=True,
    ),
    "sequence": RouterKind(
        (
            *(*OF_PROMPTS, "hidden", "dropout", "train_split", "val_split", "test_split"),
            *("train", "lora"),
        ),
        needs_rows=True,
        top_k=1,
    ),
    "prototype": RouterKind((*OF_PROMPTS, "prompts"), needs_rows=True, top_k=1),
    "phatgoose": RouterKind(("top_k", "temperature", "train"), trains=True, needs_rows=True),
    "arrow": RouterKind(("top_k", "temperature")),
    "spectr": RouterKind(("top_k", "temperature")),
    "uniform": RouterKind(()),
    "fixed": RouterKind(("gates",)),
}


def kinds_reading(setting: str) -> list[str]:
    """The kinds that read one of `KIND_FIELDS`."""
    return [name for name, kind in ROUTER_KINDS.items() if setting in kind.reads]
