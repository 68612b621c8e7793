"""Routers of a whole sequence, made of prompts of every expert's rows: prototypes, and a classifier
that is trained on the prompts' hidden states in the base.

The states are made once; what trains is a small network over them, outside of the model, in seconds.
So it is no run of its own: one that was stopped is made again. N prompts, D width, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.adapters.routing.lora_classifier import SMALLEST_DEVIATION
from lorry.adapters.routing.sequence import (
    ClassifierRouter,
    PromptRule,
    PrototypeRouter,
    attach_sequence_router,
    classifier_shapes,
    classify,
    layer_count,
)
from lorry.config.data import DataConfig
from lorry.config.moe import ClassifierTrainConfig, RouterConfig
from lorry.config.schema.train import TrainConfig
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet
from lorry.data.prepare import prepare_data
from lorry.data.stream.pack import epoch_order
from lorry.errors import ConfigError, DataError, NonFiniteError
from lorry.generation.engine import evaluation_mode
from lorry.models.causal_lm import prompt_states
from lorry.models.loading.open import OpenedModel

SPLITS = ("train", "val", "test")
# of the prompts themselves, each left out of its own expert's mean: below it domains look alike
CLEARLY_APART = 0.9


def checked_rule(router: RouterConfig, opened: OpenedModel, experts: int) -> PromptRule:
    """The rule that the settings describe; where they name no layer, of the middle one, whose states
    tell look-alike domains apart best (docs/experts.md). Raises ConfigError for one that the model
    cannot follow."""
    layers = layer_count(opened.model)
    layer = router.layer if router.layer is not None or layers is None else layers // 2
    rule = PromptRule(
        None if layer == "final" else layer,
        router.pooling,
        router.top_k,
        router.normalize,
        router.temperature,
    )
    # before the states are made, which takes minutes
    rule.check(experts, layers)
    return rule


def read_prompts(
    data: DataConfig,
    train: TrainConfig,
    opened: OpenedModel,
    name: str,
    *,
    quarantine: Path,
    tell: Callable[[str], None],
) -> list[list[int]]:
    """The prompts of an expert's training rows, as generation would be given them: what stands before
    a row's first answer. Raises ConfigError for streamed rows, DataError where no row has a prompt.
    """
    # a loss on the prompt would leave nothing before the first supervised token
    data = data.model_copy(update={"completion_only_loss": True})
    make = partial(ExampleEncoder, embeddings=opened.model.vocab_size, tell=tell)
    prepared = prepare_data(data, train, opened.tokenizer, quarantine=quarantine, make=make)
    if prepared.tokens is None:
        raise ConfigError("data.streaming: a router's rows are counted; leave streaming out")
    prompts = prompts_of(prepared.tokens)
    refuse_no_prompts(name, len(prompts), len(prepared.tokens))
    return prompts


def refuse_no_prompts(name: str, prompts: int, rows: int) -> None:
    """Raise DataError for an expert of whose rows none has a prompt."""
    if not prompts:
        raise DataError(
            f"expert {name!r}: none of its {rows} rows has a prompt before its answer (plain text?), "
            "and a router of the sequence reads prompts alone; give rows with prompts, or router.kind=token"
        )


def prompts_of(tokens: TokenSet) -> list[list[int]]:
    """What stands before the first supervised token of each sequence, of those that have two such
    tokens at least."""
    prompts = []
    for start, stop in zip(tokens.edges[:-1], tokens.edges[1:], strict=True):
        supervised = np.flatnonzero(tokens.weights[start:stop])
        length = int(supervised[0]) if len(supervised) else int(stop - start)
        if length > 1:
            prompts.append(tokens.tokens[start : start + length].tolist())
    return prompts


def attach_prototypes(
    opened: OpenedModel,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    router: RouterConfig,
    *,
    seed: int,
    tell: Callable[[str], None],
) -> PrototypeRouter:
    """A prototype router over the model's experts, of ``router.prompts`` prompts of each, drawn by the
    seed. Raises ConfigError where nothing tells two experts apart."""
    rule = checked_rule(router, opened, len(prompts))
    states = {
        name: _states(opened, _drawn(own, router.prompts, seed), rule)
        for name, own in prompts.items()
    }
    means = torch.stack([of.mean(0) for of in states.values()])
    prototype_router = PrototypeRouter(list(prompts), rule, means)
    attach_sequence_router(opened.model, prototype_router)
    prototype_router.refuse_equal_means()
    counts = leave_one_out(prototype_router, states)
    right, total = int(counts.diagonal().sum()), int(counts.sum())
    tell(
        f"router: prototypes of {', '.join(f'{len(s)} prompts of {n}' for n, s in states.items())}; "
        f"each left out, {right} of {total} are nearest to their own expert"
    )
    if right < CLEARLY_APART * total:
        tell(
            f"router: prompts of these experts look alike: {_most_confused(list(prompts), counts)}"
        )
    return prototype_router


def leave_one_out(router: PrototypeRouter, states: Mapping[str, Tensor]) -> Tensor:
    """[K,K] int64: how many prompts of each expert (row) are nearest to which (column), where each is
    left out of its own expert's mean; of an expert with one prompt none can be."""
    counts = torch.zeros(len(states), len(states), dtype=torch.int64)
    for k, own in enumerate(states.values()):
        for n in range(len(own) if len(own) > 1 else 0):
            means = router.means.clone()
            means[k] = torch.cat([own[:n], own[n + 1 :]]).mean(0)
            nearest = PrototypeRouter(router.adapters, router.rule, means).scores(own[n : n + 1])
            counts[k, int(nearest.argmax())] += 1
    return counts


def attach_classifier(
    opened: OpenedModel,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    router: RouterConfig,
    *,
    seed: int,
    tell: Callable[[str], None],
) -> ClassifierRouter:
    """A classifier of prompts over the model's experts, trained on their states. Raises DataError for
    an expert with too few prompts for the splits, NonFiniteError."""
    rule, settings = checked_rule(router, opened, len(prompts)), router.classifier_train(seed)
    splits = {name: split_prompts(name, len(own), router, seed) for name, own in prompts.items()}
    states = {name: _states(opened, own, rule).cpu() for name, own in prompts.items()}
    sets = {
        split: (
            torch.cat([states[name][splits[name][split]] for name in prompts]),
            torch.cat(
                [torch.full((len(splits[name][split]),), k) for k, name in enumerate(prompts)]
            ),
        )
        for split in SPLITS
    }
    weights, record = train_classifier(sets, list(prompts), router.hidden, router.dropout, settings)
    classifier = ClassifierRouter(
        list(prompts),
        rule,
        {name: value.to(opened.model.device) for name, value in weights.items()},
        training=record,
    )
    attach_sequence_router(opened.model, classifier)
    tell(f"router: {_summary(record)}")
    return classifier


def split_prompts(name: str, rows: int, router: RouterConfig, seed: int) -> dict[str, Tensor]:
    """{train | val | test: [n] int64}: an expert's prompts, each in one split, by the seed. Every
    expert is split by itself, so that each split has its share of a small one. Raises DataError where
    a split that is asked for would have none."""
    order = torch.from_numpy(epoch_order(rows, seed, 0, name=f"splits/{name}").copy())
    shares = {"train": router.train_split, "val": router.val_split, "test": router.test_split}
    # the first two rounded, the last gets what is left: together they are all rows
    val = round(shares["val"] * rows)
    test = round(shares["test"] * rows)
    counts = {"train": rows - val - test, "val": val, "test": test}
    for split, share in shares.items():
        if share > 0 and counts[split] < 1:
            raise DataError(
                f"expert {name!r} has {rows} prompts, of which router.{split}_split={share:g} is none; give more rows, "
                "or other splits (they add to 1)"
            )
    ends = np.cumsum([counts[split] for split in SPLITS])
    starts = [0, *ends[:-1]]
    return {split: order[start:end] for split, start, end in zip(SPLITS, starts, ends, strict=True)}


def train_classifier(
    sets: Mapping[str, tuple[Tensor, Tensor]],
    experts: Sequence[str],
    hidden: Sequence[int],
    dropout: float,
    settings: ClassifierTrainConfig,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(a classifier's tensors, the record of its training). ``sets``: {split: (states [N,D], labels
    [N])}; cross-entropy weighs experts equally, however many prompts each has, and the epoch with the
    best macro F1 on the val split stays (the first of equals, by loss). A function of its arguments:
    numbers are drawn from a generator of the seed. Raises NonFiniteError.
    """
    (states, labels), (val, val_labels) = sets["train"], sets["val"]
    generator = torch.Generator().manual_seed(settings.seed)
    # trained on components of one size; what that takes is folded into the first linear at the end
    mean, deviation = states.mean(0), states.std(0, unbiased=False)
    deviation = torch.where(deviation < SMALLEST_DEVIATION, 1.0, deviation)
    states, val = (states - mean) / deviation, (val - mean) / deviation
    weights = _first_weights(classifier_shapes(states.shape[1], hidden, len(experts)), generator)
    # N / (K n_e), so that a domain with many prompts does not decide for the others
    class_weights = len(labels) / (len(experts) * labels.bincount(minlength=len(experts)).float())
    decaying = [w for name, w in weights.items() if name.endswith("weight")]
    others = [w for name, w in weights.items() if not name.endswith("weight")]
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    epochs: list[dict[str, float]] = []
    best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
    size = settings.per_device_train_batch_size
    for epoch in range(settings.num_train_epochs):
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels), size):
            rows = order[start : start + size]
            masks = [
                (torch.rand(len(rows), width, generator=generator) >= dropout) / (1 - dropout)
                for width in (hidden if dropout else ())
            ]
            loss = F.cross_entropy(
                classify(weights, states[rows], masks), labels[rows], weight=class_weights
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = classify(weights, val)
            val_loss = float(F.cross_entropy(logits, val_labels, weight=class_weights))
        if not np.isfinite(val_loss):
            raise NonFiniteError(
                f"epoch {epoch + 1} of the router's training: its loss is not finite; lower "
                "router.train.learning_rate"
            )
        f1 = macro_f1(confusion_matrix(logits.argmax(-1), val_labels, len(experts)))
        epochs.append({"val_f1": round(f1, 6), "val_loss": round(val_loss, 6)})
        if best is None or (f1, -val_loss) > best[0]:
            best = (f1, -val_loss), epoch + 1, {n: w.detach().clone() for n, w in weights.items()}
    assert best is not None
    best_weights = best[2]
    best_weights["0.weight"] = best_weights["0.weight"] / deviation
    best_weights["0.bias"] = best_weights["0.bias"] - best_weights["0.weight"] @ mean
    record: dict[str, Any] = {
        "prompts": {split: len(of) for split, (_, of) in sets.items()},
        "epochs": epochs,
        "best_epoch": best[1],
    }
    if len(sets["test"][1]):
        # of the folded weights on raw states: what the mixture will answer by
        counts = confusion_matrix(
            classify(best_weights, sets["test"][0]).argmax(-1), sets["test"][1], len(experts)
        )
        record["test"] = {
            "f1": round(macro_f1(counts), 6),
            "accuracy": round(float(counts.diagonal().sum() / counts.sum()), 6),
            "confusion": {name: row.tolist() for name, row in zip(experts, counts, strict=True)},
        }
    return best_weights, record


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[K,K] int64: rows are labels, columns what was said."""
    return (
        (labels * classes + predictions)
        .bincount(minlength=classes * classes)
        .view(classes, classes)
    )


def macro_f1(counts: Tensor) -> float:
    """The mean over classes of 2 tp / (2 tp + fp + fn); 0 for a class of which there is neither."""
    right = counts.diagonal().double()
    return float((2 * right / (counts.sum(0) + counts.sum(1)).clamp(min=1)).mean())


def _states(opened: OpenedModel, prompts: Sequence[Sequence[int]], rule: PromptRule) -> Tensor:
    with evaluation_mode(opened.model):
        return prompt_states(opened.model, prompts, rule.layer, rule.pooling)


def _drawn(prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[Sequence[int]]:
    order = epoch_order(len(prompts), seed, 0, name="prototypes")
    return [prompts[row] for row in order[:count]]


def _first_weights(
    shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
) -> dict[str, Tensor]:
    """Uniform within 1/sqrt(inputs), as `torch.nn.Linear` has it."""
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        bound = shapes[name.replace("bias", "weight")][1] ** -0.5
        draw = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        values[name] = draw.requires_grad_()
    return values


def _most_confused(names: Sequence[str], counts: Tensor) -> str:
    off = counts - torch.diag(counts.diagonal())
    k, e = divmod(int(off.argmax()), len(names))
    return f"{int(off[k, e])} of {names[k]}'s are nearer to {names[e]}"


def _summary(record: Mapping[str, Any]) -> str:
    best = record["epochs"][record["best_epoch"] - 1]
    sizes = ", ".join(f"{count} {split}" for split, count in record["prompts"].items())
    text = (
        f"a classifier of prompts ({sizes}); epoch {record['best_epoch']} stays, "
        f"F1 {best['val_f1']:.3f} on val"
    )
    return text + (f", {record['test']['f1']:.3f} on test" if "test" in record else "")


# kind -> what makes its router of {expert: its prompts} and attaches it to the model
PROMPT_ROUTERS: Mapping[str, Callable[..., PrototypeRouter | ClassifierRouter]] = {
    "prototype": attach_prototypes,
    "sequence": attach_classifier,
}
