"""What an opened mixture holds beyond its base: its experts once, and the router."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

import lorry
from lorry.adapters.peft.files import adapter_files
from tests.support.mixtures import NAMES, mixture_run
from tests.support.verbworld import model_directory

TOKENS = torch.tensor([[5, 9, 3, 7]])


def memory_alive() -> dict[int, torch.UntypedStorage]:
    """The memory of every tensor alive, each once: views share theirs."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    alive = [x for x in gc.get_objects() if type(x) in kinds and x.layout == torch.strided]
    return {memory.data_ptr(): memory for memory in (t.untyped_storage() for t in alive)}


def held_bytes(path: Path) -> tuple[int, Any]:
    """What the model there holds after a forward pass, beside what was alive before."""
    before = memory_alive()
    model, _ = lorry.load(path, dtype="float32")
    with torch.no_grad():
        model(TOKENS)
    new = [memory.nbytes() for at, memory in memory_alive().items() if at not in before]
    return sum(new), model


def bytes_of(path: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(path).values())


@pytest.mark.parametrize("level", ["delta", "expert"])
def test_an_opened_mixture_holds_its_experts_once(level: str, tmp_path: Path) -> None:
    """In float32 at most 1.05 times their files' bytes, and the router's, after a pass that has read
    them all; saved again, each expert is the tensors of its file bit for bit."""
    base = model_directory(tmp_path / "base")
    run = mixture_run(tmp_path / "mix", base, top_k=2, level=level)
    alone, model = held_bytes(base)
    del model
    held, model = held_bytes(run)
    experts = sum(bytes_of(run / name / "adapter_model.safetensors") for name in NAMES)
    router = bytes_of(run / "router" / "router.safetensors")
    assert experts + router <= held - alone <= 1.05 * experts + router
    for name in NAMES:
        again = load(adapter_files(model, name)["adapter_model.safetensors"])
        theirs = load_file(run / name / "adapter_model.safetensors")
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[key], theirs[key]) for key in theirs)
