"""Lorry's own decoder and PEFT over transformers, through adapter files, both ways; `pytest -s`
prints the differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_interop import CASES, peft_model, words
from test_native import native
from torch import Tensor

from lorry.adapters.attach import attach, lora_parameters
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec

SHOWN = ("two linears", "rslora", "patterns", "all-linear", "head")


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], tuple[float, float]]]:
    rows: dict[tuple[str, str], tuple[float, float]] = {}
    yield rows
    print("\nlargest |logit difference|, fp32          ours in PEFT   PEFT's in ours")
    for (family, case), (there, back) in rows.items():
        print(f"{family:12s} {case:24s} {there:16.1e} {back:16.1e}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHOWN)
def test_native_decoder_and_peft(
    name: str,
    family: str,
    tiny: Any,
    ids: Tensor,
    logits: Any,
    shake: Any,
    tmp_path: Path,
    table: Any,
) -> None:
    case = words(CASES[name], family)
    own = native(tiny(family))
    attach(own, LoraSpec(**case))
    shake(lora_parameters(own))
    save_adapter(own, tmp_path / "ours")
    ours = logits(own, ids)
    there = float(
        (logits(peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours"), ids) - ours)
        .abs()
        .max()
    )

    theirs = peft_model(tiny(family), case, shake)
    theirs.save_pretrained(tmp_path / "theirs")
    again = native(tiny(family))
    load_adapter(again, tmp_path / "theirs")
    back = float((logits(again, ids) - logits(theirs, ids)).abs().max())
    table[family, name] = (there, back)
    assert (ours - logits(native(tiny(family)), ids)).abs().max() > 1e-2, "the adapter must matter"
    assert max(there, back) <= 1e-5
    assert torch.isfinite(ours).all()
