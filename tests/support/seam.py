"""Small models, batches and tasks for backend tests; everything is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.adapters.mix import Mix
from lorry.backends.protocol import LossTerms, ScoringBackend, StepStats
from lorry.data.batch import Batch, BatchExtra, TokenizedExample, collate
from lorry.families import find_family
from lorry.models.decoder.model import Decoder
from lorry.models.scoring.score import TokenScore, Want, log_prob
from lorry.tasks.losses import nll_loss
from lorry.tasks.unlearn.losses import npo_loss

VOCAB = 61
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tiny_llama(seed: int = 0) -> Decoder:
    """Two layers of width 32 with weights large enough for gradients to matter."""
    family = find_family("llama")
    assert family is not None
    model = Decoder(family, CONFIG)
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model


def examples(
    n: int,
    seed: int = 0,
    adapter: Callable[[int], int] = lambda i: 0,
    role: Callable[[int], str] = lambda i: "",
) -> list[TokenizedExample]:
    """Random token rows of 4 to 13 tokens, about half of them supervised."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = int(torch.randint(4, 14, (), generator=draw))
        weights = (torch.rand(length, generator=draw) < 0.5).float()
        weights[0], weights[-1] = 0, 1
        tokens = torch.randint(0, VOCAB, (length,), generator=draw).tolist()
        out.append(
            TokenizedExample(
                tokens, weights.tolist(), key=100 * seed + i, adapter=adapter(i), role=role(i)
            )
        )
    return out


class Fixed:
    """Fine-tuning on micro-batches given in full: `steps[step]` is a list of lists of examples."""

    def __init__(
        self,
        steps: Sequence[Sequence[Sequence[TokenizedExample]]],
        adapters: Sequence[str] = ("default",),
    ) -> None:
        self.steps, self.adapters, self.total_steps = steps, list(adapters), len(steps)
        self.seen: list[StepStats] = []
        self.reported: frozenset[str] = frozenset()

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        return {"logprob": TokenScore(log_prob)}

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        batches = [collate(rows) for rows in self.steps[step]]
        return [b.with_terms(nll=b.count("token", len(self.adapters))) for b in batches]

    def eval_batches(self) -> list[Batch]:
        return self.step_batches(0, {})

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        return {"nll": nll_loss(got["logprob"], batch)}

    def after_step(self, stats: StepStats) -> None:
        self.seen.append(stats)

    def state(self) -> dict[str, Any]:
        return {"seen": len(self.seen)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = self.seen[: state["seen"]]


class Npo(Fixed):
    """NPO in a few lines: the reference is the same model under mix none, no second model; plus a
    retain term.
    """

    beta = 0.1

    def step_batches(self, step: int, models: Mapping[str, ScoringBackend]) -> list[Batch]:
        batches = [collate(rows) for rows in self.steps[step]]
        scored = models["self"].score(batches, {"reference": TokenScore(log_prob)}, Mix.none())
        k = len(self.adapters)
        return [
            b.with_extra(reference=BatchExtra(s["reference"], "token")).with_terms(
                forget=b.count("sequence", k, "forget"), retain=b.count("token", k, "retain")
            )
            for b, s in zip(batches, scored, strict=True)
        ]

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        forget = torch.tensor([r == "forget" for r in batch.role])
        terms = (
            npo_loss(
                got["logprob"], batch.extra["reference"].values, batch.weights, batch, self.beta
            ),
            nll_loss(got["logprob"], batch),
        )
        return {
            "forget": torch.where(forget, terms[0], 0.0),
            "retain": torch.where(forget, 0.0, terms[1]),
        }
