"""Whole commands on two processes, as torchrun starts them: the files of one device."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lorry.config import DistillRunConfig, RunConfig, UnlearnRunConfig, parse_settings
from lorry.train.session import train_run
from tests.support import tinyrun
from tests.support.layout_equality import relative
from tests.support.layout_ranks import Ranks, start_ranks
from tests.support.layout_runs import (
    EVALUATED,
    JOBS,
    LONG,
    SHARED,
    described,
    words_of,
    write_files,
)
from tests.support.processes import started, wait_until
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
# of a whole pair: far above what it takes, far below the suite's limit
pytestmark = pytest.mark.timeout(600)


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """Command lines of every verb that several processes can run, and one that is refused."""
    short = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "warmup_ratio": 0,
        "save_strategy": "no",
    }

    def words(verb: str, name: str, **settings: Any) -> list[str]:
        return [verb, *words_of(folder, out / name, **{**short, **settings})]

    forget = [w for w in words("unlearn", "unlearn", method="NPO") if not w.startswith("data=")]
    return {
        "run": ["sft", *words_of(folder, out / "run", **EVALUATED)],
        "continued": [
            word
            for word in words("sft", "continued", model=out / "continued")
            if not word.startswith("r=")  # that of its adapter
        ],
        "refused": words("sft", "refused", adapter="/nowhere"),
        "jobs": words("sft", "jobs", jobs=JOBS),
        "distill": words("distill", "distill", teacher=folder / "model"),
        "tensor": [
            "sft",
            *words_of(folder, out / "tensor", **SHARED, model=folder / "shared"),
            "tensor_parallel=2",
            "sequence_parallel=true",
        ],
        "tensor refused": [*words("sft", "tensor-refused"), "tensor_parallel=2"],
        # every process trains the whole base
        "whole": [w for w in words("sft", "whole", lora="null") if not w.startswith("r=")],
        # the same as "run", to the bit
        "moments": ["sft", *words_of(folder, out / "moments", **EVALUATED, shard_optimizer=True)],
        "fsdp run": ["sft", *words_of(folder, out / "fsdp-run", **EVALUATED)],
        # the teacher is shared too, or whole where it cannot be (of 1 KV head)
        **{
            f"tensor {kind}": [
                *words(
                    "distill",
                    f"tensor-{kind}",
                    model=folder / "shared",
                    teacher=folder / teacher,
                    teacher_dtype="float32",
                ),
                "tensor_parallel=2",
            ]
            for kind, teacher in (("distill", "shared-teacher"), ("whole", "teacher"))
        },
        "fsdp jobs": words("sft", "fsdp-jobs", jobs=JOBS),
        # of a model of its own
        "fsdp distill": words("distill", "fsdp-distill", teacher=folder / "teacher"),
        "fsdp unlearn": [
            *[w for w in words("unlearn", "fsdp-unlearn", method="NPO") if w[:5] != "data="],
            f"forget={folder / 'data.jsonl'}",
            f"retain={folder / 'retain.jsonl'}",
        ],
        "unlearn": [
            *forget,
            f"forget={folder / 'data.jsonl'}",
            f"retain={folder / 'retain.jsonl'}",
        ],
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Ranks:  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("runs")
    write_files(folder)
    tinyrun.model_directory(folder / "teacher", num_hidden_layers=2)
    tinyrun.model_directory(folder / "shared-teacher", num_hidden_layers=2, num_key_value_heads=2)
    return start_ranks(folder, commands=commands(folder, folder))


@pytest.mark.parametrize("name", ["run", "fsdp run"])
def test_a_run_of_two_is_the_run_of_one(pair: Ranks, name: str, tmp_path: Path) -> None:
    """The command in two processes, as torchrun starts it: the files of one device; rank 1 says
    nothing, also where both are refused."""
    assert [ended[name] for ended in pair.ended] == [0, 0]
    assert [ended["refused"] for ended in pair.ended] == [4, 4]
    (out, messages), silent = pair.printed
    run = pair.folder / name.replace(" ", "-")
    assert str(run) in out.splitlines()
    assert "2 processes: 4 rows in a micro-batch of all of them, 4 in a step" in messages
    # of the two that are refused
    assert messages.count("error:") == 2
    assert silent == ("", "")
    one = train_run(described(pair.folder, tmp_path / "one", **EVALUATED), [])
    for two, single in zip(tinyrun.lines(run), tinyrun.lines(one.path), strict=True):
        for name in single.keys() - {"seconds", "peak_memory_bytes"}:
            assert two[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(path / "adapter_model.safetensors") for path in (run, one.path)]
    assert max(relative(weights[0][name], weights[1][name]) for name in weights[1]) < 1e-3
    assert {path.name for path in run.iterdir()} - {"report.html", "report.png"} == {
        path.name for path in one.path.iterdir()
    }
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8


def test_a_run_whose_ranks_share_the_model_is_the_run_of_one(pair: Ranks, tmp_path: Path) -> None:
    """With dropout, evaluations, checkpoints and samples; one device goes on from its checkpoint, and
    sizes that do not divide are refused by rank 0 alone, with those that do."""
    assert [ended["tensor"] for ended in pair.ended] == [0, 0]
    assert [ended["tensor refused"] for ended in pair.ended] == [2, 2]
    refusal = "tensor_parallel=2 does not divide 1 KV heads; no size above 1 does"
    assert refusal in pair.printed[0][1]
    run = pair.folder / "tensor"
    described_here = partial(tinyrun.described, pair.folder / "shared", pair.folder / "data.jsonl")
    one = train_run(described_here(tmp_path / "one", **SHARED), [])
    for two, single in zip(tinyrun.lines(run), tinyrun.lines(one.path), strict=True):
        for name in single.keys() - {"seconds", "peak_memory_bytes"}:
            assert two[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(path / "adapter_model.safetensors") for path in (run, one.path)]
    assert max(relative(weights[0][name], weights[1][name]) for name in weights[1]) < 1e-3
    facts = [json.loads((path / "receipt.json").read_text()) for path in (run, one.path)]
    for name in ("trainable_parameters", "total_parameters", "base"):
        assert facts[0][name] == facts[1][name], name
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8
    newest = str(run / "checkpoints" / "step-00000002")
    heard = tinyrun.Heard()
    going_on = described_here(tmp_path / "on", **SHARED, resume_from_checkpoint=newest)
    again = train_run(going_on, listeners=[heard])
    assert any(note.startswith("not bitwise: backend.tensor_parallel") for note in heard.notes)
    resumed = load_file(again.path / "adapter_model.safetensors")
    # the state of both steps was read: nothing is left to train
    assert all(torch.equal(resumed[name], weights[0][name]) for name in resumed)


def test_a_run_whose_ranks_share_the_moments_is_the_same_run(pair: Ranks) -> None:
    assert [ended["moments"] for ended in pair.ended] == [0, 0]
    run, moments = pair.folder / "run", pair.folder / "moments"
    for file in ("adapter_model.safetensors", "checkpoints/step-00000004/state.safetensors"):
        assert (moments / file).read_bytes() == (run / file).read_bytes()
    contracts = json.loads((moments / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8


def test_a_run_that_goes_on_in_its_directory_is_read_by_every_rank(pair: Ranks) -> None:
    """Before rank 0 moves the earlier one away, however late another rank reads it."""
    assert [ended["continued"] for ended in pair.ended] == [0, 0]
    assert (pair.folder / "continued" / "previous" / "1" / "adapter_model.safetensors").is_file()


def test_a_task_knows_nothing_of_ranks() -> None:
    words = (
        "communicator",
        "lorry.ranks",
        "backends.distributed",
        "WORLD_SIZE",
        "torch.distributed",
    )
    sources = sorted((ROOT / "src" / "lorry" / "tasks").rglob("*.py"))
    assert sources
    assert [(p.name, w) for p in sources for w in words if w in p.read_text()] == []


@pytest.mark.parametrize(
    "name",
    [
        "jobs",
        "distill",
        "unlearn",
        "whole",
        "fsdp jobs",
        "fsdp distill",
        "fsdp unlearn",
        "tensor distill",
        "tensor whole",
    ],
)
def test_other_tasks_are_those_of_one(pair: Ranks, name: str, tmp_path: Path) -> None:
    """A task knows nothing of ranks: several jobs, a teacher, a method with a reference."""
    assert [ended[name] for ended in pair.ended] == [0, 0]
    verb, *words = (
        word for word in commands(pair.folder, tmp_path)[name] if not word.startswith("tensor_p")
    )
    schema = {"sft": RunConfig, "distill": DistillRunConfig, "unlearn": UnlearnRunConfig}[verb]
    one = train_run(parse_settings(schema, words, print))
    runs = [
        tinyrun.lines(pair.folder / name.replace(" ", "-")),
        tinyrun.lines(one.path),
    ]
    assert len(runs[1]) >= 2
    for two, single in zip(*runs, strict=True):
        for key in single.keys() & {"loss", "grad_norm", "tokens", "loss_distill", "loss_forget"}:
            assert two[key] == pytest.approx(single[key], rel=1e-4), key


def test_a_teacher_lies_whole_where_ranks_cannot_share_it(pair: Ranks) -> None:
    """It is said; one that they can share is cut without a word."""
    notes = " ".join(pair.printed[0][1].split())
    refusal = "backend.tensor_parallel=2 does not divide 1 KV heads"
    assert f"teacher lies whole on every process ({refusal}" in notes
    assert "shared-teacher lies whole" not in notes


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_and_one_device_goes_on(
    pair: Ranks, backend: str, tmp_path: Path
) -> None:
    """Two workers that the command starts; rank 1 is killed. The other and the command end, the last
    checkpoint is whole, and one process finishes what two began."""
    out = tmp_path / "killed"
    words = words_of(pair.folder, out, **LONG)
    command = [sys.executable, "-m", "lorry", "sft", *words, f"backend={backend}", "processes=2"]
    with started(
        [*command, "keep_total=true"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        metrics = out / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, child)
        workers = psutil.Process(child.pid).children()
        second = next(w for w in workers if w.environ().get("RANK") == "1")
        second.kill()
        messages = child.communicate()[1]
    assert child.returncode not in (0, None), messages
    assert "rank 1 was ended by SIGKILL" in messages
    assert not any(worker.is_running() for worker in workers)
    newest = tinyrun.saved(out)[-1]
    assert 2 <= newest < LONG["max_steps"]
    heard, once = tinyrun.Heard(), {**LONG, "save_strategy": "no"}
    going_on = described(pair.folder, out, resume_from_checkpoint="auto", **once)
    train_run(going_on, listeners=[heard])
    assert any(note.startswith("not bitwise: backend.name") for note in heard.notes)
    one = train_run(described(pair.folder, tmp_path / "one", **once), [])
    # later than that rounding has grown, as it does between any two layouts
    lines = [tinyrun.lines(run)[: newest + 3] for run in (out, one.path)]
    for resumed, single in zip(*lines, strict=True):
        assert resumed["step"] == single["step"]
        assert resumed["loss"] == pytest.approx(single["loss"], rel=1e-3)
        assert resumed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-2)
