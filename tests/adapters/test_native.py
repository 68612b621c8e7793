"""The bank on Lorry's own decoder: the same adapters, files, merges and digests as on transformers'
classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.attach import attach, detach, get_bank, lora_parameters
from lorry.adapters.merge import merge, merged_tensors, separates_tied_head, unmerge
from lorry.adapters.mix import Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from tests.support.twins import native


@pytest.mark.parametrize("targets", ["auto", ("embed", "lm_head")], ids=["auto", "both ends"])
def test_adapters_act_alike_and_travel(
    targets: Any, family: str, tiny: Any, ids: Tensor, logits: Any, shake: Any, tmp_path: Path
) -> None:
    """A plain `model(x)` uses the adapter on every layer, whichever layers have one."""
    foreign, own = tiny(family), native(tiny(family))
    assert base_digest(own) == base_digest(foreign)
    base = logits(own, ids)
    spec = LoraSpec(r=3, target_modules=targets)
    assert list(attach(own, spec).slots) == list(attach(foreign, spec).slots)
    for model in (own, foreign):
        shake(lora_parameters(model))
    adapted = logits(own, ids)
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(adapted, logits(foreign, ids), rtol=0, atol=1e-4)
    save_adapter(own, tmp_path)
    again = tiny(family)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, ids), logits(foreign, ids))
    get_bank(own).activate(Mix.none())
    assert torch.equal(logits(own, ids), base)


def test_merging_and_detaching(
    family: str, tiny: Any, ids: Tensor, logits: Any, shake: Any
) -> None:
    own = native(tiny(family))
    names, objects = (
        list(own.state_dict()),
        {n: id(p) for n, p in own.named_parameters(remove_duplicate=False)},
    )
    base = logits(own, ids)
    attach(own, LoraSpec(r=3, target_modules=("lm_head",)))
    shake(lora_parameters(own))
    adapted = logits(own, ids)
    assert separates_tied_head(own) is own.geometry.tied
    streamed = dict(merged_tensors(own))
    assert list(streamed) == names
    assert merge(own).untied is own.geometry.tied
    assert list(own.state_dict()) == names
    assert all(torch.equal(v, streamed[k]) for k, v in own.state_dict().items())
    torch.testing.assert_close(logits(own, ids), adapted, rtol=0, atol=1e-4)
    unmerge(own)
    assert torch.equal(logits(own, ids), adapted)
    detach(own)
    assert {n: id(p) for n, p in own.named_parameters(remove_duplicate=False)} == objects
    assert torch.equal(logits(own, ids), base)


def test_a_bf16_base_with_fp32_masters(tiny: Any, ids: Tensor, logits: Any, shake: Any) -> None:
    """bf16 against the same adapted model in fp32: close, and the masters stay fp32."""
    exact, rounded = native(tiny("llama")), native(tiny("llama")).bfloat16()
    for model in (exact, rounded):
        attach(model, LoraSpec(r=4))
        shake(lora_parameters(model))
        for p in lora_parameters(model):
            p.data.mul_(0.3)
        get_bank(model)["default"].touch()
    assert {p.dtype for p in lora_parameters(rounded)} == {torch.float32}
    truth, got = logits(exact, ids), logits(rounded, ids)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - truth).norm() / truth.norm()) < 0.05
    nn.functional.cross_entropy(rounded(ids).logits.flatten(0, 1).float(), ids.flatten()).backward()
    nn.functional.cross_entropy(exact(ids).logits.flatten(0, 1), ids.flatten()).backward()
    a, b = (get_bank(m)["default"].grads for m in (rounded, exact))
    assert a.dtype == torch.float32
    assert float((a - b).norm() / b.norm()) < 0.1
