"""Mixtures in stock classes: transformers loads every tensor and computes the mixture said plainly
by other code, for each family; what a class cannot hold is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import lorry as library
from lorry.adapters.merge import fold_tensor
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.models.decoder.model import Decoder
from lorry.models.loading.open import OpenedModel
from lorry.models.moe.checkpoint import describe_moe, moe_tensors
from lorry.verbs.exports.moe import export_moe
from tests.support.tiny import LLAMA3, one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import model_directory

EXPERTS = 3
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("mixtral", {"tie_word_embeddings": True}),
    "llama 3": ("mixtral", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral": ("mixtral", {"model_type": "mistral", "sliding_window": None}),
    "qwen2": ("qwen2_moe", {"model_type": "qwen2"}),
    "qwen2, tied": ("qwen2_moe", {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen3": ("qwen3_moe", {"model_type": "qwen3", "head_dim": 16}),
}


def bank_of_experts(base: Path, targets: list[str] | None = None) -> OpenedModel:
    """The base with three adapters of random values; the third on one layer's MLP alone."""
    model, words = library.load(base, dtype="float32")
    generator = torch.Generator().manual_seed(3)
    for number in range(EXPERTS):
        spec = library.LoraSpec(
            r=2 + 2 * number,
            target_modules=targets or ["gate_proj", "up_proj", "down_proj"],
            layers_to_transform=(1,) if number == 2 else None,
        )
        adapter = library.attach(model, spec, name=f"e{number}")
        adapter.values.copy_(0.2 * torch.randn(adapter.values.shape, generator=generator))
    source = {"path": str(base), "name": str(base), "generation_config": {}}
    return OpenedModel(model, words, source, [f"e{n}" for n in range(EXPERTS)])


def routers(model: Decoder) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (EXPERTS, model.geometry.width)
    return [torch.randn(shape, generator=generator) for _ in range(model.geometry.layers)]


def experts(opened: OpenedModel) -> dict[str, dict[str, float]]:
    return {name: {name: 1.0} for name in opened.adapters}


def mixture_logits(
    base: Path, ids: Tensor, deltas: list[dict[str, Tensor]], gates: list[Tensor], top_k: int
) -> Tensor:
    """The dense model of transformers whose MLPs are replaced here, in a few lines."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def mixed(mlp: Any, layer: int) -> Any:
        def forward(n: Tensor) -> Tensor:
            p = (n @ gates[layer].T).softmax(-1)
            kept, chosen = p.topk(top_k)
            kept = kept / kept.sum(-1, keepdim=True)
            out = torch.zeros_like(n)
            for e, delta in enumerate(deltas):
                w = {
                    name: getattr(mlp, name).weight
                    + delta.get(f"model.layers.{layer}.mlp.{name}", torch.zeros(()))
                    for name in ("gate_proj", "up_proj", "down_proj")
                }
                inner = F.silu(n @ w["gate_proj"].T) * (n @ w["up_proj"].T)
                g = (kept * (chosen == e)).sum(-1, keepdim=True)
                out = out + g * (inner @ w["down_proj"].T)
            return out

        return forward

    for number, layer in enumerate(model.model.layers):
        layer.mlp.forward = mixed(layer.mlp, number)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def list_deltas(model: Any, names: list[str]) -> list[dict[str, Tensor]]:
    from lorry.adapters.attach import get_bank

    bank = get_bank(model)
    return [
        {path: slot.scale * slot.B @ slot.A for path, slot in bank[name].slots.items()}
        for name in names
    ]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_mixture(family: str, top_k: int, tmp_path: Path) -> None:
    kind, overrides = FAMILIES[family]
    base = model_directory(tmp_path / "base", seed=6, **overrides)
    opened = bank_of_experts(base)
    gates = routers(opened.model)
    deltas = list_deltas(opened.model, opened.adapters)
    export_moe(opened, tmp_path / "moe", experts(opened), gates, top_k=top_k)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.model_type == kind
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = mixture_logits(base, ids, deltas, gates, top_k)
    with torch.no_grad():
        found = again(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    names = load_file(tmp_path / "moe" / "model.safetensors").keys()
    assert any(".experts.2." in name for name in names)
    assert ("lm_head.weight" in names) != bool(overrides.get("tie_word_embeddings"))


def test_the_dense_model_is_the_mixture_of_equal_experts(tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base", model_type="qwen2")
    opened = bank_of_experts(base)
    gates = routers(opened.model)
    export_moe(opened, tmp_path / "moe", {"a": {}, "b": {}, "c": {}}, gates, top_k=2)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (base, tmp_path / "moe")
        )
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_several_adapters_are_one_expert(tmp_path: Path) -> None:
    opened = bank_of_experts(model_directory(tmp_path / "base"))
    path = "model.layers.1.mlp.up_proj"
    weight = opened.model.get_submodule(path).weight.detach().clone()
    one, other = (delta[path] for delta in list_deltas(opened.model, ["e0", "e1"]))
    mixes = {"a": {"e0": 0.5, "e1": -2.0}, "b": {"e2": 1.0}, "c": {}}
    export_moe(opened, tmp_path / "moe", mixes, routers(opened.model), top_k=2)
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    torch.testing.assert_close(stored[name], weight + 0.5 * one - 2.0 * other)
    assert torch.equal(stored["model.layers.1.block_sparse_moe.experts.2.w3.weight"], weight)


@pytest.mark.parametrize("attention", ["refuse", "average", "drop"])
def test_deltas_of_attention(attention: str, tmp_path: Path) -> None:
    opened = bank_of_experts(model_directory(tmp_path / "base"), ["q_proj", "up_proj"])
    path = "model.layers.1.self_attn.q_proj"
    weight = opened.model.get_submodule(path).weight.detach().clone()
    deltas = [delta[path] for delta in list_deltas(opened.model, opened.adapters)]
    made = experts(opened)
    if attention == "refuse":
        with pytest.raises(ConfigError, match=r"adapter 'e0' changes .*attention=average"):
            export_moe(opened, tmp_path / "moe", made, routers(opened.model), top_k=2)
        assert not (tmp_path / "moe").exists()
        return
    gates = routers(opened.model)
    export_moe(opened, tmp_path / "moe", made, gates, top_k=2, attention=attention)
    stored = load_file(tmp_path / "moe" / "model.safetensors")[f"{path}.weight"]
    expected = weight + sum(deltas) / EXPERTS if attention == "average" else weight
    torch.testing.assert_close(stored, expected)


def test_bf16_is_the_rounded_mixture(tmp_path: Path) -> None:
    opened = bank_of_experts(model_directory(tmp_path / "base", model_type="qwen3"))
    exact = fold_tensor(opened.model, "model.layers.1.mlp.up_proj.weight", {"e1": 1.0})
    gates = routers(opened.model)
    export_moe(opened, tmp_path / "moe", experts(opened), gates, top_k=2, dtype="bfloat16")
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["model.layers.1.mlp.experts.1.up_proj.weight"], exact.bfloat16())


@pytest.mark.parametrize("wrong", ["experts exchanged", "a name"])
def test_another_mixture_is_not_kept(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong name is only a warning to transformers, and the expert random."""
    import lorry.models.moe.checkpoint as module

    opened = bank_of_experts(model_directory(tmp_path / "base", model_type="qwen3"))

    def spoil(*arguments: Any) -> Any:
        for name, tensor in moe_tensors(*arguments):
            if wrong == "a name":
                yield name.replace("experts.1.up_proj", "experts.1.up"), tensor
            else:
                swap = {"experts.0.": "experts.1.", "experts.1.": "experts.0."}
                found = next((key for key in swap if key in name), None)
                yield (name if found is None else name.replace(found, swap[found])), tensor

    monkeypatch.setattr(module, "moe_tensors", spoil)
    with pytest.raises(ContractError, match="was removed"):
        export_moe(opened, tmp_path / "moe", experts(opened), routers(opened.model), top_k=2)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        ({"model_type": "gpt2"}, {}, ModelError, "has no mixture-of-experts class"),
        ({"attention_bias": True}, {}, ModelError, "has no biases for k_proj"),
        ({"mlp_bias": True}, {}, ModelError, "has no biases for down_proj"),
        ({"hidden_act": "gelu"}, {}, ModelError, "hidden_act='gelu'"),
        ({}, {"top_k": 4}, ConfigError, "top_k is 4"),
        ({}, {"top_k": 0}, ConfigError, "top_k is 0"),
        ({}, {"normalize": False}, ConfigError, "normalize must be true"),
        ({"model_type": "qwen3"}, {"normalize": False}, ConfigError, "would shrink the MLP"),
    ],
)
def test_what_no_class_holds(
    config: dict[str, Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    from tests.support.tiny import LLAMA

    given: dict[str, Any] = {"experts": 3, "top_k": 2, "normalize": True, **settings}
    with pytest.raises(error, match=message):
        describe_moe({**LLAMA, "hidden_act": "silu", **config}, **given)


def test_routers_and_adapters_that_do_not_fit(tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base")
    opened = bank_of_experts(base)
    good = routers(opened.model)
    for gates, message in (
        (good[:1], "in 1"),
        ([gate[:2] for gate in good], r"\[3, 32\]"),
        ([gate / 0 for gate in good], "NaN or infinity"),
    ):
        with pytest.raises(ModelError, match=message):
            list(
                moe_tensors(
                    opened.model,
                    describe_moe(opened.model.config, experts=3, top_k=2, normalize=True),
                    lambda name: torch.zeros(1),
                    lambda expert, path: torch.zeros(1),
                    gates,
                )
            )
    headed = bank_of_experts(base, ["lm_head", "up_proj"])
    with pytest.raises(ConfigError, match="all experts of a mixture share"):
        export_moe(headed, tmp_path / "moe", experts(headed), good, top_k=2)
