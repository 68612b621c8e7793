"""Side by side on several processes: bytes as the kernel counts them, what ranks tell put together,
and that a layout which does not shard is found out. bfloat16, as the benchmark.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gates
import layout_turns
import pytest
import wire
from case import Case, read_rows
from layout_engines import LAYOUTS, RankWatch, environments, local_bytes
from transformers import LlamaConfig

from lorry import kernels
from tests.support.processes import started


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
    first, second = environments(2, 4)
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["OMP_NUM_THREADS"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert environments(1, 4) == [{"OMP_NUM_THREADS": "4"}]


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


SEVERAL = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import layout_turns
from layout_engines import LAYOUTS, Layout, lorry
LAYOUTS["lorry-tp"] = Layout(lambda: lorry("ddp", 2), "", 2, True, shards=2, plan=("ddp", 2))
print(json.dumps([layout_turns.work(engine, Path(sys.argv[2])) for engine in sys.argv[3:]]))
"""
WIRE_CASE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "max_position_embeddings": 64,
}


@pytest.mark.timeout(240)
def test_what_two_processes_send_is_what_was_planned(
    tmp_path: Path, write_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel's count, within 2%: each layout's collectives and the few KiB that ranks tell each
    other. And what each holds of the base.
    """
    if not kernels.kernel_status().active:
        pytest.skip("the compiled kernels are off here, and the benchmark refuses to measure that")
    # two processes, where the benchmark's model divides by three alone
    two = replace(LAYOUTS["lorry-tp"], processes=2, shards=2, plan=("ddp", 2))
    monkeypatch.setitem(LAYOUTS, "lorry-tp", two)
    engines = ["lorry-ddp", "lorry-fsdp", "lorry-tp"]
    case = Case(length=32, rank=32, alpha=64, rows_per_step=8, warmup=1, steps=2)
    write_case(tmp_path, LlamaConfig(**WIRE_CASE), case)
    told = run_ranks(engines, tmp_path)
    whole = layout_turns.whole_base_bytes(tmp_path)
    for number, engine in enumerate(engines):
        turn = layout_turns.Turn(engine, [rank[number] for rank in told])
        assert layout_turns.unsharded(turn, whole) == ""
        plan = layout_turns.planned(engine, tmp_path, case)
        assert plan is not None
        for rank in turn.ranks:
            assert rank["sent_per_step"] == pytest.approx(plan["sent_per_step"], rel=0.02)
        assert turn.ranks[0]["losses"] == pytest.approx(told[0][0]["losses"], rel=1e-3)


def run_ranks(engines: list[str], folder: Path) -> list[list[dict[str, Any]]]:
    """[rank][engine]: what each process tells of these layouts, one after the other."""
    script = [sys.executable, "-c", SEVERAL, str(Path(layout_turns.__file__).parent), str(folder)]
    variables = environments(LAYOUTS[engines[0]].processes, 2)
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                started(
                    [*script, *engines],
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for environment in variables
        ]
        said = [rank.communicate()[0] for rank in ranks]
    return [json.loads(out.splitlines()[-1]) for out in said]
