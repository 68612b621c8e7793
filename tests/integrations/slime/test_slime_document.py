"""What docs/slime.md and its example say is so: numbers are counted by PEFT, flags are those there are,
functions that are named are there.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from lorry.integrations.slime.arguments import DEFAULTS, HOOKS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "slime.md").read_text()
SCRIPT = ROOT / "examples" / "slime" / "run-qwen3-4B-lora.sh"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
LLAMA_7B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    intermediate_size=11008,
    vocab_size=32000,
)
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=9728,
    vocab_size=151936,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("config", [LLAMA_7B, QWEN3_4B], ids=["7B", "4B"])
@pytest.mark.parametrize("targets", [EVERY, ATTENTION], ids=["all", "attention"])
def test_parameters_of_an_adapter_are_as_many(config: Any, targets: list[str]) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        whole = sum(p.numel() for p in base.parameters())
        model = get_peft_model(base, LoraConfig(r=8, target_modules=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,} ({trained / whole:.2%})" in PAGE


def test_the_memory_that_is_saved_is_as_much() -> None:
    trained, whole = 16_515_072, 4_022_468_096
    # fp32 gradient, master copy and two moments; bf16 weights
    assert f"{1 - trained / whole:.1%}" == "99.6%"
    assert f"{1 - (2 * whole + 16 * trained) / (18 * whole):.0%}" == "89%"
    assert "99.6% for Qwen3-4B" in PAGE
    assert "optimizer together 89%" in PAGE


def test_flags_of_the_page_and_of_the_script_are_those_there_are() -> None:
    told = {f"--{name.replace('_', '-')}" for name in DEFAULTS}
    shown = set(re.findall(r"--(?:use-lora\b|lora-[\w-]+)", PAGE)) - {"--lora-"}
    assert shown == told
    assert set(re.findall(r"--(?:use-lora\b|lora-[\w-]+)", SCRIPT.read_text())) <= told


@pytest.mark.parametrize("text", [PAGE, SCRIPT.read_text()], ids=["page", "script"])
def test_functions_are_where_they_are_said_to_be(text: str) -> None:
    for name, path in HOOKS.items():
        assert f"--{name.replace('_', '-')} {path}" in text
        module, _, function = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_script_is_a_script() -> None:
    bash = shutil.which("bash")
    assert bash
    subprocess.run([bash, "-n", SCRIPT], check=True)
