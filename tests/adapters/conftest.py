"""Tiny random models of every family, as transformers builds them, and a few helpers all bank tests
share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.adapters.attach import attach, lora_parameters
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.spec import LoraSpec

VOCAB = 64
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": ("qwen3", LLAMA),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB},
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn, Llama with and without a tied head."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """``tiny(name, seed=0)``: a fresh fp32 transformers model, in eval mode; the same name and seed
    give the same weights.
    """

    def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
        kind, settings = FAMILIES[name]
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[kind](
            **{**settings, "bos_token_id": 1, "eos_token_id": 2, **changes}
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        # transformers starts at std 0.02, where every logit is near 0 and comparisons prove little
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        return model

    return build


@pytest.fixture
def ids() -> Tensor:
    """[2, 9] token ids."""
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def logits() -> Callable[[nn.Module, Tensor], Tensor]:
    """``logits(model, ids)`` without gradients."""

    def compute(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    return compute


@pytest.fixture(scope="session")
def shake() -> Callable[..., None]:
    """``shake(parameters, seed)``: random values in place of the zeros that make a new adapter do
    nothing.
    """

    def fill(parameters: Any, seed: int = 3) -> None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.2)

    return fill


@pytest.fixture
def saved(tiny: Any, shake: Any, tmp_path: Path) -> Path:
    """An adapter of ours on q_proj [32,32] and down_proj [32,48] of the tiny Llama."""
    model = tiny("llama")
    attach(model, LoraSpec(r=4, target_modules=("q_proj", "down_proj")))
    shake(lora_parameters(model))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"
