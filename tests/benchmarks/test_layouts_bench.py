"""Side by side on several processes: bytes as the kernel counts them, what ranks tell put together,
and that a layout which does not shard is found out. bfloat16, as the benchmark.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import gates
import layout_turns
import pytest
import wire
from case import Case, read_rows
from layout_engines import LAYOUTS, RankWatch, local_bytes

from lorry import kernels


def test_bytes_on_the_wire_are_those_that_were_sent() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        before = wire.sent_bytes()
        one.sendall(b"x" * 12345)
        other.sendall(b"y" * 55)
        assert wire.sent_bytes() - before == 12400


def rank(**told: Any) -> dict[str, Any]:
    return {"losses": [2.0], "first_rows": [0], "tokens": [30], "wall": [3.0], **told}


def test_ranks_that_tell_of_their_own_rows_are_put_together() -> None:
    """The mean over supervised tokens of all, and the clock of the slowest."""
    ranks = [
        rank(supervised=[30], losses=[2.0]),
        rank(supervised=[10], losses=[4.0], first_rows=[1], tokens=[12], wall=[6.0]),
    ]
    turn = layout_turns.Turn("accelerate-ddp", ranks)
    assert turn.first() == {"losses": [2.5], "first_rows": [0, 1]}
    assert turn.speeds() == [7.0]


def test_ranks_that_tell_of_the_whole_step_count_once() -> None:
    ranks = [rank(first_rows=[0, 1], supervised=[30]), rank(first_rows=[0, 1], wall=[5.0])]
    turn = layout_turns.Turn("lorry-ddp", ranks)
    assert turn.first() == {"losses": [2.0], "first_rows": [0, 1]}
    assert turn.speeds() == [6.0]


@pytest.mark.parametrize(("held", "refused"), [(50, False), (52, False), (53, True), (100, True)])
def test_a_layout_that_holds_the_whole_base_is_no_sharded_one(held: int, refused: bool) -> None:
    """accelerate takes no notice of its FSDP plugin on a CPU, unless it is told by hand."""
    turn = layout_turns.Turn("accelerate-fsdp", [rank(base_bytes=50), rank(base_bytes=held)])
    assert bool(layout_turns.unsharded(turn, 100)) == refused
    assert not layout_turns.unsharded(layout_turns.Turn("accelerate-ddp", turn.ranks), 100)


def test_cores_are_divided_and_processes_find_each_other() -> None:
    first, second = LAYOUTS["lorry-ddp"].environments(4)
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["OMP_NUM_THREADS"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert LAYOUTS["lorry"].environments(4) == [{"OMP_NUM_THREADS": "4"}]


def test_an_engine_of_lorrys_tells_of_its_steps(tiny_files: Path) -> None:
    if not kernels.kernel_status().active:
        pytest.skip("the compiled kernels are off here, and the benchmark refuses to measure that")
    case, rows = Case.load(tiny_files), read_rows(tiny_files)
    watch = RankWatch(tiny_files, "lorry", {tuple(ids): n for n, (ids, _) in enumerate(rows)})
    LAYOUTS["lorry"].make()(tiny_files, case, rows, watch)
    assert len(watch.losses) == len(watch.wall) == case.all_steps
    assert watch.base_bytes == layout_turns.whole_base_bytes(tiny_files)
    assert watch.loading_peak > 0
    gate = gates.judge_all(
        tiny_files,
        {"lorry": {"losses": watch.losses, "first_rows": watch.first_rows}},
        gates.reference(tiny_files, rows, [watch.first_rows]),
        set(),
    )
    assert gate["lorry"]["refused"] is None


def test_a_part_of_a_tensor_counts_as_what_lies_here() -> None:
    import torch

    whole = torch.zeros(8, dtype=torch.bfloat16)
    whole._local_tensor = torch.zeros(3, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    assert local_bytes(whole) == 6
