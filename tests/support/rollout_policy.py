"""A small trained policy whose adapter moves, its trainer in Lorry (float32), and its base on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lorry
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import adapter_files
from lorry.generation.scorer import ModelScorer
from lorry.integrations.rollout import (
    AdapterSync,
    GreedyProbe,
    LoraReceiver,
    VersionPublisher,
    score_answers,
)
from tests.support.tiny import decoder, directory, encode, trained

PROMPTS = [
    encode(text) for text in ("the red lorry ", "one old dog saw ", "a tall ", "the quiet g")
]


@dataclass
class Policy:
    """The trainer: a decoder with one adapter, and `step`, which moves it far enough to be seen.
    ``base``: the directory that an engine serves."""

    model: Any
    base: Path
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def step(self, size: float = 0.3) -> dict[str, bytes]:
        """The adapter's files after values moved at random, in B by ``size`` and in A by less."""
        adapter = get_bank(self.model)["policy"]
        with torch.no_grad():
            for name, value in adapter.tensors().items():
                scale = size if name.endswith("lora_B") else 0.05
                value += scale * torch.randn(value.shape, generator=self.generator)
        adapter.touch()
        return self.files()

    def files(self) -> dict[str, bytes]:
        return adapter_files(self.model, "policy", base_name=str(self.base))

    def probe(self, **options: Any) -> GreedyProbe:
        scorer = ModelScorer(self.model)
        return GreedyProbe(
            PROMPTS,
            score_answers(scorer, Mix.one("policy")),
            score_answers(scorer, Mix.none()),
            **{"max_new_tokens": 5, "mean_bound": 1e-4, "bound": 1e-3, **options},
        )

    def sync(self, folder: Path, receiver: LoraReceiver, **options: Any) -> AdapterSync:
        return AdapterSync(VersionPublisher(folder), [receiver], self.probe(**options))


def small_policy(folder: Path) -> Policy:
    """A trained Llama of a few thousand parameters, its copies below ``folder``."""
    base = directory(trained("llama"), folder / "base")
    model = decoder(trained("llama"), folder / "again", torch.float32)
    lorry.attach(model, lorry.LoraSpec(r=4, lora_alpha=8, target_modules="all-linear"), "policy")
    return Policy(model, base)
