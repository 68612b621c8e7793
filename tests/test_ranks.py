"""What a launcher says, and what a command makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorry import cli
from lorry.backends.distributed import launch
from lorry.errors import ConfigError
from lorry.ranks import (
    LaunchedProcess,
    is_main_process,
    launched_process,
    rank_label,
    workers_to_start,
)

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> object:
    """Sets exactly these variables."""

    def say(**values: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    say()
    return say


def settings(name: str = "ddp", processes: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name, processes=processes)


def test_without_a_launcher_there_is_one_process(launcher: object) -> None:
    assert launched_process() is None
    assert is_main_process()
    assert rank_label() == ""
    assert workers_to_start(settings()) == workers_to_start(settings(processes=1)) == 0
    assert workers_to_start(settings(processes=4)) == 4


def test_what_torchrun_says(launcher: object) -> None:
    """Two machines of two processes."""
    launcher(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", **WHERE)  # type: ignore[operator]
    assert launched_process() == LaunchedProcess(3, 4, 1, 2)
    assert not is_main_process()
    assert rank_label() == "rank 3: "
    # they are there already
    assert workers_to_start(settings()) == workers_to_start(settings(processes=4)) == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", **WHERE}, "RANK=None"),
        ({"RANK": "2", "WORLD_SIZE": "2", **WHERE}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "two", **WHERE}, "WORLD_SIZE=two"),
        ({"RANK": "0", "WORLD_SIZE": "0", **WHERE}, "WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3", **WHERE}, "LOCAL_WORLD_SIZE=3"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    launcher: object, values: dict[str, str], words: str
) -> None:
    launcher(**values)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=words):
        launched_process()


def test_settings_and_launcher_have_to_agree(launcher: object) -> None:
    launcher(RANK="0", WORLD_SIZE="2", **WHERE)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"started 2 \(WORLD_SIZE\)"):
        workers_to_start(settings(processes=3))
    with pytest.raises(ConfigError, match="add backend=ddp"):
        workers_to_start(settings("single"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["merge", "/nowhere"], "lorry merge runs in one process"),
        (["compare", "data=/nowhere.jsonl"], "lorry compare runs in one process"),
        (["sft", "data=/nowhere.jsonl", "backend=ddp", "background=true"], "background=true"),
    ],
)
def test_what_copies_would_spoil_is_refused(
    launcher: object, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    """Under torchrun each process would write the same directory, or leave a run alone in it."""
    launcher(RANK="0", WORLD_SIZE="2", **WHERE)  # type: ignore[operator]
    assert cli.main(words) == 2
    assert told in capfd.readouterr().err


def test_a_command_that_starts_workers_leaves_the_notes_to_them(
    launcher: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started = list[tuple[list[str], int]]()
    monkeypatch.setattr(launch, "run_workers", lambda *given: started.append(given) or 0)
    words = ["sft", "data=/nowhere.jsonl", "lora_r=4", "fp16=true", "backend=ddp"]
    assert cli.main([*words, "processes=2"]) == 0
    assert started == [([*words, "processes=2"], 2)]
    assert capfd.readouterr() == ("", "")
