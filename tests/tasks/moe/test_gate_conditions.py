"""How well a router's matrices tell experts apart: singular values, against numpy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorry.adapters.router import RoutingRule, TokenRouter
from lorry.tasks.moe.task import condition_warnings, gate_conditions


def router(*matrices: torch.Tensor) -> TokenRouter:
    experts = [f"e{k}" for k in range(len(matrices[0]))]
    made = TokenRouter(experts, RoutingRule(), layers=len(matrices), width=matrices[0].shape[1])
    with torch.no_grad():
        for weight, matrix in zip(made.weights.values(), matrices, strict=True):
            weight.copy_(matrix)
    return made


def test_a_common_vector_changes_no_condition() -> None:
    """As it changes no softmax; numpy's numbers of a centred basis."""
    matrix = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    shifted = matrix + 100 * torch.ones(9)
    found = gate_conditions(router(matrix, shifted))
    centred = matrix.double().numpy() - matrix.double().numpy().mean(0)
    values = np.linalg.svd(centred, compute_uv=False)
    assert values[3] < 1e-12 * values[0]
    assert found[0, "mlp"] == pytest.approx(values[0] / values[2], rel=1e-6)
    assert found[1, "mlp"] == pytest.approx(found[0, "mlp"], rel=1e-3)


def test_two_experts_have_one_direction_and_equal_ones_none() -> None:
    pair = torch.tensor([[1.0, 0, 0], [0, 3, 0]])
    assert gate_conditions(router(pair))[0, "mlp"] == pytest.approx(1)
    assert condition_warnings(router(pair)) == []
    # two of three are one: no token can prefer either
    equal = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert gate_conditions(router(equal))[0, "mlp"] == math.inf
    (told,) = condition_warnings(router(equal, torch.eye(3)))
    assert told.startswith("1 of 2 gate matrices have a condition above 5 (layer 0, mlp: inf)")
