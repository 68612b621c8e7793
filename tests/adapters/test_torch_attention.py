"""Adapters in torch's own attention and encoder layers, which compute with parameters of the layers inside
them past their forward. PEFT is the judge where it has them called, training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_peft_configurations import trained
from torch import Tensor, nn

from lorry.adapters.attach import attach, detach
from lorry.adapters.merge import merge, unmerge
from lorry.adapters.peft.files import load_adapter, save_adapter
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError

CASES: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": ["linear1", "linear2"]},
    "dora": {"target_modules": ["linear1"], "use_dora": True},
    "biases": {"target_modules": ["linear1"], "bias": "all"},
    "attention saved": {"target_modules": ["linear1"], "modules_to_save": ["self_attn"]},
    "half of it": {"target_modules": ["linear1"], "modules_to_save": ["self_attn.out_proj"]},
    "norm saved": {"target_modules": ["head"], "modules_to_save": ["norm1"]},
}


class Encoder(nn.Module):
    """x [B, T, 8] -> [B, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def _slow() -> Iterator[None]:
    """Without the fast path PEFT's layers are called in eval mode too; on it they count for nothing."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_slow")
@pytest.mark.filterwarnings("ignore")
def test_what_peft_trains_is_read(name: str, x: Tensor, tmp_path: Path) -> None:
    theirs = trained(Encoder().eval(), {**CASES[name], "task_type": None})
    theirs.save_pretrained(tmp_path)
    expected = theirs(x).detach()
    model = Encoder().eval()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert (expected - Encoder().eval()(x)).abs().max() > 1e-2, "the adapter must matter"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_it_counts_whatever_path_torch_takes(name: str, x: Tensor, tmp_path: Path) -> None:
    """While nothing trains, under no_grad, in PEFT's files, merged, and no more once it is gone."""
    theirs = trained(Encoder(), {**CASES[name], "task_type": None}).train()
    theirs.save_pretrained(tmp_path)
    expected = theirs(x).detach()
    model = Encoder().eval()
    with torch.no_grad():
        plain = model(x)
        load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        save_adapter(model, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(Encoder(), tmp_path / "again").train()
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-5)
        merge(model)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        unmerge(model)
        detach(model)
        torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-6)


def test_one_module_in_two_places_is_not_saved_whole() -> None:
    model = Encoder()
    model.alias = model.head
    with pytest.raises(ConfigError, match="names head, which is alias too"):
        attach(model, LoraSpec(r=2, target_modules=("linear1",), modules_to_save=("head",)))
