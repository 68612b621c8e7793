"""A rank killed anywhere: the others end, and the same command with resume_from_checkpoint=auto is the
run that was never killed, bit for bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import tinyrun
from tests.support.ranked import FAULT, run_processes, run_ranked

pytestmark = pytest.mark.timeout(600)
POINTS = 20
# as often a run of `words` does so at the least; files are renamed by rank 0
CALLS = {"exchange": 60, "disk": 20, "pass": 6, "update": 6}
# with the base cut over the ranks they also meet before each pass, and gather each layer
CUT_CALLS = {**CALLS, "exchange": 90, "gather": 40}


def draw_points(count: int, calls: Mapping[str, int]) -> list[str]:
    """As `fault_named` reads them."""
    draw, points = random.Random(12), list[str]()
    while len(points) < count:
        where = draw.choice(list(calls))
        rank = 0 if where == "disk" else draw.randrange(2)
        point = f"kill {rank} {where} {draw.randint(1, calls[where])}"
        points += [point] if point not in points else []
    return points


Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    folder = tmp_path_factory.mktemp("killed")
    given: dict[str, Any] = {
        **tinyrun.DEFAULTS,
        "model": tinyrun.model_directory(folder / "model"),
        "data": tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(16)),
        "per_device_train_batch_size": 2,
        "lora_dropout": 0.1,
        "max_steps": 6,
        "test_size": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": "true",
        "backend": "ddp",
        # for a rank that waits for rank 0's word: no launcher ends it here
        "backend.timeout": 10,
    }

    def made(run: Path, *more: str, fault: str = "") -> list[str]:
        marks = [f"{FAULT}{fault}"] if fault else []
        settings = [f"{name}={value}" for name, value in given.items()]
        return [*marks, "sft", *settings, f"output_dir={run}", *more]

    return made


def finished(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter, and the metrics without what a clock and an allocator say."""
    measured = [
        {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")}
        for line in tinyrun.lines(run)
    ]
    return (run / "adapter_model.safetensors").read_bytes(), measured


@pytest.mark.parametrize(
    ("backend", "point"),
    [
        ("ddp", "kill 0 disk 9"),  # where it writes the first checkpoint
        *(
            pytest.param(backend, point, marks=pytest.mark.slow)
            for backend, calls in (("ddp", CALLS), ("fsdp", CUT_CALLS))
            for point in draw_points(POINTS, calls)
        ),
    ],
)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(
    words: Words, tmp_path: Path, backend: str, point: str
) -> None:
    run, whole, on = tmp_path / "run", tmp_path / "whole", f"backend={backend}"
    killed = run_processes(tmp_path / "killed", {"killed": words(run, on, fault=point)})
    victim = int(point.split()[1])
    assert [code for code, _, _ in killed][victim] == -9, killed
    # the other one's command ended, with another exit code than 0
    survivor = json.loads((tmp_path / "killed" / f"rank-{1 - victim}.json").read_text())
    assert survivor["killed"] == 1, killed
    assert "lost another process of the run" in killed[1 - victim][2]
    ended = run_ranked(
        tmp_path / "resumed",
        {"resumed": words(run, on, "resume_from_checkpoint=auto"), "whole": words(whole, on)},
    )
    assert ended.codes == {"resumed": [0, 0], "whole": [0, 0]}, ended.printed
    assert finished(run) == finished(whole)
