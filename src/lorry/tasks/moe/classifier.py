"""The task of a classifier that has a LoRA of its own (`router.lora`): whose prompt is this? An adapter
of the base under g = 1, and a classifier of the state that the base makes with it of a row's prompt.

A row is cut behind its first supervised token, the one place where it is asked whose it is: by the state
of the tokens before. Domains weigh equally (`DomainTask`), and each expert's prompts are split as for
a classifier over the base as it is (`split_prompts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.attach import get_bank
from lorry.adapters.router import ROUTER_NAME
from lorry.adapters.routing.lora_classifier import LoraClassifier, attach_lora_classifier
from lorry.adapters.spec import lora_spec_of
from lorry.backends.protocol import LossTerms, ScoringBackend
from lorry.config.moe import RouterRunConfig
from lorry.config.schema.lora import LoraConfig
from lorry.data.batch import Batch
from lorry.data.encoding.token_set import TokenSet
from lorry.data.stream.dataset import TrainStream
from lorry.data.stream.joint import JointStream
from lorry.data.stream.roles import RoleStream
from lorry.generation.engine import evaluation_mode
from lorry.models.causal_lm import prompt_states
from lorry.models.loading.open import OpenedModel
from lorry.models.scoring.score import PromptState, Want
from lorry.tasks.build import BuiltTask, TaskInputs
from lorry.tasks.moe.prompts import (
    SPLITS,
    checked_rule,
    confusion_matrix,
    macro_f1,
    refuse_no_prompts,
    split_prompts,
)
from lorry.tasks.moe.task import DomainTask, of_role


class PromptClassTask(DomainTask):
    """Cross-entropy of a prompt's expert, whose name is its sequence's role."""

    def __init__(
        self,
        stream: JointStream,
        evaluation: Sequence[Batch],
        total_steps: int,
        adapters: Sequence[str],
        *,
        router: LoraClassifier,
    ) -> None:
        super().__init__(stream, evaluation, total_steps, adapters, experts=router.adapters)
        self.router = router

    def wants(self, batch: Batch) -> Mapping[str, Want]:
        """The state of each prompt."""
        return {"state": PromptState(self.router.layer, self.router.pooling)}

    def loss(self, got: Mapping[str, Tensor], batch: Batch) -> LossTerms:
        """nll_EXPERT: the mean over a domain's prompts, over K."""
        logits = self.router.logits(got["state"])
        nll = F.cross_entropy(logits, self.labels(batch).to(logits.device), reduction="none")
        nll = nll.to(batch.starts.device)
        return {
            f"nll_{name}": torch.where(of_role(batch, name), nll, 0.0) / len(self.experts)
            for name in self.experts
        }

    def labels(self, batch: Batch) -> Tensor:
        """[S] int64: the place of each sequence's expert."""
        return torch.tensor([self.experts.index(role) for role in batch.role])

    def confusion(self, backend: ScoringBackend, batches: Sequence[Batch]) -> Tensor:
        """[K,K] int64: rows are the experts that prompts are of, columns what was said."""
        counts = torch.zeros(len(self.experts), len(self.experts), dtype=torch.int64)
        for batch in batches:
            state = backend.score([batch], self.wants(batch))[0]["state"]
            said = self.router.logits(state).argmax(-1).cpu()
            counts += confusion_matrix(said, self.labels(batch), len(self.experts))
        return counts

    def _weights(self, batch: Batch) -> dict[str, Tensor]:
        count = len(self.adapters)
        return {f"nll_{name}": batch.count("sequence", count, name) for name in self.experts}


def attach_classifier_run(run: RouterRunConfig, opened: OpenedModel) -> None:
    """The classifier of a run over the experts that the model has. Raises ConfigError."""
    names, router = [expert.name for expert in run.experts], run.router
    assert router.lora is not None
    rule = checked_rule(router, opened, len(names))
    with evaluation_mode(opened.model):
        # any two tokens: a model of transformers may name its width in many ways
        width = prompt_states(opened.model, [[0, 0]], rule.layer, rule.pooling).shape[1]
    attach_lora_classifier(
        opened.model, names, rule, lora_spec_of(LoraConfig.model_validate(router.lora)), width,
        hidden=router.hidden, seed=run.train.seed,
    )  # fmt: skip


def cut_to_prompts(name: str, tokens: TokenSet) -> TokenSet:
    """The rows of an expert that have a prompt, cut behind their first supervised token, which alone
    weighs. Raises DataError where none has one."""
    kept, ends = list[int](), list[int]()
    for row, (start, stop) in enumerate(pairwise(tokens.edges.tolist())):
        supervised = np.flatnonzero(tokens.weights[start:stop])
        # of plain text all but the first token is supervised: one token is no prompt
        if len(supervised) and supervised[0] > 1:
            kept.append(row)
            ends.append(int(supervised[0]) + 1)
    refuse_no_prompts(name, len(kept), len(tokens))
    rows = tokens.select(np.array(kept))
    starts = rows.edges[:-1].tolist()
    pick = np.concatenate([np.arange(at, at + end) for at, end in zip(starts, ends, strict=True)])
    edges = np.concatenate([[0], np.cumsum(ends)]).astype(np.int64)
    weights = np.zeros(len(pick), np.float32)
    weights[edges[1:] - 1] = 1.0
    return replace(rows, tokens=rows.tokens[pick], weights=weights, edges=edges)


def prompt_splits(
    run: RouterRunConfig, sets: Mapping[str, TokenSet]
) -> dict[str, dict[str, TokenSet]]:
    """{expert: {train | val | test: its prompts}}. Raises DataError for too few."""
    prompts = {name: cut_to_prompts(name, tokens) for name, tokens in sets.items()}
    return {
        name: {
            split: rows.select(places.numpy())
            for split, places in split_prompts(name, len(rows), run.router, run.train.seed).items()
        }
        for name, rows in prompts.items()
    }


def prompt_stream(
    run: RouterRunConfig, first: TrainStream, sets: Mapping[str, TokenSet]
) -> RoleStream:
    """The train splits: a prompt of every other expert beside each of the first. ``first``: the
    stream of the first one's whole rows."""
    train = {name: splits["train"] for name, splits in prompt_splits(run, sets).items()}
    name = run.experts[0].name
    paced = TrainStream(
        train.pop(name), seed=first.seed, rows_per_batch=first.rows_per_batch,
        gradient_accumulation_steps=first.accumulation, max_tokens=first.max_tokens,
        packing=first.packing, shuffle=first.shuffle,
    )  # fmt: skip
    return RoleStream(paced, name, beside=train, alternates={}, seed=run.train.seed)


def build_prompt_classifier(
    run: RouterRunConfig,
    inputs: TaskInputs,
    sets: Mapping[str, TokenSet],
    digests: Mapping[str, str],
) -> BuiltTask:
    """The task over the train splits, evaluated on those of val; test is asked at the end."""
    model, rows = inputs.opened.model, run.train.per_device_eval_batch_size
    router = get_bank(model).routers[ROUTER_NAME]
    assert isinstance(router, LoraClassifier)
    splits = prompt_splits(run, sets)
    asked = {
        split: [
            replace(batch, role=(name,) * len(batch))
            for name, of in splits.items()
            for batch in (of[split].eval_batches(rows) if len(of[split]) else [])
        ]
        for split in ("val", "test")
    }
    # without the token behind it, at which it is asked
    prompts = [
        list(of["train"].example(row).tokens[:-1])
        for of in splits.values()
        for row in range(len(of["train"]))
    ]
    with evaluation_mode(model):
        states = prompt_states(model, prompts, router.layer, router.pooling)
    router.start(states, run.train.seed)
    task = PromptClassTask(
        inputs.stream, asked["val"], inputs.total, list(inputs.jobs), router=router
    )

    def measure(adapter: str) -> dict[str, float]:
        counts = task.confusion(inputs.backend, asked["val"])
        return {"eval_f1": macro_f1(counts), "eval_accuracy": _accuracy(counts)}

    def conclude() -> None:
        record: dict[str, Any] = {
            "prompts": {split: sum(len(of[split]) for of in splits.values()) for split in SPLITS}
        }
        for split, batches in asked.items():
            if not batches:
                continue
            counts = task.confusion(inputs.backend, batches)
            said = {name: row.tolist() for name, row in zip(task.experts, counts, strict=True)}
            record[split] = {
                "f1": round(macro_f1(counts), 6),
                "accuracy": round(_accuracy(counts), 6),
                "confusion": said,
            }
        router.training = record

    return BuiltTask(task, digests=digests, measure=measure, conclude=conclude)


def _accuracy(counts: Tensor) -> float:
    return float(counts.diagonal().sum() / counts.sum())
