"""Tiny models of every family, made here: transformers' own classes, a few thousand parameters,
trained for a second or two.

Trained weights have structure that random ones lack (large logits, norms away from 1, biases away
from 0), so a wrong epsilon, bias or rotary base shows. `trained(name)` is made once per test
session and must not be changed; `fresh(name)` is random.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar

from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from lorry.models.loading.describe import describe_model
from lorry.models.loading.load import load_model
from lorry.models.loading.weights import load_decoder

disable_progress_bar()

LETTERS = " abcdefghijklmnopqrstuvwxyz.,"
VOCAB = len(LETTERS)
CONTEXT = 64
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 27,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 27,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 27,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}

SMALL = {k: v for k, v in LLAMA.items() if k not in ("model_type", "tie_word_embeddings")}
MOE = {**SMALL, "num_experts_per_tok": 2, "head_dim": 8}
# Architectures Lorry has no family for
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 2,
    "expand": 2,
    "conv_kernel": 4,
    "bos_token_id": 0,
    "eos_token_id": 27,
    "pad_token_id": 0,
}

FOREIGN: dict[str, dict[str, Any]] = {
    "gemma2": {
        **SMALL,
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 8,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**SMALL, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8},
    "granite": {
        **SMALL,
        "model_type": "granite",
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
    },
    "cohere": {**SMALL, "model_type": "cohere", "logit_scale": 0.25},
    "phi": {**SMALL, "model_type": "phi"},
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "pad_token_id": 0,
    },
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16},
    "llama4_text": {
        **MOE,
        "model_type": "llama4_text",
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
    },
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "llama biased": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama rope llama3": {**LLAMA, "rope_parameters": LLAMA3},
    "llama rope linear": {
        **LLAMA,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gpt2": GPT2,
    "gpt_neox parallel": {**NEOX, "use_parallel_residual": True},
    "gpt_neox sequential": {**NEOX, "use_parallel_residual": False},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For test files that import it: on matrices this small a second thread only waits, badly so on
    a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """transformers' model of a variant in fp32, every parameter random, none at its usual starting
    value.
    """
    return random_model({**VARIANTS[name], **overrides}, seed=seed)


def random_model(config: dict[str, Any], *, seed: int = 0) -> Any:
    """Any causal model of transformers with weights wide enough for logits that differ."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            around = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
            p.copy_(
                around + torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 0.3)
            )
    return model.eval()


@cache
def trained(name: str) -> Any:
    """A variant after 100 steps on generated sentences; shared by the whole session."""
    model = fresh(name).train().requires_grad_(True)
    data, pick = torch.tensor(encode(sentences(4000))), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        starts = [pick.randrange(len(data) - 33) for _ in range(8)]
        ids = torch.stack([data[s : s + 33] for s in starts])
        logits = model(input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def sentences(letters: int, *, seed: int = 0) -> str:
    """English-like text of a small grammar."""
    draw = random.Random(seed)
    words = [
        ["the", "a", "one"],
        ["red", "old", "tall", "quiet"],
        ["lorry", "dog", "girl", "river"],
        ["saw", "drove", "loved", "met"],
        ["the", "her", "some"],
        ["house", "friends", "bread", "road"],
    ]
    out = ""
    while len(out) < letters:
        out += " ".join(draw.choice(w) for w in words) + draw.choice([". ", ", "])
    return out[:letters]


def encode(text: str) -> list[int]:
    """One token per letter."""
    return [LETTERS.index(c) for c in text]


def directory(model: Any, path: Path) -> Path:
    """The model as transformers saves it."""
    model.save_pretrained(path)
    return path


def decoder(model: Any, path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Lorry's decoder with the weights of a transformers model, by way of files."""
    directory(model, path)
    described = describe_model(path, add_note=print)
    assert described.family is not None, described.why
    return load_decoder(path, described.family, described.config, dtype, torch.device("cpu"))


# --- checkpoints on disk, opened and tampered with


def text_ids() -> Tensor:
    """[1, 31] tokens to compare logits on."""
    return torch.tensor([encode("the old lorry drove some road. ")])


def opened(path: Path | str, **options: Any) -> Decoder | HfModel:
    """A checkpoint as Lorry opens it, in fp32 unless asked otherwise."""
    return load_model(path, **{"dtype": "float32", "add_note": print, **options}).model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(text_ids()).logits


def close(a: Any, b: Any) -> bool:
    """Equal logits, up to kernels that depend on where in memory a file's bytes lie."""
    return bool((logits(a) - logits(b)).abs().max() <= 1e-5)


def edit_config(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def rewrite(path: Path, change: Any) -> Path:
    """Save the checkpoint's tensors again after ``change(tensors)``."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(
        change({n: t.clone() for n, t in tensors.items()}),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path
