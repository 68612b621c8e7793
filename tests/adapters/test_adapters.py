"""Adapters as flat buffers, attaching and detaching, and every way to ask for layers that do not
exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError

Q0 = "model.layers.0.self_attn.q_proj"


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float().logsumexp(-1).mean()


def test_the_buffer_is_every_a_then_every_b(tiny: Any) -> None:
    adapter = attach(
        tiny("llama"),
        LoraSpec(r=3, target_modules=("down_proj", "q_proj"), rank_pattern={"q_proj": 5}),
    )
    slots = list(adapter.slots.values())
    assert [s.module for s in slots[:2]] == [Q0, "model.layers.0.mlp.down_proj"], (
        "model order, not the order of the list"
    )
    halves = [torch.cat([getattr(s, side).detach().flatten() for s in slots]) for side in "AB"]
    assert torch.equal(adapter.values, torch.cat(halves))
    assert adapter.split == halves[0].numel()
    assert adapter.values.dtype == torch.float32
    for name, view in adapter.tensors().items():
        module, _, side = name.rpartition(".lora_")
        assert view.data_ptr() == getattr(adapter.slots[module], side).data_ptr()
        assert view.shape == getattr(adapter.slots[module], side).shape


def test_gradients_gather_in_the_flat_buffer(tiny: Any, ids: Tensor, shake: Any) -> None:
    model = tiny("llama")
    adapter = attach(model, LoraSpec(r=2, target_modules=("q_proj", "down_proj")))
    shake(lora_parameters(model))
    loss(model, ids).backward()
    once = adapter.grads.clone()
    assert all(v.abs().sum() > 0 for v in adapter.split_like(once).values())
    loss(model, ids).backward()
    torch.testing.assert_close(adapter.grads, 2 * once)
    slot = adapter.slots[Q0]
    assert slot.A.grad is not None
    assert slot.A.grad.data_ptr() == adapter.split_like(adapter.grads)[f"{Q0}.lora_A"].data_ptr()


def test_a_frozen_adapter_never_has_memory_for_gradients(
    tiny: Any, ids: Tensor, logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32. Not for a moment either (the buffer of one that trains is made by zeros_like); its
    values are those of the same seed."""
    model, other = tiny("llama"), tiny("llama")
    spec = LoraSpec(r=2, target_modules=("q_proj", "down_proj"), init_lora_weights=False)
    trained = attach(other, spec, seed=3)

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("memory for gradients")

    monkeypatch.setattr(torch, "zeros_like", refuse)
    adapter = attach(model, spec, seed=3, trainable=False)
    monkeypatch.undo()
    assert not adapter.grads.numel()
    assert not adapter.wanting_gradients()
    assert torch.equal(adapter.values, trained.values)
    torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=0, atol=0)


def test_writing_the_buffer_reaches_the_layers(tiny: Any, ids: Tensor, logits: Any) -> None:
    model = tiny("llama").bfloat16()
    adapter = attach(model, LoraSpec(r=2, target_modules=("q_proj",)))
    before = logits(model, ids)
    adapter.values.fill_(0.1)
    adapter.touch()
    assert not torch.equal(logits(model, ids), before)


def raw_sgd(params: list[nn.Parameter]) -> None:
    """How many optimizers outside torch are written: through `.data`, which no version counter
    sees.
    """
    for p in params:
        p.data.add_(p.grad, alpha=-0.5)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Callable[[], Any]]] = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True).step,
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True).step,
    "plain": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False).step,
    "data": lambda p: lambda: raw_sgd(p),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_of_your_own_trains_the_model(
    optimizer: str, dtype: torch.dtype, tiny: Any, ids: Tensor, logits: Any
) -> None:
    """The trap: with a bf16 base the layers compute with copies, and a stale copy would train
    nothing and look fine.
    """
    model = tiny("llama").to(dtype)
    attach(model, LoraSpec(r=4, target_modules="all-linear"))
    step = OPTIMIZERS[optimizer](lora_parameters(model))
    seen = [logits(model, ids)]
    losses = []
    for _ in range(3):
        for p in lora_parameters(model):
            p.grad = None  # what zero_grad(set_to_none=True) does
        value = loss(model, ids)
        value.backward()
        losses.append(value.item())
        step()
        seen.append(logits(model, ids))
        assert not torch.equal(seen[-1], seen[-2])
    assert losses[-1] < losses[0]


def test_attach_and_detach_leave_the_base_alone(
    family: str, tiny: Any, ids: Tensor, logits: Any, shake: Any
) -> None:
    model = tiny(family)
    keys = list(model.state_dict())
    parameters = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    modules = {n: id(m) for n, m in model.named_modules()}
    before = logits(model, ids)
    targets = {"gpt2": ("c_attn", "wte"), "gpt_neox": ("dense", "embed_in")}.get(
        family, ("v_proj", "embed_tokens")
    )
    attach(model, LoraSpec(r=2, target_modules=(*targets, "lm_head")), "a")
    assert torch.equal(logits(model, ids), before), "a new adapter does nothing"
    attach(model, LoraSpec(r=3, target_modules="all-linear"), "b")
    shake(lora_parameters(model))
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert not any(p.requires_grad for p in model.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in lora_parameters(model)}
    get_bank(model).activate(Mix.one("b"))
    with_b = logits(model, ids)
    detach(model, "a")
    assert torch.equal(logits(model, ids), with_b)
    detach(model, "b")
    assert {n: id(m) for n, m in model.named_modules()} == modules, "its own layers are back"
    assert torch.equal(logits(model, ids), before)
    assert get_bank(model).names() == []


def test_training_and_evaluation_modes_follow(tiny: Any) -> None:
    model = tiny("llama").train()
    attach(model, LoraSpec(r=2, target_modules=("q_proj",)))
    assert all(m.training for m in model.modules())
    assert isinstance(model.get_submodule(Q0), BankLinear)
    assert not any(m.training for m in model.eval().modules())


def test_moving_keeps_identity(tiny: Any, ids: Tensor) -> None:
    model = tiny("llama")
    adapter = attach(model, LoraSpec(r=2, target_modules=("q_proj",)))
    before = lora_parameters(model)
    get_bank(model).to(torch.device("cpu"))
    assert all(a is b for a, b in zip(lora_parameters(model), before, strict=True))
    loss(model, ids).backward()
    assert adapter.grads.abs().sum() > 0


def test_chosen_modules(tiny: Any) -> None:
    def chosen(name: str, **spec: Any) -> list[str]:
        return list(attach(tiny(name), LoraSpec(r=1, **spec)).slots)

    every = [f"model.layers.{i}.{p}" for i in range(3) for p in ("self_attn.q_proj", "mlp.up_proj")]
    assert chosen("llama", target_modules=("q_proj", "up_proj")) == every
    assert chosen("llama", target_modules=("mlp.up_proj",)) == every[1::2]
    assert chosen("llama", target_modules=(every[3],)) == every[3:4]
    assert chosen("llama", target_modules=r".*\.1\..*(q|up)_proj") == every[2:4]
    assert (
        chosen("llama", target_modules=("q_proj", "up_proj"), layers_to_transform=(0, 2))
        == every[:2] + every[4:]
    )
    assert (
        chosen("llama", target_modules=("q_proj", "up_proj"), exclude_modules=("up_proj",))
        == every[::2]
    )
    assert (
        chosen("llama", target_modules=("q_proj", "up_proj"), exclude_modules=r".*\.[12]\..*")
        == every[:2]
    )
    assert chosen("llama", target_modules=("embed", "lm_head")) == ["model.embed_tokens", "lm_head"]
    assert chosen("gpt2", target_modules=("embed", "lm_head")) == ["transformer.wte", "lm_head"]
    assert chosen("gpt_neox", target_modules=("embed", "lm_head")) == [
        "gpt_neox.embed_in",
        "lm_head",
    ]
    for name in ("llama", "gpt2", "gpt_neox"):
        auto, linear = chosen(name), chosen(name, target_modules="all-linear")
        assert auto == linear, "every linear of attention and MLP"
        assert len(auto) == {"llama": 21, "gpt2": 12, "gpt_neox": 12}[name]
        assert not any("lm_head" in p or "embed" in p or "wte" in p for p in auto)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a typing error": (
        {"target_modules": ("q_porj",)},
        r"'q_porj', which matches no layer .did you mean 'q_proj'\?.*o_proj",
    ),
    "a stranger": ({"target_modules": ("query",)}, r"names 'query'.*end in .*q_proj"),
    "a norm is no target": ({"target_modules": ("input_layernorm",)}, "matches no layer"),
    "all-linear in a list": (
        {"target_modules": ("all-linear",)},
        "write target_modules=all-linear without a list",
    ),
    "half a name": ({"target_modules": ("proj",)}, "matches no layer"),
    "an empty list": ({"target_modules": ()}, "leave no layer"),
    "a regex that matches nothing": (
        {"target_modules": "q_proj"},
        "regular expression over whole paths",
    ),
    "a broken regex": (
        {"target_modules": "(q_proj"},
        "target_modules=.*not a valid regular expression",
    ),
    "a broken exclusion": (
        {"exclude_modules": "*"},
        "exclude_modules=.*not a valid regular expression",
    ),
    "an exclusion of nothing": (
        {"exclude_modules": ("c_attn",)},
        "matches none of the chosen layers",
    ),
    "an exclusion of everything": (
        {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)},
        "leave no layer",
    ),
    "a layer too far": (
        {"layers_to_transform": (1, 3)},
        r"layer 3; the chosen layers are numbered \[0\] to \[2\]",
    ),
    "a negative layer": ({"layers_to_transform": -1}, "layer -1"),
    "a rank of nothing": (
        {"rank_pattern": {"q_porj": 4}},
        r"rank_pattern names 'q_porj'.*did you mean 'q_proj'",
    ),
    "an alpha of nothing": (
        {"target_modules": ("q_proj",), "alpha_pattern": {"v_proj": 4}},
        "alpha_pattern names 'v_proj'",
    ),
    "a broken pattern": (
        {"rank_pattern": {"*": 4}},
        "rank_pattern.*not a valid regular expression",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_does_not_exist_is_named(error: str, tiny: Any) -> None:
    spec, message = ERRORS[error]
    model = tiny("llama")
    modules = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(ConfigError, match=message):
        attach(model, LoraSpec(r=2, **spec))
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "spec",
    [
        {"r": 0},
        {"r": -1},
        {"r": 2.5},
        {"r": True},
        {"rank_pattern": {"q": 0}},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"lora_dropout": "0.1"},
        {"lora_alpha": 0},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": {"q": 0}},
        {"use_rslora": "false"},
    ],
)
def test_numbers_out_of_range(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(spec))):
        LoraSpec(**spec)


def test_names_and_modules_given_by_hand(tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"no adapters; call lorry\.attach"):
        lora_parameters(model)
    with pytest.raises(
        ConfigError, match=r"no linear or embedding layer named 'lm_haed'.*'lm_head'"
    ):
        attach(model, modules=["lm_haed"])
    attach(model, LoraSpec(r=2, target_modules=("q_proj",)))
    with pytest.raises(ConfigError, match="'default' is already attached"):
        attach(model, LoraSpec(r=2, target_modules=("v_proj",)))
    for name in ("", "..", "a/b", "ä", "x" * 65):
        with pytest.raises(ConfigError, match="adapter name"):
            attach(model, LoraSpec(r=2, target_modules=("v_proj",)), name)
    assert not isinstance(model.model.layers[0].self_attn.v_proj, BankLinear), "nothing was changed"
    with pytest.raises(ConfigError, match="no adapter named 'x'; this model has default"):
        detach(model, "x")
    with pytest.raises(ConfigError, match="no adapter named 'x'"):
        get_bank(model).activate(Mix.one("x"))


def test_scales(tiny: Any) -> None:
    assert LoraSpec(r=4).scale("m") == 8.0, "alpha is 32 at every rank where nothing is said"
    assert LoraSpec().scale("m") == 2.0
    assert LoraSpec(r=4, lora_alpha=16).scale("m") == 4.0
    assert LoraSpec(r=4, lora_alpha=16, use_rslora=True).scale("m") == 8.0
    spec = LoraSpec(r=4, lora_alpha=16, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 4})
    assert [spec.scale("a.q_proj"), spec.scale("a.k_proj")] == [0.5, 4.0]


def test_any_torch_model() -> None:
    """Not a language model at all: a linear without bias, one with, and a subclass that must stay
    alone.
    """

    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 2

    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3), Odd(3, 3))
    x = torch.randn(5, 4)
    before = model(x)
    adapter = attach(model, LoraSpec(r=2, target_modules="all-linear", init_lora_weights=False))
    assert list(adapter.slots) == ["0", "2"]
    assert not torch.allclose(model(x), before)
    with pytest.raises(ConfigError, match="no linear or embedding layer named '3'"):
        attach(model, LoraSpec(r=2), "b", modules=["3"])
    detach(model)
    assert torch.equal(model(x), before)
