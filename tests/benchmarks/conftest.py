"""The benchmarks are scripts and no package; their folder is put on the path. `tiny`: a case small
enough to run in a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from case import IGNORED, Case, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.adapters.attach import attach
from lorry.adapters.peft.files import save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.models.loading.load import load_model

LENGTH = 48


WriteCase = Callable[[Path, LlamaConfig, Case], None]


@pytest.fixture(scope="session")
def write_case() -> WriteCase:
    """Writes a case: a random Llama of this shape in bfloat16, an adapter whose B is not zero, and
    rows of noise for its steps.
    """

    def write(folder: Path, config: LlamaConfig, case: Case) -> None:
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
        model = load_model(str(folder / "base"), dtype="bfloat16", add_note=print).model
        attach(model, LoraSpec(r=case.rank, lora_alpha=case.alpha, init_lora_weights=False))
        save_adapter(model, folder / "init")
        ids = torch.randint(
            config.vocab_size, (case.rows_per_step * case.all_steps, case.length)
        ).tolist()
        write_rows(folder, [(row, [IGNORED, *row[1:]]) for row in ids])
        case.save(folder)

    return write


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory, write_case: WriteCase) -> Path:
    """A random Llama of two layers that is sure of itself (large weights), its adapter, and two
    rows of noise.
    """
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    case = Case(length=LENGTH, rank=4, alpha=8, warmup=1, steps=1)
    write_case(folder, config, case)
    return folder
