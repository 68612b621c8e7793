"""Weights of an adapter's own over a base in few bits: loss and gradients against PEFT over transformers with
the opened matrices. Float32."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.attach import attach
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.quantization.linear import QuantizedLinear, quantize_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS
from lorry.adapters.spec import LoraSpec
from tests.support.twins import native

pytestmark = pytest.mark.filterwarnings("ignore")
CASES: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "targets' biases": {"bias": "lora_only"},
    "whole linears": {"modules_to_save": ["c_proj", "dense_4h_to_h"]},
    "bias beside B": {"lora_bias": True},
}


def opened_copy(model: nn.Module, packed: nn.Module) -> nn.Module:
    """transformers' model with the matrices that the packed one computes with."""
    twin = deepcopy(model)
    with torch.no_grad():
        for path, layer in packed.named_modules():
            if isinstance(layer, BankLinear) and isinstance(layer.product, QuantizedLinear):
                matrix = layer.product.open(torch.float32)
                twin.get_submodule(path).weight.copy_(matrix.t() if layer.transposed else matrix)
    return twin


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("own", [False, True], ids=["transformers", "our decoder"])
def test_loss_and_gradients_are_pefts(
    case: str, family: str, own: bool, tiny: Any, ids: Tensor
) -> None:
    model = tiny(family)
    packed = native(deepcopy(model)) if own else deepcopy(model)
    quantize_linears(packed, QUANTIZATIONS["nf4"], torch.float32)
    target = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}[family]
    names = {
        k: [n for n in v if n in str(model)] if isinstance(v, list) else v
        for k, v in CASES[case].items()
    }
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target], **names)
    theirs = peft.get_peft_model(opened_copy(model, packed), config).eval()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in names.items()}
    adapter = attach(packed, LoraSpec(r=2, lora_alpha=8, target_modules=(target,), **settings))
    draw = torch.Generator().manual_seed(3)
    found = {
        name.replace(".default", "").replace(".weight", "").replace(".modules_to_save", ""): param
        for name, param in theirs.named_parameters()
        if param.requires_grad
    }
    assert len(found) == len(adapter.masters())
    ends = {name: f"base_model.model.{name}".replace(".weight", "") for name in adapter.masters()}
    with torch.no_grad():
        for name, master in adapter.masters().items():
            master.add_(0.1 * torch.randn(master.shape, generator=draw))
            found[ends[name]].copy_(master)
    adapter.touch()

    def loss(side: nn.Module) -> Tensor:
        scores = side(input_ids=ids).logits
        return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    expected, got = loss(theirs), loss(packed)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    expected.backward()
    got.backward()
    for name, gradient in adapter.split_like(adapter.grads).items():
        wanted = found[ends[name]].grad
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
