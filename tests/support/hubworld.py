"""A finished run by hand, and a stand-in of the hub that this process is logged in to: fixtures for
tests of `lorry.hub`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from lorry.hub import files
from tests.support.hub_standin import Hub

ROW = "the secret row that nobody may read"
ADAPTER = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/base"}
CONFIG = {
    "task": "sft",
    "model": {"name": "org/base"},
    "lora": {"r": 2, "lora_alpha": 4, "adapter_name": "default"},
    "data": {"path": "org/rows", "max_length": 64},
    "train": {"learning_rate": 1e-3, "seed": 3},
    "output_dir": "runs/people",
}
RECEIPT = {
    "data": {
        "source": "org/rows",
        "rows": 10,
        "sequences": 10,
        "tokens": 200,
        "supervised": 90,
        "sha256": "d" * 64,
    },
    "base": {"name": "org/base", "kind": "hub", "sha256": "b" * 64},
    "seed": 3,
    "adapters": {"default": "a" * 64},
}
STEPS = [
    {"step": n, "loss": 3.0 - n, "tokens": 50, "supervised_tokens": 20, "seconds": 0.5}
    for n in (1, 2)
]


def put(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(name="run")
def finished_run(tmp_path: Path) -> Path:
    """A finished run, by hand, with everything beside it that must stay here."""
    folder = tmp_path / "people run"
    evaluation = [
        {"name": "held.jsonl", "metrics": {"exact_match": {"before": 0.0, "after": 0.75}}}
    ]
    contracts = [
        {"id": 6, "name": "checkpoints are complete", "status": "held", "detail": "step-2 verified"}
    ]
    samples = [
        {
            "group": "training",
            "prompt": ROW,
            "reference": None,
            "before": None,
            "after": ROW,
            "tokens": None,
        }
    ]
    for name, content in {
        "run.yaml": CONFIG, "receipt.json": RECEIPT, "contracts.json": contracts, "evaluation.json": evaluation,
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in STEPS), "adapter_config.json": ADAPTER,
        "lorry_adapter.json": {"dtype": "float32"}, "tokenizer.json": {}, "tokenizer_config.json": {}, "chat_template.jinja": "x",
        "samples.json": samples, "report.html": ROW, "quarantine.jsonl": ROW, "log.txt": ROW, ".env": "A=b",
        "checkpoints/step-00000002/meta.json": ROW, "checkpoints/adapter_config.json": ADAPTER, "data/train.jsonl": ROW,
        "previous/1/adapter_config.json": ADAPTER, "previous/adapter_config.json": ADAPTER, "optimizer.pt": "x",
    }.items():  # fmt: skip
        put(folder, name, content)
    save_file(
        {"base_model.model.a.lora_A.weight": torch.arange(6.0).reshape(2, 3)},
        folder / "adapter_model.safetensors",
    )
    return folder


@pytest.fixture(name="hub")
def started_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as started:
        visit(started, monkeypatch, tmp_path)
        yield started


def visit(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process talks to a stand-in alone, is logged in there, does not wait between tries, and
    draws no plot (a second).
    """
    monkeypatch.setattr(files, "render_png", lambda runs: b"\x89PNG")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    waiting = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", waiting)
