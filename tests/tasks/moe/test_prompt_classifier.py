"""The classifier of prompts: its training against plain torch, its splits, and its score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.routing.sequence import ClassifierRouter, PromptRule, PrototypeRouter, classify
from lorry.config.moe import ClassifierTrainConfig, RouterConfig
from lorry.errors import DataError
from lorry.tasks.moe.prompts import (
    confusion_matrix,
    leave_one_out,
    macro_f1,
    split_prompts,
    train_classifier,
)

WIDTH, NAMES = 6, ["a", "b", "c"]


def prompts(counts: tuple[int, int, int], seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """States [N,D] of a large common part and a small own one, components of unlike size; labels."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, WIDTH) * 3
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    noise = torch.randn(len(labels), WIDTH, generator=draw) * spread
    scale = torch.tensor([1.0, 10.0, 0.1, 1.0, 100.0, 1.0])
    return (centres[labels] + noise) * scale + 50, labels


def sets(spread: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "train": prompts((60, 20, 10), 0, spread),
        "val": prompts((6, 6, 6), 1, spread),
        "test": prompts((6, 6, 6), 2, spread),
    }


def test_training_is_that_of_plain_torch() -> None:
    """Linear and AdamW of torch on standardised states, cross-entropy with N / (K n_e): the same
    values after ten steps, the standardisation folded in."""
    settings = ClassifierTrainConfig(
        num_train_epochs=5, per_device_train_batch_size=45, learning_rate=1e-2, seed=7
    )
    found, record = train_classifier(sets(), NAMES, [], 0.5, settings)
    (x, labels), (val, val_labels) = sets()["train"], sets()["val"]
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    draw = torch.Generator().manual_seed(7)
    linear = nn.Linear(WIDTH, 3)
    with torch.no_grad():
        for value in (linear.weight, linear.bias):
            value.copy_((torch.rand(value.shape, generator=draw) * 2 - 1) * WIDTH**-0.5)
    optimizer = torch.optim.AdamW(
        [
            {"params": [linear.weight], "weight_decay": 0.01},
            {"params": [linear.bias], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    weight = torch.tensor([90 / 180, 90 / 60, 90 / 30])
    scores = []
    states = []
    for _ in range(5):
        order = torch.randperm(90, generator=draw)
        for rows in order.split(45):
            loss = F.cross_entropy(
                linear((x[rows] - mean) / deviation), labels[rows], weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = linear((val - mean) / deviation)
            right = [float(f1_of(logits.argmax(-1), val_labels, k)) for k in range(3)]
            scores.append(
                (sum(right) / 3, -float(F.cross_entropy(logits, val_labels, weight=weight)))
            )
            states.append({n: v.detach().clone() for n, v in linear.state_dict().items()})
    best = scores.index(max(scores))
    assert record["best_epoch"] == best + 1
    assert [e["val_f1"] for e in record["epochs"]] == pytest.approx(
        [f1 for f1, _ in scores], abs=1e-6
    )
    kept = states[best]
    expected = ((x - mean) / deviation) @ kept["weight"].T + kept["bias"]
    torch.testing.assert_close(classify(found, x), expected, rtol=1e-4, atol=1e-3)


def f1_of(said: Tensor, labels: Tensor, k: int) -> float:
    """2 tp / (2 tp + fp + fn) of one class, counted out."""
    tp = sum(int(s == k and t == k) for s, t in zip(said.tolist(), labels.tolist(), strict=True))
    wrong = sum(
        int((s == k) != (t == k)) for s, t in zip(said.tolist(), labels.tolist(), strict=True)
    )
    return 2 * tp / (2 * tp + wrong) if tp + wrong else 0.0


def test_the_best_epoch_stays_and_a_small_domain_counts() -> None:
    """With an MLP and a rate so large that later epochs are worse; the same twice bit for bit."""
    settings = ClassifierTrainConfig(
        num_train_epochs=12, learning_rate=3.0, per_device_train_batch_size=8, seed=1
    )
    found, record = train_classifier(sets(2.0), NAMES, [8], 0.2, settings)
    f1s = [e["val_f1"] for e in record["epochs"]]
    assert f1s[record["best_epoch"] - 1] == max(f1s)
    assert f1s[-1] < max(f1s)
    val, labels = sets(2.0)["val"]
    assert macro_f1(confusion_matrix(classify(found, val).argmax(-1), labels, 3)) == pytest.approx(
        max(f1s), abs=1e-6
    )
    again, _ = train_classifier(sets(2.0), NAMES, [8], 0.2, settings)
    assert all(torch.equal(found[n], again[n]) for n in found)


def test_macro_f1_counts_every_class_alike() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    said = torch.tensor([0, 0, 0, 1, 1, 0])
    counts = confusion_matrix(said, labels, 3)
    assert counts.tolist() == [[3, 1, 0], [0, 1, 0], [1, 0, 0]]
    expected = sum(f1_of(said, labels, k) for k in range(3)) / 3
    assert macro_f1(counts) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [7, 10, 33, 100])
def test_each_prompt_is_in_one_split(rows: int) -> None:
    router = RouterConfig(kind="sequence")
    splits = split_prompts("a", rows, router, seed=3)
    together = torch.cat([splits[name] for name in ("train", "val", "test")])
    assert sorted(together.tolist()) == list(range(rows))
    assert all(len(of) for of in splits.values())
    assert len(splits["val"]) == round(0.15 * rows)


def test_a_domain_too_small_for_its_splits_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"expert .a. has 3 prompts, of which router\.val_split=0\.15 is none"
    ):
        split_prompts("a", 3, RouterConfig(kind="sequence"), seed=0)
    none = RouterConfig(kind="sequence", train_split=0.5, val_split=0.5, test_split=0)
    assert {n: len(of) for n, of in split_prompts("a", 4, none, seed=0).items()} == {
        "train": 2,
        "val": 2,
        "test": 0,
    }


def test_prompts_that_look_alike_are_counted() -> None:
    """Two experts of one cloud and one apart: the third is always right, the first two are not."""
    draw = torch.Generator().manual_seed(0)
    cloud = torch.randn(12, WIDTH, generator=draw)
    states = {"a": cloud[:6], "b": cloud[6:], "c": torch.randn(6, WIDTH, generator=draw) + 20}
    means = torch.stack([s.mean(0) for s in states.values()])
    counts = leave_one_out(PrototypeRouter(NAMES, PromptRule(), means), states)
    assert counts[2].tolist() == [0, 0, 6]
    assert int(counts[:2, :2].diagonal().sum()) < 9


def test_gates_of_scores() -> None:
    """softmax at a temperature, the largest, to sum 1; and one expert is a gate of 1."""
    weights = {"0.weight": torch.eye(3), "0.bias": torch.zeros(3)}
    x = torch.tensor([[1.0, 3.0, 2.0]])
    both = ClassifierRouter(NAMES, PromptRule(top_k=2, temperature=0.5), weights).gates(x)
    assert both[0].tolist() == pytest.approx([0.0, *torch.tensor([6.0, 4.0]).softmax(0).tolist()])
    assert ClassifierRouter(NAMES, PromptRule(), weights).gates(x).tolist() == [[0, 1, 0]]
    soft = ClassifierRouter(NAMES, PromptRule(normalize=False), weights).gates(x)
    assert soft[0].tolist() == pytest.approx([0.0, float(x[0].softmax(0)[1]), 0.0])
