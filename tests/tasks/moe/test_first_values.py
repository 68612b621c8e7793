"""The first values of a token router against least squares in numpy on transformers' own inputs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorry.adapters.attach import attach
from lorry.adapters.router import RoutingRule, TokenRouter, attach_router
from lorry.adapters.spec import LoraSpec
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.models.causal_lm import CausalLM
from lorry.models.hf.model import HfModel
from lorry.tasks.moe.first_values import (
    RIDGE,
    SCALES,
    split_rows_for_scale,
    start_at_discriminants,
)
from tests.support import tiny

MLP = ["gate_proj", "up_proj", "down_proj"]
Rows = list[list[int]]


def draw_rows(seed: int, low: int, high: int, lengths: tuple[int, ...]) -> Rows:
    """Rows of tokens from low to high."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (n,), generator=draw).tolist() for n in lengths]


def batches_of(rows: Rows) -> list[Batch]:
    """Two batches of them."""
    packed = [TokenizedExample(row, [0.0] + [1.0] * (len(row) - 1)) for row in rows]
    return [collate(part) for part in (packed[:1], packed[1:]) if part]


def routed_model(
    source: torch.nn.Module, folder: Path, native: bool
) -> tuple[CausalLM, TokenRouter]:
    model: CausalLM = tiny.decoder(source, folder) if native else HfModel(deepcopy(source))
    for name in ("a", "b", "c"):
        attach(model, LoraSpec(r=2, target_modules=MLP), name).freeze()
    return model, attach_router(model, ["a", "b", "c"], RoutingRule("mlp", 2, temperature=1.5))


def inputs_of(source: torch.nn.Module, rows: Rows) -> list[NDArray[np.float64]]:
    """What each layer's MLP reads of the rows, [tokens, width], by transformers in float64."""
    seen: dict[int, list[NDArray[np.float64]]] = {}
    model = deepcopy(source).double()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda m, x, y, n=number: seen.setdefault(n, []).append(x[0][0].numpy())
        )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    return [np.concatenate(seen[n]) for n in sorted(seen)]


def expected_matrix(
    fitted: list[NDArray[np.float64]], held: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], float]:
    """(W, its scale) of one layer from each expert's inputs: rows of a tall matrix, as numpy has it."""
    count = len(fitted)
    x = np.concatenate([own / np.sqrt(count * len(own)) for own in fitted])
    y = np.concatenate(
        [
            (np.eye(count)[k] - 1 / count)[None]
            / np.sqrt(count * len(own))
            * np.ones((len(own), 1))
            for k, own in enumerate(fitted)
        ]
    )
    ridge = np.sqrt(RIDGE * np.square(x).sum() / x.shape[1])
    tall = np.concatenate([x, ridge * np.eye(x.shape[1])])
    w = np.linalg.lstsq(tall, np.concatenate([y, np.zeros((x.shape[1], count))]), rcond=None)[0].T
    costs = []
    for scale in SCALES:
        cost = 0.0
        for k, own in enumerate(held):
            z = scale * own @ w.T
            cost += float((np.log(np.exp(z).sum(1)) - z[:, k]).mean())
        costs.append(cost)
    return w, SCALES[int(np.argmin(costs))]


@pytest.mark.parametrize("native", [True, False], ids=["decoder", "transformers"])
def test_first_values_are_least_squares_of_whose_row_it_is(native: bool, tmp_path: Path) -> None:
    """float32 against numpy's lstsq in float64 on transformers' inputs; rows of different lengths,
    experts of equal weight."""
    source = tiny.fresh("llama", num_hidden_layers=2)
    model, router = routed_model(source, tmp_path, native)
    lengths = (9, 30, 14)
    spans = {"a": (0, 14), "b": (10, 24), "c": (20, tiny.VOCAB)}
    fitted = {n: draw_rows(1, *span, lengths[i:]) for i, (n, span) in enumerate(spans.items())}
    held = {n: draw_rows(2, *span, (11, 8)) for n, span in spans.items()}
    start_at_discriminants(
        model,
        router,
        {n: batches_of(rows) for n, rows in fitted.items()},
        {n: batches_of(rows) for n, rows in held.items()},
    )
    found_fitted, found_held = (
        [inputs_of(source, rows) for rows in sets.values()] for sets in (fitted, held)
    )
    scales = []
    for layer in range(2):
        w, scale = expected_matrix(
            [own[layer] for own in found_fitted], [own[layer] for own in found_held]
        )
        wanted = torch.from_numpy(w * scale * 1.5)  # logits are over the temperature
        assert (router.weights[layer, "mlp"].double() - wanted).norm() < 1e-4 * wanted.norm()
        scales.append(scale)
    assert min(scales) > 0  # domains of other words are told apart


def test_rows_that_nothing_tells_apart_leave_the_router_at_zero(tmp_path: Path) -> None:
    """float32. One expert's rows under three names: least squares fits the few that it has seen, and
    the scale, which others choose, is 0. (On the rows it was fitted to, another one would be.)"""
    source = tiny.fresh("llama", num_hidden_layers=2)
    model, router = routed_model(source, tmp_path, True)
    sets = [
        {n: batches_of(draw_rows(seed + i, 0, tiny.VOCAB, (12, 9))) for i, n in enumerate("abc")}
        for seed in (1, 11)
    ]
    start_at_discriminants(model, router, sets[0], sets[1])
    assert not router.values.any()
    start_at_discriminants(model, router, sets[0], sets[0])
    assert router.values.any()


def test_every_fourth_row_chooses_the_scale() -> None:
    assert split_rows_for_scale(9) == ([0, 1, 2, 4, 5, 6, 8], [3, 7])
    assert split_rows_for_scale(3) == ([0, 1], [2])
    assert split_rows_for_scale(1) == ([0], [0])
