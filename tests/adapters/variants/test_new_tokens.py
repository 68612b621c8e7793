"""A file whose reading fails leaves a model as it was, though its tokens had to be there to read it. All in
float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import attach
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import grow_base, load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants.new_tokens import NewTokens, grown_with
from lorry.errors import ModelError
from lorry.models.hf.model import HfModel
from tests.adapters.variants.test_own_weights import native, shake_adapter

# of a model with 64 tokens
NEW = NewTokens({64: (3, 5), 65: (7,)}, "subtokens")
WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "attached": lambda model: model,
    "behind our face": HfModel,
    "our decoder": native,
}


def without_a_row(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("trainable_tokens_delta"))
    tensors[name] = tensors[name][:1].clone()


def without_a_matrix(tensors: dict[str, Tensor]) -> None:
    del tensors[next(n for n in tensors if n.endswith("lora_B.weight"))]


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("damage", [without_a_row, without_a_matrix])
def test_a_file_that_fails_leaves_the_model_as_it_was(
    way: str, kind: str, damage: Callable[[dict[str, Tensor]], None], tiny: Any, tmp_path: Path
) -> None:
    first = WAYS[way](tiny(kind))
    grow_base(first, NEW)
    ends = {"embed_tokens": (64, 65)} if kind == "llama-tied" else None
    rows: Any = ends or {"embed_tokens": (64, 65), "lm_head": (64, 65)}
    attach(first, LoraSpec(r=2, target_modules=("q_proj",), trainable_token_indices=rows))
    shake_adapter(first)
    save_adapter(first, tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    damaged = dict(whole)
    damage(damaged)
    model = WAYS[way](tiny(kind))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    vocabulary, known = vocab_size(model), set(model.__dict__)
    save_file(damaged, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert (vocab_size(model), grown_with(model)) == (vocabulary, None)
    assert set(model.__dict__) - {"lorry_bank"} == known
    assert base_digest(model) == base_digest(WAYS[way](tiny(kind)))
    # nothing is in the way of the whole file, nor of other tokens
    save_file(whole, tmp_path / "adapter_model.safetensors")
    adapter: Adapter = load_adapter(model, tmp_path)
    assert grown_with(model) == NEW
    assert vocab_size(model) == vocabulary + 2
    tokens = torch.tensor([[64, 3, 65, 9]])
    with torch.no_grad():
        wanted, got = (m(input_ids=tokens).logits for m in (first, model))
    assert torch.equal(wanted, got)
    assert adapter.further


def vocab_size(model: Any) -> int:
    config = model.config
    return int(config["vocab_size"] if isinstance(config, dict) else config.vocab_size)
