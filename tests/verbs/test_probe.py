"""In what number format a verb compares logits: what the model's device holds decides, and what
transformers reads it into.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from lorry.models.loading import load
from lorry.verbs.checks import probe

GIB = 2**30
NEEDED = 4 * 1000 * 1000  # bytes of the model below in float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a safetensors header of a million values: nothing but shapes is read."""
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1000, 1000, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("on_gpu", "here", "chosen"),
    [
        (GIB, GIB, "float32"),
        (NEEDED, 100 * GIB, "bfloat16"),  # the GPU holds the model once, merging needs it twice
        (100 * GIB, NEEDED // 2, "bfloat16"),  # transformers opens it again here
        (100 * GIB, NEEDED + 1, "float32"),
    ],
)
def test_of_a_gpu_s_model_the_gpu_s_memory_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: int, here: int, chosen: str
) -> None:
    asked: list[torch.device] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return on_gpu, 200 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": here}))
    assert probe.logits_dtype_name(str(folder), "bfloat16") == chosen
    assert asked == [torch.device("cuda")]


@pytest.mark.parametrize(("here", "chosen"), [(3 * NEEDED, "float32"), (2 * NEEDED, "bfloat16")])
def test_of_a_cpu_s_model_the_system_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch, here: int, chosen: str
) -> None:
    monkeypatch.setattr(load.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": here}))
    assert probe.logits_dtype_name(str(folder), "bfloat16") == chosen
