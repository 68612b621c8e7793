"""One process as Megatron's only rank."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Process groups of one rank, and Megatron on the CPU."""
    import torch

    from tests.support.cuda_shim import cuda_on_cpu
    from tests.support.megatron_gradients import Case, parallel

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with cuda_on_cpu(), parallel(Case("", "")):
            yield
    finally:
        torch.distributed.destroy_process_group()
