"""What no merge makes an adapter of: an error that names it, and a model as it was."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

import lorry
from lorry.adapters.attach import attach, get_bank
from lorry.adapters.merge import merge
from lorry.adapters.spec import LoraSpec
from lorry.config.merge import MERGE_METHODS, MethodName
from lorry.errors import ConfigError, ModelError


@pytest.fixture
def model(tiny: Any, shake: Any) -> nn.Module:
    """Adapters a (r=4) and b (r=2) on q_proj."""
    built = tiny("llama", num_hidden_layers=1)
    for name, rank in (("a", 4), ("b", 2)):
        attach(built, LoraSpec(r=rank, target_modules=("q_proj",)), name)
        shake(get_bank(built)[name].masters().values())
    return built


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, {}, "no adapter to merge; this model has a, b"),
        ({"a": 1.0, "c": 1.0}, {}, "no adapter named 'c'"),
        ({"a": float("nan")}, {}, "weight of adapter 'a' is nan"),
        ({"a": 1.0, "b": 1.0}, {"method": "tie"}, r"not among .*did you mean 'ties'"),
        ({"a": 1.0, "b": 1.0}, {"method": "core_ties", "density": 0.0}, "density is 0.0; it must"),
        ({"a": 1.0, "b": 1.0}, {"method": "core_ties", "density": 1.1}, "density is 1.1"),
        ({"a": 1.0, "b": 1.0}, {"majority_sign_method": "vote"}, "give total or frequency"),
        (
            {"a": 1.0, "b": 1.0},
            {"rank": 2},
            "method=cat does not use rank; the methods that do: svd",
        ),
        ({"a": 1.0, "b": 1.0}, {"method": "svd", "rank": 0}, "rank is 0"),
        ({"a": 1.0, "b": 1.0}, {"scale": float("inf")}, "scale is inf"),
        ({"a": 1.0, "b": 1.0}, {"scale": 0.0}, "merged adapter is zero: scale is 0"),
        ({"a": 0.0, "b": 0.0}, {}, "merged adapter is zero: every weight is 0"),
        (
            {"a": 1.0, "b": 0.0},
            {"method": "core_iso"},
            "of adapter 'b' is 0; leave the adapter out",
        ),
        (
            {"a": 1.0, "b": 0.0},
            {"method": "core_tsv"},
            "of adapter 'b' is 0; leave the adapter out",
        ),
        (
            {"a": 1.0, "b": 1.0},
            {"method": "ties_svd", "density": 1e-9},
            "zero: density=1e-09 drops",
        ),
        ({"a": 1.0, "b": 1.0}, {"scale": 1e-60}, "merged adapter is zero"),
        ({"a": 1.0}, {"method": "svd", "rank": 2}, "of one adapter is a copy"),
        ({"a": 1.0, "b": 1.0}, {"method": "dare_ties"}, "have the ranks 4, 2"),
        ({"a": 1.0, "b": 1.0}, {"name": "a"}, "'a' is already attached"),
    ],
)
def test_settings_that_make_no_adapter(
    weights: dict[str, float], options: dict[str, Any], message: str, model: nn.Module
) -> None:
    active = get_bank(model).active
    with pytest.raises(ConfigError, match=message):
        lorry.merge_adapters(model, weights, **options)
    assert get_bank(model).names() == ["a", "b"]
    assert get_bank(model).active is active


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "core_linear", "core_iso", "core_tsv"])
def test_adapters_that_add_up_to_nothing_are_refused(method: str, tiny: Any, shake: Any) -> None:
    """A copy has 3 B and A / 3, rounded, or 2 B and A / 2; where there is no such sum, one that was
    never trained."""
    model = tiny("llama", num_hidden_layers=1)
    for name in ("a", "copy", "fresh"):
        attach(model, LoraSpec(r=2, target_modules=("q_proj",)), name)
    bank = get_bank(model)
    shake(bank["a"].masters().values())
    weights = {"fresh": 1.0} if method in ("linear", "core_tsv") else {"a": 1.0, "copy": -1.0}
    factor = 3.0 if method in ("cat", "core_iso") else 2.0
    with torch.no_grad():
        for path, slot in bank["a"].slots.items():
            bank["copy"].slots[path].A.copy_(slot.A / factor)
            bank["copy"].slots[path].B.copy_(slot.B * factor)
    with pytest.raises(ConfigError, match=r"the merged adapter is zero: .* x "):
        lorry.merge_adapters(model, weights, method=method)
    assert bank.names() == ["a", "copy", "fresh"]


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_what_overflows_is_refused_by_name(method: str, tiny: Any, shake: Any) -> None:
    """float32 ends at 3e38, and an SVD of infinity raises an error of its own."""
    model = tiny("llama", num_hidden_layers=1)
    for name in ("a", "b"):
        attach(model, LoraSpec(r=2, target_modules=("q_proj",)), name)
        shake(get_bank(model)[name].masters().values())
        with torch.no_grad():
            get_bank(model)[name].values.mul_(1e25)
    with pytest.raises(ModelError, match=r"self_attn\.q_proj.* infinite or NaN"):
        lorry.merge_adapters(model, {"a": 3e38, "b": 3e38}, method=method, scale=1e30)
    assert get_bank(model).names() == ["a", "b"]


def test_a_merged_model_takes_no_more(model: nn.Module) -> None:
    merge(model, {"a": 1.0})
    with pytest.raises(ConfigError, match="model is merged"):
        lorry.merge_adapters(model, {"a": 1.0, "b": 1.0})


def test_every_name_is_a_method() -> None:
    assert get_args(MethodName) == tuple(MERGE_METHODS)
