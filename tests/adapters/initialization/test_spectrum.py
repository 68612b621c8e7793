"""The effective rank of a gradient against numpy's singular values of the one that plain autograd makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.adapters.attach import wrap_layers
from lorry.adapters.initialization import spectrum
from lorry.adapters.initialization.spectrum import effective_rank, gradient_ranks
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.quantization.linear import quantize_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS
from lorry.adapters.targets.candidates import find_linears
from lorry.errors import ConfigError


def by_numpy(matrix: np.ndarray[Any, Any], energy: float = 0.9) -> int:
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares) / squares.sum(), energy - 1e-9) + 1)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 0.95))
def test_it_is_that_of_all_singular_values(
    rank: int, rows: int, columns: int, energy: float
) -> None:
    generator = torch.Generator().manual_seed(rank * 41 + rows)
    matrix = torch.randn(rows, rank, generator=generator) @ torch.randn(
        rank, columns, generator=generator
    )
    expected = by_numpy(matrix.numpy(), energy)
    assert effective_rank(matrix, 256, energy=energy) == expected
    assert effective_rank(matrix, 3, energy=energy) == min(3, expected)


def test_zeros_have_none_and_a_large_matrix_is_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert effective_rank(torch.zeros(4, 5), 8) == 0
    generator = torch.Generator().manual_seed(0)
    scales = 0.7 ** torch.arange(60)
    left, right = (torch.linalg.qr(torch.randn(60, 60, generator=generator))[0] for _ in "ab")
    matrix = left * scales @ right
    monkeypatch.setattr(spectrum, "EXACT_SIDE", 10)
    assert effective_rank(matrix, 32) == by_numpy(matrix.numpy())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_a_model_it_is_that_of_autograds_gradients(tiny: Any, family: str) -> None:
    """A foreign model, float32; one side is torch's own linears."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    plain, model = tiny(family), tiny(family)
    plain(input_ids=ids, labels=ids).loss.backward()
    wrap_layers(model)
    layers = {p: m for p, m in find_linears(model).items() if isinstance(m, BankLinear)}
    layers.pop("lm_head", None)
    model.requires_grad_(False)
    found = gradient_ranks(layers, lambda: model(input_ids=ids, labels=ids).loss.backward(), 256)
    for path, rank in found.items():
        gradient = plain.get_submodule(path).weight.grad
        assert rank == by_numpy(gradient.numpy()), path
    assert len(set(found.values())) > 1
    # nothing of it stays
    assert all(layer.product is None for layer in layers.values())
    with pytest.raises(ConfigError, match="got a gradient on the rows that r=auto reads"):
        gradient_ranks(layers, lambda: None, 256)


def test_a_base_in_few_bits_has_gradients_too() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 64, generator=generator)
    x = torch.randn(40, 64, generator=generator)
    target = torch.randn(40, 32, generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    model[0].weight.data.copy_(weight)
    quantize_linears(model, QUANTIZATIONS["nf4"], torch.float32)
    layers = {"0": model[0]}

    def backward() -> None:
        (model(x) * target).sum().backward()

    assert gradient_ranks(layers, backward, 64) == {"0": by_numpy((target.t() @ x).numpy())}
