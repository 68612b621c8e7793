"""Linears and embeddings of transformers that are classes of their own: Falcon's linear, Gemma's and BART's
embeddings times a constant. PEFT's own model is the judge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_peft_configurations import compare_gradients, loss_of, trained
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

from lorry.adapters.attach import attach, detach, lora_parameters
from lorry.adapters.merge import merge, unmerge
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError
from tests.support import tiny as tiny_models

MODELS: dict[str, dict[str, Any]] = {
    "falcon": {
        "model_type": "falcon",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bias": True,
        "tie_word_embeddings": False,
    },
    "gemma2": {**tiny_models.FOREIGN["gemma2"], "vocab_size": 64, "tie_word_embeddings": False},
    "bart": {
        "model_type": "bart",
        "vocab_size": 64,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "scale_embedding": True,
        "is_decoder": True,
        "tie_word_embeddings": False,
    },
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    ("falcon", {"target_modules": "all-linear", "use_dora": True}),
    ("falcon", {"target_modules": ["query_key_value"], "lora_bias": True, "bias": "lora_only"}),
    ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("gemma2", {"target_modules": ["embed_tokens"], "use_dora": True}),
    ("bart", {"target_modules": ["embed_tokens", "fc1"]}),
]
BY_CASE = pytest.mark.parametrize(
    ("kind", "case"), CASES, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(CASES)]
)


def base(kind: str) -> nn.Module:
    model: nn.Module = tiny_models.random_model(MODELS[kind])
    return model


@BY_CASE
@pytest.mark.filterwarnings("ignore")
def test_what_peft_trains_is_read(
    kind: str, case: dict[str, Any], ids: Tensor, logits: Any, tmp_path: Path
) -> None:
    theirs = trained(base(kind), case)
    theirs.save_pretrained(tmp_path)
    model = base(kind)
    plain = logits(model, ids)
    adapter = load_adapter(model, tmp_path)
    expected, got = logits(theirs, ids), logits(model, ids)
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * scale, "the adapter must matter"
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)
    for each in (theirs, model):
        loss_of(each(input_ids=ids).logits, ids).backward()
    compare_gradients(theirs, adapter)
    whole = logits(copy.deepcopy(theirs).merge_and_unload(), ids)
    merge(model)
    torch.testing.assert_close(logits(model, ids) / scale, whole / scale, rtol=0, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model, ids), got)
    detach(model)
    assert torch.equal(logits(model, ids), plain), "its own layers again"


@BY_CASE
@pytest.mark.filterwarnings("ignore")
def test_ours_in_peft(
    kind: str, case: dict[str, Any], ids: Tensor, logits: Any, shake: Any, tmp_path: Path
) -> None:
    model = base(kind)
    attach(model, LoraSpec(r=4, **case))
    shake(p for p in lora_parameters(model) if p.dim() > 1)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path)
    expected = logits(model, ids)
    scale = expected.abs().max()
    torch.testing.assert_close(logits(theirs, ids) / scale, expected / scale, rtol=0, atol=1e-5)
    assert (expected - logits(base(kind), ids)).abs().max() > 1e-2 * scale


def test_without_a_term_they_round_as_the_classes_they_replace(ids: Tensor, logits: Any) -> None:
    """In bf16, where an order of two products shows."""
    for kind, target in (("gemma2", "embed_tokens"), ("bart", "embed_tokens")):
        model = base(kind).to(torch.bfloat16)
        plain = logits(model, ids)
        attach(model, LoraSpec(r=2, target_modules=(target,)))  # B A = 0
        assert torch.equal(logits(model, ids), plain)


def test_other_subclasses_are_no_targets() -> None:
    """Nor an embedding whose weight changes as it runs, or that puts a parameter of its own in a row's place: what
    they compute is not known."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.linear(x, self.weight, self.bias)

    replacing = T5Gemma2TextScaledWordEmbedding(8, 4, 0, eoi_token_index=5)
    for module in (Doubled(4, 4), nn.Embedding(8, 4, max_norm=1.0), replacing):
        with pytest.raises(ConfigError, match="'0', which matches no"):
            attach(nn.Sequential(module), LoraSpec(r=2, target_modules=("0",)))
