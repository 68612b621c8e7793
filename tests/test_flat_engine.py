"""examples/flat.py, which knows nothing of Lorry, and the engine: the same rows and the same start
give the same losses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lorry.adapters.attach import get_bank
from lorry.models.loading.open import open_model
from lorry.train.session import train_run
from lorry.train.setup.adapters import attach_adapter
from tests.support import tinyrun
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

STEPS = 10


@pytest.mark.parametrize(
    ("family", "template", "clip"),
    [
        ("llama", True, 1.0),
        ("llama", False, 0.05),
        ("gpt2", True, 0.0),
        ("gpt_neox", True, 1.0),
        ("qwen3", False, 1.0),
    ],
)
def test_losses_agree(flat: Any, family: str, template: bool, clip: float, tmp_path: Path) -> None:
    """Ten steps of three micro-batches of two rows, two epochs and more, a warmup; losses to 1e-6,
    weights to 1e-5.
    """
    model = tinyrun.model_directory(tmp_path / "model", family)
    if not template:
        plain = AutoTokenizer.from_pretrained(model)
        plain.chat_template = None
        (model / "chat_template.jinja").unlink()
        plain.save_pretrained(model)
    rows = tinyrun.rows(24)
    run = tinyrun.described(
        model,
        tinyrun.write_rows(tmp_path / "data.jsonl", rows),
        tmp_path / "run",
        r=4,
        lora_alpha=6,
        shuffle=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=STEPS,
        warmup_steps=3,
        max_grad_norm=clip,
        max_length=128,
    )
    opened = open_model(run.model, print)
    name = attach_adapter(run, opened, print)
    adapter = get_bank(opened.model)[name]
    init = {name: a.clone() for name, a in adapter.tensors().items() if name.endswith("lora_A")}

    theirs = flat.train(
        model,
        rows,
        r=4,
        alpha=6.0,
        lr=1e-2,
        steps=STEPS,
        batch=2,
        accumulation=3,
        warmup=3,
        max_grad_norm=clip,
        init=init,
        out=tmp_path / "flat",
    )
    train_run(run, [])
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    ours = [line["loss"] for line in logged]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert theirs[-1] < theirs[0] - 0.05
    if clip == 0.05:
        assert min(line["grad_norm"] for line in logged) > clip  # every step was clipped
    saved, twin = (
        load_file(tmp_path / where / "adapter_model.safetensors") for where in ("run", "flat")
    )
    assert saved.keys() == twin.keys()
    for name in saved:
        torch.testing.assert_close(saved[name], twin[name], atol=1e-5, rtol=0)
