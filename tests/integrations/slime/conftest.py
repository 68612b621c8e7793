"""Where slime is, and one tiny model of each family. Without slime and megatron-core only what needs
neither runs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Llama, Qwen2 and Qwen3 and PEFT adapters on them."""
    from tests.support.megatron_models import make_model

    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2", "qwen3"):
        make_model(name, folder)
    return folder
