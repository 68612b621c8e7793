"""Whole modules, rows and biases that an adapter has in the base's place: PEFT's files both ways, and the
gradients of one step, against PEFT over transformers; in attached models, behind Lorry's face and in its
own decoder. All in float32 but where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import attach, detach, get_bank
from lorry.adapters.merge import merge, merged_tensors, separates_tied_head, unmerge
from lorry.adapters.mix import Mix
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.peft.tensors import PEFT_PREFIX
from lorry.adapters.spec import LoraSpec
from lorry.errors import ContractError
from lorry.families import find_family
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}
EMBED = {"gpt2": "wte", "gpt_neox": "embed_in"}
NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
KINDS = ("qwen2", "qwen3", "gpt2", "gpt_neox")
# in PEFT's words; {e} and {n} are a family's embedding and last norm
CASES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["{e}"]},
    "both, untied": {"modules_to_save": ["{e}", "lm_head"]},
    "both, tied": {"modules_to_save": ["{e}", "lm_head"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["{n}"]},
    "whole MLPs": {"modules_to_save": ["mlp"]},
    "rows": {"trainable_token_indices": [9, 3, 5]},
    "rows of the embedding": {"trainable_token_indices": {"{e}": [3, 5]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [3, 5]}},
    "other rows of each": {"trainable_token_indices": {"{e}": [5, 9], "lm_head": [7, 3]}},
    "all biases": {"bias": "all"},
    "targets' biases": {"bias": "lora_only"},
}


# a tied Llama has every case, and each of them one more family
GRID = [
    (kind, case)
    for n, case in enumerate(CASES)
    for kind in ("llama-tied", KINDS[(n + n // 4) % len(KINDS)])
]


def settings_of(kind: str, name: str) -> dict[str, Any]:
    """PEFT's settings of a case for one family."""

    def words(value: Any) -> Any:
        if isinstance(value, dict):
            return {words(k): words(v) for k, v in value.items()}
        if isinstance(value, list):
            return [words(v) for v in value]
        if not isinstance(value, str):
            return value
        embed, norm = EMBED.get(kind, "embed_tokens"), NORM.get(kind, "norm")
        return value.replace("{e}", embed).replace("{n}", norm)

    case = words(CASES[name])
    return {"r": 2, "lora_alpha": 4, "target_modules": [LINEAR.get(kind, "q_proj")], **case}


def native(model: Any) -> Decoder:
    """Lorry's decoder with the weights of a transformers model."""
    config = model.config.to_dict()
    family = find_family(config["model_type"])
    assert family is not None
    own = Decoder(family, config)
    state = {name.replace("embed_out", "lm_head"): t for name, t in model.state_dict().items()}
    own.load_state_dict({n: t for n, t in state.items() if n in own.state_dict()})
    if own.geometry.tied:
        own.tie()
    return own.eval()


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "attached": lambda model: model,
    "behind our face": HfModel,
    "our decoder": native,
}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def shaken(model: nn.Module) -> None:
    """Every parameter that trains somewhere near where it is."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=draw) * 0.2)


@torch.no_grad()
def shake_adapter(model: nn.Module, name: str = "default") -> None:
    """The same of all that an adapter of ours has."""
    adapter = get_bank(model)[name]
    draw = torch.Generator().manual_seed(1)
    adapter.values.add_(torch.randn(adapter.values.shape, generator=draw) * 0.2)
    adapter.touch()


def stored(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours by PEFT's names."""
    names = {name: f"{name}.weight" if name[-6:-1] == "lora_" else name for name in gradients}
    return {f"{PEFT_PREFIX}{names[name]}": grad for name, grad in gradients.items()}


@pytest.mark.parametrize(("kind", "name"), GRID)
def test_files_logits_and_gradients_are_pefts(
    kind: str, name: str, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    settings = settings_of(kind, name)
    theirs = peft.get_peft_model(
        tiny(kind), peft.LoraConfig(task_type="CAUSAL_LM", **deepcopy(settings))
    )
    shaken(theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    loss = loss_of(theirs, ids)
    loss.backward()
    wanted = {n: torch.zeros_like(t) for n, t in theirs.state_dict().items()}
    wanted |= {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = peft.get_peft_model_state_dict(theirs, state_dict=wanted)
    for way, wrap in WAYS.items():
        model = wrap(tiny(kind))
        adapter = load_adapter(model, tmp_path / "theirs")
        own = loss_of(model, ids)
        own.backward()
        torch.testing.assert_close(own, loss, rtol=1e-5, atol=1e-6, msg=way)
        ours = stored(adapter.split_like(adapter.grads))
        # of a tied pair PEFT names one side, or both
        assert set(ours) <= set(gradients), way
        assert len(ours) > 2 or "bias" in settings, way
        for tensor, grad in ours.items():
            torch.testing.assert_close(
                grad, gradients[tensor], rtol=1e-4, atol=1e-6, msg=f"{way} {tensor}"
            )
        # the base is as it was, for whoever runs without the adapter
        assert not any(p.requires_grad for p in model.parameters())
        save_adapter(model, tmp_path / "ours", base_name="some/base")
        back = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
        torch.testing.assert_close(loss_of(back, ids), loss, rtol=1e-5, atol=1e-6)
        get_bank(model).activate(Mix.none())
        bare = WAYS[way](tiny(kind))
        assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits), way
        detach(model)
        assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits), way


# Llama has no biases
@pytest.mark.parametrize(("kind", "name"), [*GRID[:20:2], *GRID[21::2]])
def test_merged_it_is_the_same_model(kind: str, name: str, tiny: Any, ids: Tensor) -> None:
    """In place, streamed and loaded as a model; and taken out again, bit for bit."""
    for way in ("attached", "our decoder"):
        model = WAYS[way](tiny(kind))
        attach(model, LoraSpec(**settings_of(kind, name)))
        shake_adapter(model)
        params = dict(model.named_parameters())
        before = model(input_ids=ids).logits
        untied = separates_tied_head(model)
        streamed = dict(merged_tensors(model))
        report = merge(model)
        after = model(input_ids=ids).logits
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5, msg=way)
        assert report.untied == untied
        assert all(row.delta > 0 for row in report.rows)
        twin = tiny(kind, **({"tie_word_embeddings": False} if untied else {}))
        missing, unknown = twin.load_state_dict(streamed, strict=False)
        assert not unknown
        assert set(missing) <= ({"lm_head.weight"} if not untied else set())
        twin.tie_weights()
        torch.testing.assert_close(twin(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
        get_bank(model).activate(Mix.one("default"))
        with pytest.raises(ContractError, match="is merged; call unmerge"):
            model(input_ids=ids)
        get_bank(model).activate(Mix.none())
        unmerge(model)
        assert all(p is params[n] for n, p in model.named_parameters()), way
        assert torch.equal(model(input_ids=ids).logits, before), way
