"""The twin that ranks train before the model: it holds for every family and number format, and each of
the faults that would leave a healthy-looking run is found by it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.adapter import Adapter
from lorry.adapters.dropout import SeededDropout
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.slot import AdapterSlot
from lorry.adapters.tensor_parallel.slices import Side
from lorry.errors import ContractError
from lorry.families import find_family
from lorry.models.tensor_parallel_proof import prove_shared_layers
from tests.support import tiny
from tests.support.threads import ThreadRanks, on_ranks
from tests.support.tiny import one_thread  # noqa: F401 - a fixture


def prove(name: str, size: int, dtype: torch.dtype) -> list[None]:
    config = tiny.VARIANTS[name]
    family = find_family(config["model_type"])
    assert family is not None

    def work(ranks: ThreadRanks) -> None:
        prove_shared_layers(family, config, dtype, torch.device("cpu"), ranks, None, print)

    return on_ranks(size, work)


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("llama biased", 2, torch.float64),
        ("qwen3", 4, torch.float32),
        ("gpt2", 2, torch.bfloat16),
        ("gpt_neox parallel", 3, torch.bfloat16),
    ],
)
def test_the_twin_trains_alike(name: str, size: int, dtype: torch.dtype) -> None:
    prove(name, size, dtype)


def bias_of_every_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BankLinear, "added_bias", lambda self: self.bias)


def dropout_by_local_column(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SeededDropout, "_place", lambda self, width: (width, 0))


def drawn_by_each_for_its_part(patch: pytest.MonkeyPatch) -> None:
    def shape(self: AdapterSlot, side: Side) -> list[int]:
        return list((self.A if side == "A" else self.B).shape)

    def copy(self: AdapterSlot, side: Side, values: Tensor) -> None:
        (self.A if side == "A" else self.B).data.copy_(values)

    patch.setattr(AdapterSlot, "whole_shape", shape)
    patch.setattr(AdapterSlot, "copy_whole", copy)


def whole_sides_not_added_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adapter, "partial_sums", lambda self: [])


FAULTS = {
    "a row-parallel bias added twice": bias_of_every_rank,
    "dropout by local column": dropout_by_local_column,
    "A drawn per shard": drawn_by_each_for_its_part,
    "a whole side not summed": whole_sides_not_added_up,
}


@pytest.mark.parametrize(
    ("fault", "dtype"),
    # in bfloat16 dropout is a kernel's
    [*((fault, torch.float32) for fault in FAULTS), ("dropout by local column", torch.bfloat16)],
)
def test_a_fault_is_found_on_every_rank(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(ContractError, match="do not train a small copy of this model") as raised:
        prove("gpt2", 2, dtype)
    assert "tensor rank 0" in str(raised.value)


def test_one_rank_that_differs_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank raises, and names the one that does."""
    original: Any = BankLinear.base_product

    def wrong(self: BankLinear) -> Any:
        product = original(self)
        if self.slices is not None and self.slices.ranks.rank and "c_fc" in self.path:
            product = type(product)(product.weight * 1.5, product.bias, product.transposed)
        return product

    monkeypatch.setattr(BankLinear, "base_product", wrong)
    errors = list[str]()

    def work(ranks: ThreadRanks) -> None:
        family = find_family("gpt2")
        assert family is not None
        try:
            prove_shared_layers(
                family, tiny.GPT2, torch.float64, torch.device("cpu"), ranks, None, print
            )
        except ContractError as error:
            errors.append(str(error))

    on_ranks(2, work)
    assert len(errors) == 2
    assert all("do not train" in error for error in errors)


def test_the_environment_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_PROOFS", "0")
    bias_of_every_rank(monkeypatch)
    prove("gpt2", 2, torch.float32)
