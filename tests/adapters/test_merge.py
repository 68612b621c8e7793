"""Merging: fp32 sums rounded once, the original Parameters back bit for bit, tied heads, and honest
numbers about rounding.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.merge import (
    MergeReport,
    MergeRow,
    fold_tensor,
    merge,
    merged_tensors,
    separates_tied_head,
    unmerge,
)
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix, MixTerm
from lorry.adapters.spec import LoraSpec
from lorry.adapters.tensor_parallel.slices import LayerSlices
from lorry.errors import ConfigError, ContractError, ModelError

TWO = ("q_proj", "down_proj")
WEIGHTS = ({"a": 1.0}, {"a": 0.5, "b": -1.5}, {"b": -1.0}, {"a": 0.3, "b": 0.7})


def with_adapters(model: nn.Module, shake: Any, targets: tuple[str, ...] = TWO) -> nn.Module:
    """Adapter a on all targets and adapter b, of another rank and scale, on the last one and
    `v_proj`.
    """
    attach(model, LoraSpec(r=4, target_modules=targets), "a")
    attach(
        model,
        LoraSpec(r=3, lora_alpha=5, use_rslora=True, target_modules=(targets[-1], "v_proj")),
        "b",
    )
    shake(lora_parameters(model))
    return model


@pytest.mark.parametrize("weights", WEIGHTS)
def test_merged_outputs_equal_the_mix(
    weights: dict[str, float], tiny: Any, ids: Tensor, logits: Any, shake: Any
) -> None:
    model = with_adapters(tiny("llama"), shake)
    get_bank(model).activate(Mix.constants(weights))
    before = logits(model, ids)
    merge(model)  # the active mix
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=2e-5)
    unmerge(model)
    assert get_bank(model).active == Mix.constants(weights)
    assert torch.equal(logits(model, ids), before)


def test_every_weight_against_float64(family: str, tiny: Any, shake: Any) -> None:
    """Independent arithmetic: W + s B A in float64 from the raw masters, in the layout of each
    layer.
    """
    targets = {
        "gpt2": ("c_attn", "wte", "lm_head"),
        "gpt_neox": ("query_key_value", "embed_in", "lm_head"),
    }
    model = tiny(family)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attach(
        model,
        LoraSpec(
            r=4,
            lora_alpha=6,
            target_modules=targets.get(family, ("q_proj", "embed_tokens", "lm_head")),
        ),
    )
    shake(lora_parameters(model))
    parts = adapter.tensors()
    merge(model)
    assert list(model.state_dict()) == list(untouched), "no new names"
    for name, stored in model.state_dict().items():
        module = name.removesuffix(".weight")
        expected = untouched[name].double()
        if f"{module}.lora_A" in parts:
            delta = parts[f"{module}.lora_B"].double() @ parts[f"{module}.lora_A"].double() * 1.5
            flipped = "embed" in name or "wte" in name or "c_attn" in name
            expected = expected + (delta.T if flipped else delta)
        torch.testing.assert_close(stored.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_is_bitwise_and_by_identity(
    dtype: torch.dtype, family: str, tiny: Any, shake: Any
) -> None:
    model = tiny(family).to(dtype)
    attach(model, LoraSpec(r=4, target_modules="all-linear"))
    shake(lora_parameters(model))
    objects = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    bits = {n: p.detach().clone() for n, p in model.state_dict().items()}
    order = list(model.state_dict())
    merge(model)
    assert list(model.state_dict()) == order
    assert not torch.equal(
        next(iter(get_bank(model).modules.values())).weight,
        bits[f"{next(iter(get_bank(model).modules))}.weight"],
    )
    assert not any(p.requires_grad for p in model.parameters())
    unmerge(model)
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == objects
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), bits[name].view(torch.uint8)), name


def test_rounding_is_measured_and_warned_about(tiny: Any, shake: Any) -> None:
    model = tiny("llama").bfloat16()
    adapter = attach(model, LoraSpec(r=4, target_modules=TWO))
    shake(lora_parameters(model))
    adapter.values.mul_(0.02)  # a small delta, as after a short training
    adapter.touch()
    report = merge(model)
    errors, deltas = [], []
    for path, slot in adapter.slots.items():
        layer = get_bank(model).modules[path]
        delta = slot.scale * (slot.B.detach().double() @ slot.A.detach().double())
        errors.append(layer.weight.double() - (layer.unmerged_weight.double() + delta))
        deltas.append(delta)
    flat = [torch.cat([t.flatten() for t in ts]) for ts in (errors, deltas)]
    assert report.ratio == pytest.approx(float(flat[0].norm() / flat[1].norm()), rel=1e-3)
    assert [r.ratio for r in report.rows] == pytest.approx(
        [float(e.norm() / d.norm()) for e, d in zip(errors, deltas, strict=True)], rel=1e-3
    )
    assert report.ratio > 0.1
    assert report.warning is not None
    assert "bfloat16" in report.warning
    assert "float32" in report.warning
    assert max(report.rows, key=lambda r: r.ratio).module in report.warning

    exact = with_adapters(tiny("llama"), shake)
    quiet = merge(exact)
    assert quiet.ratio < 1e-5
    assert quiet.warning is None
    assert MergeReport((MergeRow("m", 0.0, 0.0),), torch.float32, False).ratio == 0, (
        "an untrained adapter loses nothing"
    )


def test_rounded_once(tiny: Any, shake: Any) -> None:
    """Two adapters whose sum matters in bf16 although each alone is lost: adding one by one would
    lose both.
    """
    model = tiny("llama").bfloat16()
    for name in ("a", "b"):
        adapter = attach(model, LoraSpec(r=1, lora_alpha=1, target_modules=("q_proj",)), name)
        with torch.no_grad():
            for slot in adapter.slots.values():
                weight = get_bank(model).modules[slot.module].weight
                weight.fill_(1.0)
                slot.A.fill_(1.0)
                slot.B.fill_(0.003)  # half a step of bf16 above 1 is 0.0039
    merge(model)
    assert (model.model.layers[0].self_attn.q_proj.weight > 1).all()


@pytest.mark.parametrize("cut", ["by FSDP2", "by tensor parallel"])
def test_nothing_is_streamed_of_shares(cut: str, tiny: Any) -> None:
    """A rank that streamed its own shares wrote half a model under the names of a whole one."""
    model = tiny("llama")
    attach(model, LoraSpec(r=4, target_modules=("v_proj",)))
    assert fold_tensor(model, "model.norm.weight", {}).shape == model.model.norm.weight.shape
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        if cut == "by FSDP2":
            fully_shard(model)
        else:
            # what the decoder of such a rank has at its layers
            model.model.layers[0].self_attn.v_proj.slices = LayerSlices(Mock(size=2))
        for ask in (
            lambda: next(merged_tensors(model, {"default": 1.0})),
            lambda: fold_tensor(model, "model.norm.weight", {}),
        ):
            with pytest.raises(ConfigError, match="shares of this model's weights"):
                ask()
    finally:
        dist.destroy_process_group()


def test_streaming_gives_what_merging_gives(family: str, tiny: Any, shake: Any) -> None:
    model = tiny(family)
    targets = {"gpt2": ("c_attn", "wte"), "gpt_neox": ("dense", "embed_in")}.get(
        family, ("v_proj", "embed_tokens")
    )
    attach(model, LoraSpec(r=4, target_modules=targets))
    shake(lora_parameters(model))
    untouched = {
        n: (id(p), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)
    }
    rows: list[MergeRow] = []
    stream = merged_tensors(model, rows=rows)
    first, _ = next(stream)
    assert first == next(iter(model.state_dict()))
    assert len(rows) == 1, "one tensor at a time"
    streamed = dict(merged_tensors(model, {"default": 1.0}))
    for name, p in model.named_parameters(remove_duplicate=False):
        assert untouched[name][0] == id(p)
        assert torch.equal(untouched[name][1], p)
    tied = family in ("llama-tied", "gpt2")
    assert separates_tied_head(model) is tied
    report = merge(model)
    assert report.untied is tied
    assert set(streamed) == set(model.state_dict()), (
        "a separate lm_head.weight where the embedding changed"
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, streamed[name]), name


def test_a_head_that_stays_tied_is_not_streamed_twice(tiny: Any, shake: Any) -> None:
    model = with_adapters(tiny("llama-tied"), shake)
    assert "lm_head.weight" not in dict(merged_tensors(model))
    assert not separates_tied_head(model)
    assert not merge(model).untied
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_a_tied_side_gets_a_weight_of_its_own(side: str, tiny: Any, shake: Any) -> None:
    model = tiny("llama-tied")
    attach(model, LoraSpec(r=4, target_modules=(side,)))
    shake(lora_parameters(model))
    shared = model.model.embed_tokens.weight
    assert model.lm_head.weight is shared
    bits = shared.detach().clone()
    assert merge(model).untied
    other = model.model.embed_tokens if side == "lm_head" else model.lm_head
    assert other.weight is shared
    assert torch.equal(shared, bits)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared


def test_streaming_into_another_dtype(tiny: Any, shake: Any) -> None:
    model = with_adapters(tiny("llama").bfloat16(), shake)
    rows: list[MergeRow] = []
    assert {
        t.dtype for _, t in merged_tensors(model, {"a": 1.0}, dtype=torch.float32, rows=rows)
    } == {torch.float32}
    assert max(r.ratio for r in rows) < 1e-5, "fp32 is what the warning offers"


def test_what_cannot_be_merged(tiny: Any, shake: Any, ids: Tensor, logits: Any) -> None:
    model = with_adapters(tiny("llama"), shake)
    bank = get_bank(model)
    for mix in (Mix((MixTerm("a", slice(0, 3)),)), Mix((MixTerm("a", None, torch.ones(18)),))):
        bank.activate(mix)
        with pytest.raises(ConfigError, match="varies over tokens"):
            merge(model)
    bank.activate(Mix.none())
    with pytest.raises(ConfigError, match=r"no adapter to merge.*a, b"):
        merge(model)
    with pytest.raises(ConfigError, match="no adapter named 'zz'"):
        merge(model, {"zz": 1.0})
    with pytest.raises(ConfigError, match="finite"):
        merge(model, {"a": float("nan")})
    with pytest.raises(ConfigError, match="not merged"):
        unmerge(model)
    with pytest.raises(ConfigError, match="no adapters"):
        merge(tiny("llama"))
    bank["b"].values.fill_(1e30)
    bank["b"].touch()
    with pytest.raises(ModelError, match="infinite or NaN"):
        merge(model, {"a": 1.0, "b": 1.0})
    assert all(layer.unmerged_weight is None for layer in bank.modules.values()), "all or nothing"


def test_a_merged_model_refuses_its_adapters(
    tiny: Any, shake: Any, ids: Tensor, logits: Any
) -> None:
    model = with_adapters(tiny("llama"), shake)
    merge(model, {"a": 1.0})
    get_bank(model).activate(Mix.one("a"))
    with pytest.raises(ContractError, match="merged; call unmerge"):
        logits(model, ids)
    get_bank(model).activate(Mix.none())
    token = AMBIENT_CONTEXT.set(AdapterContext(Mix.one("a")))
    try:
        with pytest.raises(ContractError, match="merged; call unmerge"):
            logits(model, ids)
    finally:
        AMBIENT_CONTEXT.reset(token)
    for action in (
        lambda: attach(model, LoraSpec(r=2), "c"),
        lambda: detach(model, "a"),
        lambda: merge(model),
        lambda: list(merged_tensors(model)),
    ):
        with pytest.raises(ConfigError, match="merged"):
            action()
    unmerge(model)
    detach(model, "a")
