"""Adapters under DeepSpeed's ZeRO-1 and -2, which train them as parameters of the model: two processes
on the CPU give what one gives without it. Float32.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lorry.integrations import trainers
from tests.support.ranks import run_ranks
from tests.support.torch_loops import base, rows, spec, trained

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deepspeed")
    run_ranks(
        "tests.support.deepspeed_loops",
        made,
        DS_ACCELERATOR="cpu",
        LOCAL_SIZE="2",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    return made


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    model = trainers.apply_lora_to_model(base(), spec())
    return trained(model, model, 0, 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_gives_the_adapter_of_one_process(
    folder: Path, alone: dict[str, Tensor], stage: int
) -> None:
    got = load_file(folder / f"zero-{stage}.safetensors")
    values = [name for name in alone if name.startswith("value/")]
    assert values
    for name in values:
        assert float((got[name] - alone[name]).norm() / alone[name].norm()) < 1e-5, name
    theirs = PeftModel.from_pretrained(base(), str(folder / f"zero-{stage}"))
    with torch.no_grad():
        assert torch.allclose(theirs(rows(99)).logits, got["logits"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(got["merged"], got["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(got["unmerged"], got["logits"])
