"""Weights cut over ranks: what a lost rank leaves of a pass, and what is asked of the others for a few
values. On ranks that are not there (torch's "fake" backend, whose collectives do nothing); that ranks
train what one process does is `tests/contracts/test_layouts.py`'s.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorry.backends.distributed import exchange, sharded
from lorry.backends.distributed.communicator import TorchCommunicator
from lorry.backends.distributed.exchange import PeerError
from lorry.backends.distributed.passes import PassSchedule
from lorry.errors import RunInterruptedError
from lorry.ranks import Mesh
from lorry.train.monitoring.signals import raise_on_signals


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process is rank 0 of two, of which there is no other."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """`Communicator.explained`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(what) from error


class Group:
    """A layer's group, as `fully_shard` makes it; ``lost``: another rank goes while it is
    gathered; ``stopped``: SIGTERM arrives."""

    def __init__(self, lost: bool, stopped: bool = False) -> None:
        self.lost, self.stopped, self.gathered = lost, stopped, 0

    def unshard(self, async_op: bool = False) -> Any:
        self.gathered += 1
        return SimpleNamespace(wait=self.wait)

    def wait(self) -> None:
        if self.lost:
            raise RuntimeError("Connection closed by peer")
        if self.stopped:
            signal.raise_signal(signal.SIGTERM)

    def reshard(self) -> None:
        """Nothing was gathered."""


@pytest.mark.parametrize("lost_at", [0, 1, 2])
def test_a_rank_lost_in_a_pass_is_named_at_any_layer(
    lost_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No values, so no dtype."""
    groups = iter([*(Group(layer == lost_at) for layer in range(3)), Group(False)])
    monkeypatch.setattr(sharded, "_group", lambda *given: next(groups))
    layers = [nn.Identity() for _ in range(3)]
    weights = sharded.ShardedWeights(
        nn.Module(), layers, None, PassSchedule(lambda what, value: [value]), explained  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(PeerError, match=f"weights of layer {lost_at}"), weights.forward_pass():
        weights.reach(2)


def test_a_rank_that_is_stopped_in_a_pass_gathers_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No values, so no dtype. The others gather every layer, and would wait for this one."""
    made = [Group(False, stopped=layer == 0) for layer in range(4)]
    groups = iter(made)
    monkeypatch.setattr(sharded, "_group", lambda *given: next(groups))
    layers = [nn.Identity() for _ in range(3)]
    weights = sharded.ShardedWeights(
        nn.Module(), layers, None, PassSchedule(lambda what, value: [value]), explained  # type: ignore[arg-type]
    )  # fmt: skip
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with (
            pytest.raises(RunInterruptedError, match="SIGTERM"),
            raise_on_signals(),
            weights.forward_pass(),
        ):
            weights.reach(2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [group.gathered for group in made] == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_values_are_one_sum_that_all_have_agreed_on(
    dtype: torch.dtype, two_ranks: None
) -> None:
    asked = list[str]()

    def agreed(what: str, value: Any) -> list[Any]:
        asked.append(what)
        if len(asked) > 1:
            raise RunInterruptedError("rank 1: SIGTERM arrived")
        return [value]

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(sharded.SHARD,))
    weights = sharded.ShardedWeights(nn.Module(), [], mesh, PassSchedule(agreed), explained)
    share = torch.randn(4, 3).to(dtype)
    weight = DTensor.from_local(share, mesh, [Shard(0)], run_check=False)
    with CommDebugMode() as sent:
        values = weights.values_at(weight, torch.tensor([1, 11, 13]))
    # the last lies on rank 1, of which nothing comes
    assert torch.equal(
        values, torch.stack([share[0, 1], share[3, 2], torch.zeros((), dtype=dtype)])
    )
    assert (asked, sent.get_total_counts()) == (["values of the base"], 1)
    with CommDebugMode() as sent, pytest.raises(RunInterruptedError):
        weights.values_at(weight, torch.tensor([1]))
    assert sent.get_total_counts() == 0


def test_groups_of_ranks_are_made_when_all_are_there(
    two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No values, so no dtype. A rank that is stopped on its way here is heard; one that is lost
    behind it is a PeerError."""
    done = list[str]()

    def lost(*given: Any) -> None:
        done.append("groups")
        raise torch.distributed.DistStoreError("wait timeout after 20000ms")

    monkeypatch.setattr(exchange, "_open_device_mesh", lost)
    pulse: Any = SimpleNamespace(timeout=5.0)
    ranks = TorchCommunicator(None, Mesh(0, shards=2), pulse)
    monkeypatch.setattr(ranks, "exchange", lambda what: done.append(what))
    with pytest.raises(PeerError, match="groups of ranks"):
        ranks.device_mesh("cpu")
    assert done == ["groups of ranks", "groups"]
