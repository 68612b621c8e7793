"""Gradients made of two parts, against the same formulas over transformers' gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.errors import NonFiniteError
from lorry.models.decoder.model import Decoder
from lorry.tasks.unlearn.gradients import make_gradient_rule
from lorry.tasks.unlearn.methods.primal_dual import PDU
from lorry.tasks.unlearn.task import UnlearnTask
from tests.support.unlearning import Row, Twin, ragged_rows, twin_model
from tests.tasks.unlearn.test_methods import (
    CASES,
    Case,
    backend_of,
    flat_gradient,
    measure,
    task_of,
)

RADIUS = 0.3


def backend_with(
    ours: Decoder, kind: str, radius: Mapping[str, float], names: tuple[str, ...] = ("default",)
) -> LocalBackend:
    backend_of(ours, names)  # attaches
    rule = make_gradient_rule(kind, radius)
    return LocalBackend(ours, names, OptimSettings(max_grad_norm=0.0), gradient=rule)


def split_task(
    local: LocalBackend, case: Case, rows: list[Row], micro_batches: int = 1
) -> UnlearnTask:
    task = task_of(local, case.method, [case.settings], [rows], micro_batches)
    task.split = True
    return task


def parts(local: LocalBackend, plain: Twin, case: Case, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """The twin's flat gradients of the forget and the retain term, with their factors."""
    seen = [plain.see(row) for row in rows]
    forget = plain.gradient(case.gamma * case.forget(seen))
    exact = flat_gradient(local, "default", forget)
    if case.retain is None:
        return exact, torch.zeros_like(exact)
    kept = plain.gradient(case.alpha * case.retain(seen))
    return exact, flat_gradient(local, "default", kept)


def move(local: LocalBackend, plain: Twin, by: Tensor) -> None:
    with torch.no_grad():
        for tensor, part in get_bank(local.model)["default"].split_like(by).items():
            path, _, which = tensor.rpartition(".lora_")
            plain.leaves[path]["AB".index(which[0])].add_(part)


def error(mine: Tensor, exact: Tensor) -> float:
    return float((mine - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "micro_batches"), [("NPO", 1), ("NPO KL", 4), ("DPO", 4), ("IdkAP", 1), ("CEU", 4)]
)
def test_sam_is_the_gradient_a_step_uphill(name: str, micro_batches: int, tmp_path: Path) -> None:
    theirs, ours = twin_model(tmp_path)
    local, case, rows = backend_with(ours, "sam", {"default": RADIUS}), CASES[name], ragged_rows()
    plain = Twin(theirs, ours, "default")
    before = local.bank["default"].values.clone()
    stats, (mine,) = measure(local, split_task(local, case, rows, micro_batches))
    assert torch.equal(local.bank["default"].values, before)
    forget, retain = parts(local, plain, case, rows)
    at_theta = case.loss([plain.see(row) for row in rows])
    assert stats.loss["default"] == pytest.approx(float(at_theta.detach()), rel=1e-6)
    move(local, plain, RADIUS * forget / forget.norm())
    uphill, _ = parts(local, plain, case, rows)
    assert error(mine, uphill + retain) < 1e-5
    assert error(mine, forget + retain) > 1e-2


def test_gru_takes_out_what_undoes_the_retained(tmp_path: Path) -> None:
    """Two steps of other rows: the mean is over both."""
    theirs, ours = twin_model(tmp_path)
    local, case = backend_with(ours, "gru", {}), CASES["GradDiff"]
    plain, mean = Twin(theirs, ours, "default"), torch.zeros(())
    for seed in (0, 1):
        rows = ragged_rows(seed)
        # a forget row of its own that is retained, too: one gradient undoes the other
        again = next(r for r in rows if r.kind == "retain")
        rows.append(Row("forget", 99, again.tokens, again.answer))
        _, (mine,) = measure(local, split_task(local, case, rows, 2))
        forget, retain = parts(local, plain, case, rows)
        mean = 0.8 * retain + 0.2 * mean
        along = forget @ mean
        assert along < 0
        exact = forget - along / (mean @ mean) * mean
        assert error(mine, exact) < 1e-5
        assert abs(float(mine @ mean)) < 1e-5 * float(mine.norm() * mean.norm())
    kept = local.state()
    found = {k: t for k, t in kept.items() if k.startswith("retain_momentum/default/")}
    flat = flat_like(local, found)
    assert error(flat, mean) < 1e-5


def test_pdus_lambda_has_no_say_in_grus_mean(tmp_path: Path) -> None:
    """lambda falls from 50 to 0 between two steps; the mean is of the gradients of L_r itself."""
    theirs, ours = twin_model(tmp_path)
    local, case = backend_with(ours, "gru", {}), CASES["PDU"]
    plain, mean = Twin(theirs, ours, "default"), torch.zeros(())
    for seed, multiplier in ((0, 50.0), (1, 0.0)):
        rows = ragged_rows(seed)
        task = split_task(local, case, rows, 2)
        task.method.direction_only = True
        assert isinstance(task.method, PDU)
        task.method.multipliers = [multiplier]
        stats, (mine,) = measure(local, task)
        assert stats.terms["lambda"]["default"] == pytest.approx(multiplier)
        forget, retain = parts(local, plain, case, rows)
        mean = 0.8 * retain / case.alpha + 0.2 * mean
        along = forget @ mean
        exact = forget - along / (mean @ mean) * mean if along < 0 else forget
        assert error(mine, exact) < 1e-5
    found = {k: t for k, t in local.state().items() if k.startswith("retain_momentum/default/")}
    assert error(flat_like(local, found), mean) < 1e-5


def flat_like(local: LocalBackend, found: Mapping[str, Tensor]) -> Tensor:
    adapter = get_bank(local.model)["default"]
    flat = torch.zeros_like(adapter.grads, dtype=torch.float64)
    for tensor, view in adapter.split_like(flat).items():
        view.copy_(found[f"retain_momentum/default/{tensor}"])
    return flat


def test_gru_leaves_a_gradient_that_harms_nothing(tmp_path: Path) -> None:
    theirs, ours = twin_model(tmp_path)
    local, case, rows = backend_with(ours, "gru", {}), CASES["IdkAP"], ragged_rows(pairs=2)
    # what is learnt in the place of the forgotten is what is retained
    kept = [row for row in rows if row.kind == "retain"]
    rows = [row for row in rows if row.kind != "alternate"]
    rows += [Row("alternate", g, row.tokens, row.answer) for g, row in enumerate(kept)]
    _, (mine,) = measure(local, split_task(local, case, rows))
    forget, retain = parts(local, Twin(theirs, ours, "default"), case, rows)
    assert float(forget @ retain) > 0
    assert error(mine, forget) < 1e-5


@pytest.mark.parametrize("kind", ["sam", "gru"])
def test_two_adapters_each_for_itself(kind: str, tmp_path: Path) -> None:
    _, ours = twin_model(tmp_path)
    names, radius = ("a", "b"), {"a": 0.1, "b": 0.5}
    local = backend_with(ours, kind, radius, names)
    rows, own = [ragged_rows(1), ragged_rows(2, pairs=3)], [{"beta": 0.1}, {"beta": 0.5}]

    def gradients(chosen: list[list[Row]]) -> list[Tensor]:
        assert local.gradient is not None
        local.gradient.bind(local.owners)  # from the first step again
        task = task_of(local, "NPO", own, chosen)
        task.split = True
        return measure(local, task)[1]

    together = gradients(rows)
    for k in range(2):
        alone = gradients([r if i == k else [] for i, r in enumerate(rows)])
        assert torch.allclose(together[k], alone[k], rtol=1e-4, atol=1e-7)


def test_a_loss_that_is_not_finite_uphill_leaves_the_adapter_in_place(tmp_path: Path) -> None:
    _, ours = twin_model(tmp_path)
    local = backend_with(ours, "sam", {"default": math.inf})
    before: Any = local.bank["default"].values.clone()
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        measure(local, split_task(local, CASES["NPO"], ragged_rows()))
    assert torch.equal(local.bank["default"].values, before)
    assert not local.bank["default"].grads.any()
