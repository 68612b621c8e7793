"""Weights rounded to NF4 and int8: the levels from their definition, blocks one at a time."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lorry.adapters.quantization.codes import NF4_LEVELS
from lorry.evaluate.unlearning.rounding import (
    int8,
    linear_weights,
    nf4,
    round_linears,
)


def test_levels_are_quantiles_of_a_normal_distribution() -> None:
    """As bitsandbytes makes them (create_normal_map): 8 above zero, zero, 7 below."""
    above = stats.norm.ppf(numpy.linspace(0.9677083, 0.5, 9)[:-1])
    below = -stats.norm.ppf(numpy.linspace(0.9677083, 0.5, 8)[:-1])
    levels = numpy.sort(numpy.concatenate([above, [0.0], below]))
    assert numpy.allclose(levels / levels.max(), NF4_LEVELS, atol=1e-6)


def test_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(NF4_LEVELS)


@pytest.mark.parametrize("shape", [(3, 64), (5, 40), (1, 1), (7, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_level_of_each_block(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    flat, expected = weight.double().reshape(-1), []
    for block in flat.split(64):
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float64) * block.abs().max()
        expected.append(levels[(block[:, None] - levels).abs().argmin(1)])
    found = nf4(weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().reshape(-1), torch.cat(expected).to(dtype).double())


def test_int8_is_off_by_half_a_step_of_its_row_at_most() -> None:
    weight = torch.randn((6, 50), generator=torch.Generator().manual_seed(2))
    steps = weight.abs().amax(1, keepdim=True) / 127
    found = int8(weight)
    assert ((found - weight).abs() <= steps / 2 * 1.001).all()
    assert torch.equal((found / steps).round(), (weight / steps).round())


@pytest.mark.parametrize("rounding", [nf4, int8])
def test_zeros_stay_zeros_and_rounding_twice_changes_nothing(rounding: type[Tensor]) -> None:
    weight = torch.randn((4, 64), generator=torch.Generator().manual_seed(3))
    weight[1] = 0
    once = rounding(weight)
    assert (once[1] == 0).all()
    torch.testing.assert_close(rounding(once), once)


def test_a_transposed_layer_is_rounded_by_its_outputs() -> None:
    """GPT-2's Conv1D holds [in, out]; the head and the embedding keep their weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = linear_weights(model)
    assert weights
    round_linears(model, nf4, weights)
    assert all(type(model.get_submodule(path)).__name__ == "Conv1D" for path in weights)
    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight")
        rounded = path in weights and isinstance(model.get_submodule(path), nn.Module)
        expected = nf4(before[name].t().contiguous()).t() if rounded else before[name]
        assert torch.equal(tensor, expected), name
