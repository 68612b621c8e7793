"""A bias beside every lora_B, beside PEFT's: logits, gradients and files both ways; among others in a batch,
weighed, and what it does not go with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_dora import HOMES, backward, native, peft_model, peft_tensors, relative
from test_dora_mixes import outputs
from torch import Tensor

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.merge import merge
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT warns of linears without a bias, into which it could not merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CASE = {"r": 3, "lora_alpha": 7, "lora_bias": True, "target_modules": "all-linear"}


@HOMES
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_gradients_and_files_are_pefts(
    home: Callable[..., Any], family: str, tiny: Any, ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    theirs = peft_model(tiny(family), CASE)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, ids)
    model = home(tiny(family))
    adapter = load_adapter(model, tmp_path / "theirs")
    assert adapter.spec.lora_bias
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    backward(theirs, ids)
    backward(model, ids)
    wanted, own = peft_tensors(theirs), adapter.split_like(adapter.grads)
    assert set(own) == set(wanted)
    assert sum(name.endswith("lora_B.bias") for name in own) == len(adapter.slots)
    for name, grad in own.items():
        assert relative(grad, wanted[name].grad) < 1e-5, name
    save_adapter(model, tmp_path / "ours")
    again = home(tiny(family))
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again, ids), logits(model, ids))
    back = PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    torch.testing.assert_close(logits(back, ids), expected, rtol=0, atol=1e-5)
    if family == "llama":
        with pytest.raises(ConfigError, match="has no bias, which lora_bias would be merged into"):
            merge(model)
    else:
        merge(model)
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)


def two(tiny: Any) -> Any:
    model = native(tiny("llama"))
    attach(model, LoraSpec(r=2, lora_alpha=4, lora_bias=True), "one")
    targets = ("q_proj", "up_proj")
    attach(model, LoraSpec(r=3, lora_alpha=6, lora_bias=True, target_modules=targets), "two")
    attach(model, LoraSpec(r=3, lora_alpha=6), "plain")
    draw = torch.Generator().manual_seed(1)
    for adapter in get_bank(model).adapters.values():
        adapter.values.copy_(torch.randn(adapter.values.shape, generator=draw) * 0.2)
        adapter.touch()
    return model


@pytest.mark.parametrize("recompute", [False, True])
def test_jobs_in_one_batch_are_each_alone(recompute: bool, tiny: Any) -> None:
    model = two(tiny)
    model.gradient_checkpointing = recompute
    sequences, names = [[3, 5, 9], [8, 1, 1, 4], [7, 2], [5, 6]], ["one", "two", None, "plain"]
    starts = [0, 3, 7, 9, 11]
    packed = outputs(model, sequences, Mix.per_sequence(names, starts))
    packed.square().mean().backward()
    bank, numel = get_bank(model), packed.numel()
    together = {name: bank[name].grads.clone() for name in bank.names()}
    for name, sequence, start in zip(names, sequences, starts, strict=False):
        alone = outputs(model, [sequence], Mix.none() if name is None else Mix.one(name))
        torch.testing.assert_close(packed[start : start + len(sequence)], alone, rtol=0, atol=1e-5)
        if name is not None:
            bank[name].grads.zero_()
            (alone.square().sum() / numel).backward()
            assert relative(together[name], bank[name].grads) < 1e-5, name


def test_weights_of_a_mix_reach_the_bias(tiny: Any) -> None:
    """fp64, at one linear: constants and gates per token against the sum written out; gradients too."""
    model = two(tiny).double()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(5, 32, dtype=torch.float64)
    gates = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    slots = [layer.slots[name] for name in ("one", "two")]
    for mix, weights in [
        (Mix.constants({"one": -0.5, "two": 2.0}), [-0.5, 2.0]),
        (Mix.routed(["one", "two"], gates), [gates[:, :1], gates[:, 1:]]),
    ]:
        y = layer(x, AdapterContext(mix))
        expected = x @ layer.weight.t()
        for slot, g in zip(slots, weights, strict=True):
            a, b, bias = slot.A.double(), slot.B.double(), slot.bias.double()
            expected = expected + g * slot.scale * (x @ a.t() @ b.t() + bias)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        inputs = [slot.bias for slot in slots]
        inputs += [gates] if isinstance(weights[0], Tensor) else []
        weigh = torch.randn_like(y)
        own = torch.autograd.grad((y * weigh).sum(), inputs)
        wanted = torch.autograd.grad((expected * weigh).sum(), inputs)
        for got, true in zip(own, wanted, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "lora_bias does not go with use_dora"),
        ({"init_lora_weights": "pissa"}, "lora_bias does not go with init_lora_weights=pissa"),
        ({"target_modules": ("embed",)}, "lora_bias is for linear layers"),
        ({"lora_bias": "all"}, "lora_bias is 'all'; it must be True or False"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(native(tiny("llama")), LoraSpec(**{"r": 2, "lora_bias": True, **changes}))
