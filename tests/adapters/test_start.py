"""An adapter that belongs to the frozen base, and one trained over it: the sum that a plain model
with the first folded into its weights gives; files that no other reader takes for a whole adapter.
"""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native import native
from torch import Tensor, nn

from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.merge import merge, unmerge
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import load_adapter, load_start, save_adapter
from lorry.adapters.peft.start_files import adapter_digest
from lorry.adapters.spec import LoraSpec
from lorry.errors import ContractError, ModelError

START = LoraSpec(r=4, lora_dropout=0.5)
NEW = LoraSpec(r=2, lora_alpha=3)


@pytest.fixture
def start(tiny: Any, shake: Any, tmp_path: Path, family: str) -> Path:
    """A saved adapter of the family's tiny model."""
    model = native(tiny(family))
    attach(model, START)
    shake(lora_parameters(model), 5)
    save_adapter(model, tmp_path / "start")
    return tmp_path / "start"


def folded(model: nn.Module, start: Path) -> nn.Module:
    """The plain model with the start's s B A added to its weights, by our own arithmetic."""
    load_adapter(model, start, "start")
    bank = get_bank(model)
    with torch.no_grad():
        for path, slot in bank["start"].slots.items():
            layer = model.get_submodule(path)
            delta = slot.scale * (slot.B.double() @ slot.A.double())
            layer.weight.copy_(layer.weight.double() + (delta.t() if layer.transposed else delta))
    detach(model, "start")
    return model


def with_new(model: nn.Module, shake: Any) -> nn.Module:
    attach(model, NEW, "new")
    shake(lora_parameters(model), 9)
    return model


def saved_over_start(tiny: Any, shake: Any, folder: Path) -> Path:
    """An adapter over a start, both of the tiny Llama: ``folder``/new over ``folder``/start."""
    model = tiny("llama")
    attach(model, START)
    shake(lora_parameters(model), 5)
    save_adapter(model, folder / "start")
    model = tiny("llama")
    load_start(model, folder / "start")
    save_adapter(with_new(model, shake), folder / "new", "new")
    return folder / "new"


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    adapter = get_bank(model)["new"]
    adapter.grads.zero_()
    adapter.bind_grads()
    model(ids).logits.square().mean().backward()
    return {name: grad.clone() for name, grad in adapter.split_like(adapter.grads).items()}


def test_the_start_is_under_every_mix(
    family: str, start: Path, tiny: Any, ids: Tensor, logits: Any, shake: Any
) -> None:
    plain = with_new(folded(tiny(family), start), shake)
    for model in (native(tiny(family)), tiny(family)):
        bare = logits(model, ids)
        load_start(model, start)
        assert get_bank(model).names() == []
        alone = logits(model, ids)
        assert (alone - bare).abs().max() > 1e-2
        with_new(model, shake)
        torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-4, atol=2e-4)
        theirs = gradients(plain, ids)
        for name, grad in gradients(model, ids).items():
            assert grad.any(), name
            torch.testing.assert_close(grad, theirs[name], rtol=2e-3, atol=2e-4)
        assert [p.shape for p in lora_parameters(model)] == [
            p.shape for p in get_bank(model).parameters()
        ]
        get_bank(model).activate(Mix.none())
        assert torch.equal(logits(model, ids), alone)  # dropped: the start, bit for bit
        detach(model, "new")
        assert torch.equal(logits(model, ids), alone)


def test_merged_with_the_start(
    family: str, start: Path, tiny: Any, ids: Tensor, logits: Any, shake: Any
) -> None:
    model = native(tiny(family))
    load_start(model, start)
    with_new(model, shake)
    before = logits(model, ids)
    merge(model)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=2e-4)
    with pytest.raises(ContractError, match="is merged"):
        with_ambient(model, ids, Mix.one("new"))
    unmerge(model)
    assert torch.equal(logits(model, ids), before)


def with_ambient(model: nn.Module, ids: Tensor, mix: Mix) -> Tensor:
    token = AMBIENT_CONTEXT.set(AdapterContext(mix))
    try:
        return model(ids).logits
    finally:
        AMBIENT_CONTEXT.reset(token)


def test_saved_and_opened_again(
    family: str, start: Path, tiny: Any, ids: Tensor, logits: Any, shake: Any, tmp_path: Path
) -> None:
    model = native(tiny(family))
    load_start(model, start)
    save_adapter(with_new(model, shake), tmp_path / "new", "new")
    facts = json.loads((tmp_path / "new/lorry_adapter.json").read_text())
    assert facts["start"]["sha256"] == adapter_digest(start)
    again = native(tiny(family))
    load_adapter(again, tmp_path / "new")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert base_digest(again) == base_digest(tiny(family))  # the base's own, as ever
    third = native(tiny(family))  # a start that has a start
    load_start(third, tmp_path / "new")
    assert torch.equal(logits(third, ids), logits(model, ids))
    assert len(get_bank(third).base_adapters) == 2


def test_other_readers_refuse_it(tiny: Any, shake: Any, tmp_path: Path) -> None:
    """PEFT would open it on top of the base model alone, where it is another model."""
    from peft import PeftModel

    folder = saved_over_start(tiny, shake, tmp_path)
    with pytest.raises((KeyError, ValueError, TypeError)):
        PeftModel.from_pretrained(tiny("llama"), folder)


def test_another_start_is_refused(tiny: Any, shake: Any, tmp_path: Path, saved: Path) -> None:
    model = tiny("llama")
    load_start(model, saved)
    save_adapter(with_new(model, shake), tmp_path / "new", "new")
    other = tiny("llama")
    attach(other, START)
    with pytest.raises(ModelError, match="on the base model alone; load it by itself"):
        load_adapter(other, tmp_path / "new", "second")
    save_adapter(other, tmp_path / "other")
    other = tiny("llama")
    load_start(other, tmp_path / "other")
    with pytest.raises(ModelError, match="load it on its own start"):
        load_adapter(other, tmp_path / "new", "second")
    with pytest.raises(ModelError, match="on top of the base model alone"):
        load_adapter(other, saved, "third")
    weights = tmp_path / "new/start_adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match="not the adapter that"):
        load_adapter(tiny("llama"), tmp_path / "new")
    weights.unlink()  # then the directory that was named
    load_adapter(tiny("llama"), tmp_path / "new")
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="which is missing"):
        load_adapter(tiny("llama"), tmp_path / "new")


def test_the_copy_is_enough(
    tiny: Any, shake: Any, tmp_path: Path, saved: Path, ids: Tensor, logits: Any
) -> None:
    """Two starts, and neither directory is where it was."""
    second = tiny("llama")
    load_start(second, saved)
    save_adapter(with_new(second, shake), tmp_path / "second", "new")
    third = tiny("llama")
    load_start(third, tmp_path / "second")
    attach(third, NEW, "third", seed=4)
    shake(lora_parameters(third), 11)
    save_adapter(third, tmp_path / "third", "third")
    for folder in (saved, tmp_path / "second"):
        folder.rename(folder.with_name(f"{folder.name}-moved"))
    again = tiny("llama")
    load_adapter(again, tmp_path / "third")
    assert torch.equal(logits(again, ids), logits(third, ids))
    assert len(get_bank(again).base_adapters) == 2
    (tmp_path / "copied").mkdir()
    save_adapter(again, tmp_path / "copied")  # and once more, from the copies
    assert (tmp_path / "copied/start_adapter/start_adapter/adapter_model.safetensors").is_file()


def test_a_start_of_itself_is_refused(tiny: Any, shake: Any, tmp_path: Path, saved: Path) -> None:
    model = tiny("llama")
    load_start(model, saved)
    save_adapter(with_new(model, shake), tmp_path / "new", "new")
    for file in (tmp_path / "new/start_adapter").iterdir():
        file.unlink()
    (tmp_path / "new/start_adapter").rmdir()
    facts = tmp_path / "new/lorry_adapter.json"
    itself = {
        "path": str(tmp_path / "new"),
        "sha256": adapter_digest(tmp_path / "new"),
    }
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "start": itself}))
    with pytest.raises(ModelError, match="leads back to"):
        load_adapter(tiny("llama"), tmp_path / "new")


def test_half_a_start_is_refused(tiny: Any, shake: Any, tmp_path: Path, saved: Path) -> None:
    model = tiny("llama")
    load_start(model, saved)
    save_adapter(with_new(model, shake), tmp_path / "new", "new")
    facts = tmp_path / "new/lorry_adapter.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "start": {"path": "x"}}))
    with pytest.raises(ModelError, match="which start has to name"):
        load_adapter(tiny("llama"), tmp_path / "new")


def test_a_start_with_another_factor_is_refused(tiny: Any, shake: Any, tmp_path: Path) -> None:
    """The same weights under another lora_alpha are another model."""
    folder = saved_over_start(tiny, shake, tmp_path)
    config = folder / "start_adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    with pytest.raises(ModelError, match="not the adapter that"):
        load_adapter(tiny("llama"), folder)
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 32}))
    load_adapter(tiny("llama"), folder)


def test_the_start_keeps_no_gradient_buffer(tiny: Any, shake: Any, tmp_path: Path, ids: Tensor, logits: Any) -> None:  # fmt: skip
    """It would be as large as the start; a copy and a move to a device do without it, too."""
    saved_over_start(tiny, shake, tmp_path)
    model = tiny("llama")
    load_start(model, tmp_path / "start")
    with_new(model, shake)
    before = logits(model, ids)
    bank = get_bank(model)
    bank.to(torch.device("cpu"))
    twin = deepcopy(model)
    for one in (model, twin):
        (frozen,) = get_bank(one).base_adapters.values()
        assert frozen.grads.untyped_storage().nbytes() == 0
        assert all(master.grad is None for master in frozen.masters().values())
        assert torch.equal(logits(one, ids), before)
        assert all(grad.any() for grad in gradients(one, ids).values())


def test_a_gradient_with_other_memory_is_bound_again() -> None:
    """What sets a gradient's .data leaves the object in place, and the flat buffer would get nothing."""
    net = nn.Sequential(nn.Linear(6, 5))
    attach(net, LoraSpec(r=2, lora_alpha=4, target_modules="all-linear"))
    adapter = get_bank(net)["default"]
    adapter.bind_grads()
    for param in adapter.parameters():
        assert param.grad is not None
        param.grad.data = param.grad.data.clone()
    adapter.bind_grads()
    net(torch.ones(3, 6)).sum().backward()
    assert adapter.grads.any()
    # and a pickled one brings each buffer once
    sizes = {key: len(pickle.dumps(value)) for key, value in adapter.__getstate__().items()}
    assert sizes["bound"] < 100 < sizes["grads"]
