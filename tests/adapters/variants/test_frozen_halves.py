"""Adapters of which one half trains (LoRA-FA's A, MiCA's B frozen), in fp32: PEFT's gradients and values, no
memory for what is frozen, and the other half as it began, bit for bit."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach, get_bank, lora_parameters
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.backends.optim import OptimSettings, ParameterSetOptimizer
from lorry.errors import ConfigError

TARGETS = ("q_proj", "down_proj")
SIZES = {"A": 3 * 2 * (32 + 48), "B": 3 * 2 * (32 + 32)}


def half(model: nn.Module, side: str, **settings: Any) -> Adapter:
    """An adapter of rank 2 on q_proj and down_proj of which one side trains."""
    return attach(model, LoraSpec(r=2, target_modules=TARGETS, train=(side,), **settings))  # type: ignore[arg-type]  # any text


@pytest.mark.parametrize(("side", "start"), [("B", True), ("A", False)])
def test_only_the_half_that_trains_has_gradients_and_moments(
    tiny: Any, ids: Tensor, side: str, start: bool
) -> None:
    model, twin = tiny("llama"), tiny("llama")
    adapter = half(model, side, init_lora_weights=start)
    both = attach(twin, LoraSpec(r=2, target_modules=TARGETS, init_lora_weights=start))
    assert adapter.values.numel() == adapter.grads.numel() == SIZES[side]
    assert adapter.num_parameters() == SIZES[side]
    optimizer = ParameterSetOptimizer(adapter, OptimSettings())
    assert optimizer.m.numel() == SIZES[side]
    assert {name[-1] for name in adapter.masters()} == {side}
    assert [*adapter.tensors()] == [*adapter.masters(), *adapter.held_tensors()] or side == "A"
    # the same first values as where both train
    for name, values in both.tensors().items():
        assert torch.equal(adapter.tensors()[name], values), name
    before = {name: values.clone() for name, values in adapter.tensors().items()}
    for each in (model, twin):
        each(input_ids=ids).logits.square().mean().backward()
    grads = both.split_like(both.grads)
    for name, grad in adapter.split_like(adapter.grads).items():
        torch.testing.assert_close(grad, grads[name], atol=1e-6, rtol=1e-5)
        assert bool(grad.any()), name
    optimizer.step(1e-2, adapter.norm())
    for name, values in adapter.tensors().items():
        assert torch.equal(values, before[name]) == (name[-1] != side), name
    copied = deepcopy(adapter)
    copied.values.fill_(1.0)
    assert copied.held is not None
    copied.held.fill_(2.0)
    slot = next(iter(copied.slots.values()))
    assert {float(slot.A.detach().max()), float(slot.B.detach().max())} == {1.0, 2.0}
    assert len(lora_parameters(model)) == 6


def test_the_gradient_is_pefts_with_a_frozen_lora_a(tiny: Any, ids: Tensor) -> None:
    model = tiny("llama")
    adapter = half(model, "B", lora_alpha=3)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    other = peft.get_peft_model(tiny("llama"), config)
    for name, param in other.named_parameters():
        if ".lora_" in name:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            param.data.copy_(adapter.tensors()[key])
            param.requires_grad_(".lora_B." in name)
    for each in (model, other):
        each(input_ids=ids).logits.square().mean().backward()
    grads = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad
        for n, p in other.named_parameters()
        if p.grad is not None
    }
    mine = adapter.split_like(adapter.grads)
    assert set(mine) == set(grads)
    for name, grad in mine.items():
        torch.testing.assert_close(grad, grads[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("train", "keeps"), [(("A", "B"), True), (("B",), False), (("A",), True)])
def test_x_is_kept_only_where_an_a_trains(train: tuple[Any, ...], keeps: bool) -> None:
    """LoRA-FA's memory: of a linear's input nothing stays but A x."""
    layer = nn.Sequential(nn.Linear(64, 16))
    attach(
        layer,
        LoraSpec(r=2, target_modules=("0",), train=train, init_lora_weights=False),
    )
    assert isinstance(layer[0], BankLinear)
    kept = list[Tensor]()
    x = torch.randn(40, 64)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert any(t.shape == x.shape for t in kept) == keeps
    assert any(t.shape == (40, 2) for t in kept)
    y.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mica_is_pefts(tiny: Any, ids: Tensor, logits: Any, tmp_path: Path, family: str) -> None:
    targets = ("c_attn",) if family == "gpt2" else TARGETS
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6}
    config = peft.LoraConfig(
        **settings,
        target_modules=list(targets),
        init_lora_weights="mica",
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    other = peft.get_peft_model(tiny(family), config)
    model = tiny(family)
    adapter = attach(model, LoraSpec(**settings, target_modules=targets, init_lora_weights="mica"))
    assert adapter.spec.train == ("A",)
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for n, p in other.named_parameters()
        if ".lora_" in n
    }
    for name, values in adapter.tensors().items():
        torch.testing.assert_close(values, theirs[name].detach(), atol=1e-6, rtol=1e-5)
        assert theirs[name].requires_grad == (name in adapter.masters())
    for each in (model, other):
        each(input_ids=ids).logits.square().mean().backward()
    for name, grad in adapter.split_like(adapter.grads).items():
        torch.testing.assert_close(grad, theirs[name].grad, atol=1e-5, rtol=1e-4)
    ParameterSetOptimizer(adapter, OptimSettings()).step(1e-2, adapter.norm())
    save_adapter(model, tmp_path)
    expected = logits(model, ids)
    again = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path))
    torch.testing.assert_close(logits(again, ids), expected, atol=1e-5, rtol=1e-5)
    plain = tiny(family)
    assert load_adapter(plain, tmp_path).spec.train == ("A", "B")
    assert torch.equal(logits(plain, ids), expected)


def test_the_frozen_half_is_watched(tiny: Any) -> None:
    model = tiny("llama")
    adapter = half(model, "B")
    watched = get_bank(model).frozen_tensors(["default"])
    assert {name.removeprefix("default/") for name in watched} == set(adapter.held_tensors())
    assert len(watched) == 6


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    for train in ((), ("A", "A"), ("C",)):
        with pytest.raises(ConfigError, match="give A, B or both"):
            LoraSpec(train=train)  # type: ignore[arg-type]  # any text
    with pytest.raises(ConfigError, match="train=A leaves lora_B at zero"):
        LoraSpec(train=("A",))
    with pytest.raises(ConfigError, match="init_lora_weights=mica trains A alone"):
        LoraSpec(train=("B",), init_lora_weights="mica")
    with pytest.raises(ConfigError, match="train=B with init_lora_weights=pissa"):
        LoraSpec(train=("B",), init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="train does not go with AdaLoRA"):
        LoraSpec(train=("B",), r=4, adalora={"target_r": 2})  # type: ignore[arg-type]  # a map
    with pytest.raises(ConfigError, match="embed_tokens is an embedding"):
        attach(tiny("llama"), LoraSpec(r=2, target_modules=("embed_tokens",), train=("B",)))
