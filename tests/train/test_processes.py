"""One process's part of a run: devices and cores, what has to be the same on all machines, told before
the model is loaded; and what one rank alone hears, measures or fails at, decided for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorry.adapters.attach import attach
from lorry.adapters.spec import LoraSpec
from lorry.config import RunConfig
from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError
from lorry.kernels import kernel_status
from lorry.models.loading.load import load_model
from lorry.notes import ignore_note
from lorry.ranks import Mesh
from lorry.train import processes
from lorry.train.processes import (
    choose_device,
    refuse_other_arithmetic,
    refuse_other_questions,
    sampled_digest,
    scale_batches,
    share_cores,
)
from tests.support import tinyrun
from tests.support.ranked import FAULT, Ended, run_ranked
from tests.support.threads import on_mesh

# of the pair with all its commands: far above what it takes
pytestmark = pytest.mark.timeout(600)


def ranks_say(*frames: Any, rank: int = 0) -> Any:
    """A communicator whose ranks all say what is given; None: what this one says."""

    def exchange(what: str, value: Any) -> list[Any]:
        return [value if frame is None else frame for frame in frames]

    return SimpleNamespace(rank=rank, size=len(frames), exchange=exchange, mesh=Mesh(rank, 2))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of so many GPUs, on which this is ``local_rank`` of two processes."""

    def machine(count: int, local_rank: int = 0) -> None:
        monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(processes.torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(processes, "gpu_identity", lambda index: f"GPU-{index}")
        for name, value in {"RANK": local_rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29500")

    return machine


def test_each_process_takes_a_gpu_of_its_own(gpus: Any) -> None:
    gpus(2, local_rank=1)
    assert choose_device("auto", ranks_say("GPU-0", None, rank=1)) == "cuda:1"
    assert choose_device("cuda", ranks_say("GPU-0", None, rank=1)) == "cuda:1"
    assert choose_device("cpu", ranks_say(None, None)) == "cpu"


def test_a_launcher_may_show_each_process_its_own_alone(gpus: Any) -> None:
    """srun --gpus-per-task=1: each sees one, under the same number."""
    gpus(1, local_rank=1)
    assert choose_device("auto", ranks_say("GPU-of-rank-0", None, rank=1)) == "cuda:0"
    # one for both, and nobody asked for it
    assert choose_device("auto", ranks_say("GPU-0", None, rank=1)) == "cpu"
    # another machine has none
    assert choose_device("auto", ranks_say("none", None, rank=1)) == "cuda:0"


@pytest.mark.parametrize(
    ("count", "asked", "words"),
    [
        (1, "cuda", "ranks 0 and 1 ask for the same GPU"),
        (2, "cuda:0", "ranks 0 and 1 ask for the same GPU"),
        (0, "cuda", "has 0 GPUs"),
        (0, "cuda:0", "has 0 GPUs"),
        (2, "cuda:2", "has 2 GPUs"),
        (3, "cuda:2", "ranks 0 and 1 ask for the same GPU"),
    ],
)
def test_a_gpu_asked_for_by_two_processes_is_refused(
    gpus: Any, count: int, asked: str, words: str
) -> None:
    gpus(count)
    with pytest.raises(ConfigError, match=words):
        choose_device(asked, ranks_say(None, None))


@pytest.mark.parametrize("name", ["LORRY_DTYPE", "LORRY_KERNELS", "LORRY_ISA", "LORRY_PROOFS"])
def test_other_words_about_arithmetic_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in processes.ARITHMETIC_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    model, cpu = ModelConfig(name="/model", dtype="float32"), torch.device("cpu")
    kernels = {"state of the kernels": "compiled" if kernel_status().active else "torch only"}
    refuse_other_arithmetic(model, cpu, ranks_say(None, [{}, kernels]))
    with pytest.raises(ConfigError, match=f"rank 1 has another {name} than rank 0 .0 and none."):
        refuse_other_arithmetic(model, cpu, ranks_say(None, [{name: "0"}, kernels]))


def test_machines_that_choose_otherwise_are_refused() -> None:
    """bfloat16 on one kind of processor, no compiler on one machine."""
    model, cpu = ModelConfig(name="/model", dtype="auto"), torch.device("cpu")
    frames = list[Any]()
    refuse_other_arithmetic(
        model, cpu, SimpleNamespace(exchange=lambda what, mine: frames.append(mine) or [mine])  # type: ignore[arg-type]
    )  # fmt: skip
    said, chosen = frames[0]
    for name, other in (("meaning of dtype=auto", "torch.half"), ("state of the kernels", "none")):
        assert name in chosen
        with pytest.raises(ConfigError, match=f"rank 1 has another {name} than rank 0"):
            refuse_other_arithmetic(model, cpu, ranks_say(None, [said, {**chosen, name: other}]))


def test_no_gpu_anywhere_is_the_cpu(gpus: Any) -> None:
    gpus(0)
    assert choose_device("auto", ranks_say(None, None)) == "cpu"


def test_cores_are_divided_among_those_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    here = processes.platform.node()
    monkeypatch.setattr(processes, "available_cores", lambda: {0, 1, 2, 3})
    shared = [here, [0, 1, 2, 3]]
    assert share_cores(ranks_say(None)) == 4
    assert share_cores(ranks_say(None, shared)) == 2
    assert share_cores(ranks_say(None, shared, shared, shared, shared)) == 1
    # a launcher may have bound each to its own; another machine has cores of its own
    assert share_cores(ranks_say(None, [here, [4, 5]])) == 4
    assert share_cores(ranks_say(None, ["elsewhere", [0, 1, 2, 3]])) == 4


def test_fewer_rows_than_processes_are_refused(tmp_path: Path) -> None:
    run = tinyrun.described(
        tmp_path, tmp_path, tmp_path, backend={"name": "ddp", "keep_total": True}
    )
    assert isinstance(run, RunConfig)
    assert scale_batches(run, 3) == run  # three rows a step
    with pytest.raises(ConfigError, match=r"a step of 3 x 1 rows .* too few for 4 processes"):
        scale_batches(run, 4)
    several = run.backend.model_copy(update={"keep_total": False})
    alone = scale_batches(run.model_copy(update={"backend": several}), 4)
    assert alone.train.per_device_train_batch_size == 12


def test_another_base_has_another_digest(tmp_path: Path) -> None:
    """One value of a large file is not seen; other weights are, of the same names and sizes."""
    first, second = (tinyrun.model_directory(tmp_path / name) for name in ("a", "b"))
    assert sampled_digest(first) == sampled_digest(second)
    tinyrun.model_directory(tmp_path / "b", spread=0.3)
    assert sampled_digest(first) != sampled_digest(second)


@pytest.mark.parametrize(("data", "odd"), [(2, 3), (1, 1)])
def test_a_rank_with_another_adapter_is_named(
    data: int, odd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that share a model; also where no others have the same part as it has."""
    monkeypatch.setenv("LORRY_PROOFS", "0")
    folder = tinyrun.model_directory(tmp_path, num_key_value_heads=2)

    def ask(communicator: Any, ranks: Any) -> None:
        options: Any = {"dtype": "float32", "device": "cpu", "ranks": ranks}
        model: Any = load_model(folder, add_note=ignore_note, **options).model
        adapter = attach(model, LoraSpec(r=2, target_modules=["q_proj"]))
        if communicator.rank == odd:
            adapter.values[0] += 1  # of lora_A, which every rank has whole
        refuse_other_questions(communicator, model, "questions")

    with pytest.raises(ConfigError, match=f"rank {odd} has another adapter than rank 0"):
        on_mesh(data, 2, ask)


# --- two processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    folder = tmp_path_factory.mktemp("pair")
    model = tinyrun.model_directory(folder / "model")
    rows = tinyrun.write_rows(folder / "data.jsonl", tinyrun.rows(16))
    common = [f"{name}={value}" for name, value in tinyrun.DEFAULTS.items()]

    def words(name: str, *more: str, fault: bool = True) -> list[str]:
        marks = [f"{FAULT}{name}"] if fault else []
        run = [f"model={model}", f"data={rows}", f"output_dir={folder / name}", *common]
        few = ["max_steps=2", "save_strategy=no", "backend=ddp", "keep_total=true"]
        return [*marks, "sft", *run, *few, *more]

    evaluated = ("test_size=4", "eval_steps=1", "max_steps=4", "load_best_model_at_end=true")
    return run_ranked(
        folder,
        {
            # first of all: the processes do not know each other yet
            "unreadable words": words("unreadable words"),
            "few rows": words("few rows", "per_device_train_batch_size=1", fault=False),
            "push": words("push", "push_to_hub=me/people", fault=False),
            **{
                name: words(name)
                for name in (
                    "another version",
                    "another environment",
                    "other settings",
                    "other rows",
                    "other base",
                    "no shared directory",
                )
            },
            "another machine": words("another machine"),
            "asked to save": words("asked to save", "max_steps=5", "save_strategy=steps"),
            "growing losses": words(
                "growing losses",
                *evaluated,
                "early_stopping_patience=1",
                "save_strategy=steps",
                "save_steps=1",
            ),
            "no report": words("no report"),
            "background": [
                *words("background", "background=true", fault=False),
            ],
        },
    ), folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unreadable words", ["error: rank 1: run.yaml: no such file"]),
        ("few rows", ["a step of 1 x 1 rows", "too few for 2 processes"]),
        ("push", ["hf auth login"]),
        ("another version", ["rank 1 has another torch than rank 0 (9.9"]),
        ("another environment", ["rank 1 has another LORRY_DTYPE than rank 0 (float32 and none)"]),
        ("other settings", ["rank 1 has another train.learning_rate than rank 0 (0.125 and "]),
        ("other rows", ["rank 1 has another data (", "data.jsonl) than rank 0"]),
        ("other base", ["rank 1 has another base ("]),
        ("no shared directory", ["is not shared: elsewhere does not find there what rank 0"]),
        ("background", ["background=true"]),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(
    pair: tuple[Ended, Path], name: str, words: list[str]
) -> None:
    """Exit code 2 on both; rank 0 alone tells it, and nothing is left behind."""
    ended, folder = pair
    assert ended.codes[name] == [2, 2]
    (out, messages), silent = ended.printed[name]
    assert out == ""
    assert messages.count("error:") == 1
    assert all(word in messages for word in words), messages
    assert silent == ("", "")
    assert not (folder / name).exists()


def test_another_machine_with_the_same_files_is_welcome(pair: tuple[Ended, Path]) -> None:
    ended, folder = pair
    assert ended.codes["another machine"] == [0, 0]
    assert (folder / "another machine" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_asked_of_one_rank_is_saved_by_all(pair: tuple[Ended, Path]) -> None:
    """SIGUSR1 at rank 1 in the third step; the end of the run saves as it would."""
    ended, folder = pair
    assert ended.codes["asked to save"] == [0, 0]
    assert tinyrun.saved(folder / "asked to save") == [3, 5]


def test_what_is_best_and_when_to_stop_is_rank_0s_to_say(pair: tuple[Ended, Path]) -> None:
    """Rank 1's losses grow, by which it alone would stop after the second step."""
    ended, folder = pair
    assert ended.codes["growing losses"] == [0, 0]
    run = folder / "growing losses"
    losses = [line["eval_loss"] for line in tinyrun.lines(run) if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8


def test_an_error_behind_the_training_is_everybodys(pair: tuple[Ended, Path]) -> None:
    """Rank 0 alone writes the report; the others wait, and end as it does."""
    ended, folder = pair
    codes = ended.codes["no report"]
    assert codes[0] == codes[1] != 0
    assert ended.printed["no report"][0][1].count("No space left on device") == 1
    assert ended.printed["no report"][1] == ("", "")
    assert (folder / "no report" / "receipt.json").is_file()
