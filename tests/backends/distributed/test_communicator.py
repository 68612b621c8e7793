"""Signs of life, the port of the rendezvous, and a rank that gives none; what a signal comes in the way
of.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorry.backends.distributed import communicator
from lorry.backends.distributed.communicator import (
    Pulse,
    TorchCommunicator,
    open_communicator,
    share_early_failure,
)
from lorry.backends.distributed.exchange import mark_shared
from lorry.errors import ConfigError, RunInterruptedError
from lorry.ranks import Mesh
from lorry.train.monitoring.signals import raise_on_signals
from tests.support import tinyrun
from tests.support.processes import wait_until
from tests.support.ranks import started_ranks


def wait_for_ever(pulse: Pulse, rank: int) -> None:
    while True:
        pulse.expect(rank)


def test_a_rank_without_a_pulse_is_given_up() -> None:
    """A living one never is, however long one waits for it; one that ended is, and one that was never
    there."""
    store = HashStore()
    mine, other = Pulse(store, 0, 3, 0.2), Pulse(store, 1, 3, 0.2)
    seen = set[int]()
    while len(seen) < 8:  # longer than the timeout
        mine.expect(1)
        seen.add(store.add("pulse/1", 0))
    other.end()
    for rank in (1, 2):
        with pytest.raises(RuntimeError, match=f"no sign of life of rank {rank} for 0.2 seconds"):
            wait_for_ever(mine, rank)
    mine.end()


def test_a_command_waits_as_long_as_it_says() -> None:
    """Not as long as the one by which the processes were joined: collectives and pulse."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=HashStore(), timeout=timedelta(seconds=600)
    )
    pulse = Pulse(HashStore(), 0, 2, 600.0)
    try:
        ranks = TorchCommunicator(HashStore(), Mesh(), pulse)
        ranks.set_timeout(0.2)
        backend: Any = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        assert backend.options._timeout == timedelta(seconds=0.2)
        with pytest.raises(RuntimeError, match=r"rank 1 for 0\.2 seconds"):
            wait_for_ever(pulse, 1)
        pulse.expect(0)
        time.sleep(0.5)
        pulse.expect(0)  # its own signs come as often as that now
    finally:
        pulse.end()
        torch.distributed.destroy_process_group()


def test_a_port_in_use_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another program, where rank 0 was to wait for the others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**said, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        backend = SimpleNamespace(name="ddp", processes=None, tensor_parallel=1, timeout=5.0)
        with pytest.raises(ConfigError, match=f"rank 0 could not join .* at 127.0.0.1:{port}") as e:
            open_communicator(backend)
        # there is nobody to tell: not tried a second time, a minute long
        monkeypatch.setattr(communicator, "_join", lambda *given: pytest.fail("joins again"))
        share_early_failure(e.value)


@pytest.mark.timeout(300)
def test_a_rank_that_stands_still_ends_the_job(tmp_path: Path) -> None:
    """Its connections stay open and no launcher looks after it: rank 0 gives it up after
    `backend.timeout`, with the last checkpoint whole."""
    model = tinyrun.model_directory(tmp_path / "model")
    rows = tinyrun.write_rows(tmp_path / "data.jsonl", tinyrun.rows(16))
    run = tmp_path / "run"
    words = [f"{name}={value}" for name, value in tinyrun.DEFAULTS.items()]
    words += [f"model={model}", f"data={rows}", f"output_dir={run}", "max_steps=100000"]
    # seconds that a busy machine may leave a rank waiting for the other while both are well
    words += ["save_steps=1", "save_total_limit=3", "backend=ddp", "backend.timeout=10"]
    with started_ranks("lorry", "sft", *words) as (main, other):
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, main)
        os.kill(other.pid, signal.SIGSTOP)
        code, _, messages = main.communicate()
        assert code == 1
        assert "lost another process of the run at" in messages
        assert "resume_from_checkpoint=auto goes on" in messages
    assert tinyrun.saved(run)


@pytest.fixture
def first_of_two() -> Iterator[TorchCommunicator]:
    """Rank 0 of two, of which there is no other."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    pulse: Any = SimpleNamespace(timeout=5.0)
    yield TorchCommunicator(HashStore(), Mesh(0, replicas=2), pulse)
    torch.distributed.destroy_process_group()


def test_what_comes_in_the_way_of_a_shared_error_is_told_to_nobody(
    first_of_two: TorchCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while a run ends with another rank's error: that one has gone, and waits for nobody."""
    told = list[BaseException]()
    monkeypatch.setattr(first_of_two, "tell_failure", told.append)
    shared = mark_shared(ConfigError("rank 1: no such file"))

    def stopped() -> None:
        raise RunInterruptedError("SIGTERM arrived")

    def end() -> None:
        try:
            raise shared
        finally:
            stopped()

    with pytest.raises(RunInterruptedError), first_of_two.sharing_failures():
        end()
    assert not told
    # a script that has caught one error and goes on has news of the next
    try:
        raise shared
    except ConfigError:
        with pytest.raises(RunInterruptedError), first_of_two.sharing_failures():
            stopped()
    assert len(told) == 1


def test_behind_a_failure_ranks_count_anew(
    first_of_two: TorchCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One waited for the others, and has counted that, when another failed on its way there: of the
    next command's both look for the same word."""
    monkeypatch.setattr(first_of_two, "_frames", lambda frame: [frame, frame])
    keys = list[str]()
    first_of_two.store = SimpleNamespace(
        set=lambda key, value: keys.append(key), check=lambda names: True
    )
    first_of_two.await_all("answers")
    first_of_two.tell_failure(ConfigError("no such file"))
    first_of_two.await_all("answers")
    assert keys == ["here/0/1/0", "here/1/1/0"]


def test_no_signal_comes_between_the_parts_of_an_exchange(
    first_of_two: TorchCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long value two collectives: the other rank is in the second one."""
    gathered = list[int]()

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
        gathered.append(tensor.numel())
        for part in parts:
            part.copy_(tensor)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(RunInterruptedError, match="SIGTERM"), raise_on_signals():
            first_of_two.exchange("rows", "x" * 10_000)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(gathered) == 2
