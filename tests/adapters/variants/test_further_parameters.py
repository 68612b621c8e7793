"""What an adapter has beside its A's and B's: one buffer, one file, and refused by what knows low-rank
terms alone. The variant is one of the tests' own, a scale at every module."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorry.adapters.attach import attach
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.merge import concatenate, merge
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.adapters.variants import registry
from lorry.adapters.variants.parameters import FurtherStart
from lorry.errors import ConfigError, ModelError

SPEC = LoraSpec(r=2, target_modules=("q_proj", "down_proj"))


def scales(
    model: nn.Module, name: str, spec: LoraSpec, targets: Mapping[str, AdaptableLayer]
) -> dict[str, FurtherStart]:
    """A vector of ones at every module, and one at the last norm, which has no A and B."""
    starts = {
        f"{path}.lora_scale": FurtherStart(
            (layer.out_features,),
            lambda slot, size=layer.out_features: torch.ones(size),
            path,
            lambda param, slot: None,
        )
        for path, layer in targets.items()
    }
    norm = FurtherStart(
        (32,),
        lambda slot: torch.full((32,), 2.0),
        "model.norm",
        lambda param, slot: None,
        decays=False,
    )
    return {**starts, "model.norm.lora_scale": norm}


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "VARIANTS", (scales,))


@pytest.mark.usefixtures("variant")
def test_they_lie_behind_the_halves_in_one_buffer(tiny: Any) -> None:
    adapter = attach(tiny("llama"), SPEC)
    sizes = {"q_proj": (32, 32), "down_proj": (48, 32)}
    plain = 3 * sum(2 * (into + out) for into, out in sizes.values())
    assert adapter.num_parameters() == adapter.values.numel() == plain + 3 * 64 + 32
    parts = adapter.ranges()
    assert [part.stop - part.start for part, _, _ in parts] == [3 * 2 * 80, 3 * 2 * 64, 192, 32]
    assert [flags for _, *flags in parts] == [
        [False, True],
        [True, True],
        [False, True],
        [False, False],
    ]
    views = adapter.split_like(adapter.values)
    assert list(views) == [*adapter.tensors()]
    assert set(views) == set(adapter.masters())
    assert views["model.norm.lora_scale"].tolist() == [2.0] * 32
    # none has a gradient yet; then all but one
    assert adapter.zero_grad_names() == adapter.targets()
    assert adapter.targets()[-1] == "model.norm"
    for name, grad in adapter.split_like(adapter.grads).items():
        grad.fill_(float(name == "model.norm.lora_scale"))
    assert adapter.zero_grad_names() == adapter.targets()[:-1]
    for one in adapter.further.values():
        assert one.param.grad is not None
    twin = deepcopy(adapter)
    twin.values.fill_(7.0)
    assert {float(one.param.detach().max()) for one in twin.further.values()} == {7.0}
    assert float(adapter.further["model.norm.lora_scale"].param.detach().max()) == 2.0


@pytest.mark.usefixtures("variant")
def test_they_are_in_its_files_and_read_or_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = attach(model, SPEC, "one")
    with torch.no_grad():
        adapter.values.copy_(torch.randn(adapter.values.shape))
    save_adapter(model, tmp_path)
    other = load_adapter(tiny("llama"), tmp_path)
    assert torch.equal(other.values, adapter.values)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.norm.lora_scale"
    for change, message in [
        ({key: tensors[key][:5]}, r"is \[5\]; model.norm.lora_scale needs \[32\]"),
        ({key: tensors[key] * float("nan")}, "not finite"),
        (
            {f"{key}s": tensors[key].clone()},
            "lora_scales is not part of an adapter of these settings",
        ),
    ]:
        save_file({**tensors, **change}, file)
        with pytest.raises(ModelError, match=message):
            load_adapter(tiny("llama"), tmp_path)
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    with pytest.raises(ModelError, match=r"norm.lora_scale is missing; the file is incomplete"):
        load_adapter(tiny("llama"), tmp_path)


@pytest.mark.usefixtures("variant")
def test_what_knows_low_rank_terms_alone_refuses_it(tiny: Any) -> None:
    model = tiny("llama")
    attach(model, SPEC, "one")
    with pytest.raises(ConfigError, match="cannot be merged into the base"):
        merge(model)
    with pytest.raises(ConfigError, match="cannot be concatenated"):
        concatenate(model, "both", {"one": 1.0})
