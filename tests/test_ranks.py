"""What a launcher says, and what a command makes of it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

import lorry
from lorry import cli
from lorry.backends.distributed import communicator, launch
from lorry.errors import ConfigError
from lorry.ranks import (
    LaunchedProcess,
    Mesh,
    is_main_process,
    launched_process,
    mesh_of,
    note_of_one_process,
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
    return SimpleNamespace(name=name, processes=processes, tensor_parallel=1, replicas=1)


def test_without_a_launcher_there_is_one_process(launcher: object) -> None:
    assert launched_process() is None
    assert is_main_process()
    assert rank_label() == ""
    assert workers_to_start(settings()) == workers_to_start(settings(processes=1)) == 0
    assert workers_to_start(settings(processes=4)) == 4
    # a backend of several processes, and nobody has said how many
    for name in ("ddp", "fsdp"):
        note = note_of_one_process(settings(name)) or ""
        assert note.startswith(f"backend={name} in one process")
        assert "backend.processes=N" in note
    assert note_of_one_process(settings("ddp", processes=1)) is None
    assert note_of_one_process(settings("single")) is None


def test_what_torchrun_says(launcher: object) -> None:
    """Two machines of two processes."""
    launcher(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", **WHERE)  # type: ignore[operator]
    assert launched_process() == LaunchedProcess(3, 4, 1, 2)
    assert not is_main_process()
    assert rank_label() == "rank 3: "
    assert note_of_one_process(settings("ddp")) is None
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
        (["compare", "/nowhere"], "start it alone, with backend.processes=N"),
        (["sft", "data=/nowhere.jsonl", "backend=ddp", "background=true"], "background=true"),
    ],
)
def test_what_copies_would_spoil_is_refused(
    launcher: object,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    """Under torchrun each process would write the same directory, or leave a run alone in it."""
    # nobody else is there to hear of it
    monkeypatch.setattr(communicator, "EARLY_SECONDS", 0.1)
    launcher(RANK="0", WORLD_SIZE="2", **WHERE)  # type: ignore[operator]
    assert cli.main(words) == 2
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "/x", "backend=ddp"],
        ["merge", "/x", "backend.processes=2"],
        ["unmerge", "/x", "backend=ddp"],
        ["export", "/x", "to=hf", "backend.timeout=5"],
        ["push", "/x", "backend=ddp"],
        ["report", "/x", "backend.keep_total=true"],
        ["runs", "backend=ddp"],
        ["doctor", "backend.tensor_parallel=2"],
        ["demo", "backend=ddp"],
        ["unlearn-alternates", "/x", "backend.name=ddp"],
    ],
)
def test_a_verb_of_one_process_says_so_by_name(
    launcher: object, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli.main(words) == 2
    told = capfd.readouterr().err
    assert told.startswith(
        f"error: {words[-1]}: lorry {words[0]} runs in one process: leave it out"
    )
    assert told.count("error:") == 1


def test_finished_runs_are_compared_in_one_process(
    launcher: object, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "/x", "backend=ddp", "processes=2"]) == 2
    assert "finished runs are compared by their files" in capfd.readouterr().err


def test_one_place_makes_backends_and_scorers_of_several_processes() -> None:
    """Whatever trains or asks a model takes them from the registry, so that a backend is opened by all
    verbs that can be asked for it."""
    made = ("LocalBackend(", "DataParallelBackend(", "SharedModelScorer(")
    source = Path(lorry.__file__).parent
    places = {
        (path.relative_to(source).as_posix(), name)
        for path in sorted(source.rglob("*.py"))
        for name in made
        if name in _code_of(path).replace(f"class {name}", "")
    }
    assert places == {("backends/registry.py", "SharedModelScorer(")}
    # evaluations: theirs are those of all processes
    scorers = [p.name for p in (source / "evaluate").rglob("*.py") if "ModelScorer(" in _code_of(p)]
    assert scorers == []


def _code_of(path: Path) -> str:
    """A module's source without its docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.unparse(tree)


def test_a_command_that_starts_workers_leaves_the_notes_to_them(
    launcher: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started = list[tuple[list[str], int]]()
    monkeypatch.setattr(launch, "run_workers", lambda *given: started.append(given) or 0)
    words = ["sft", "data=/nowhere.jsonl", "lora_r=4", "fp16=true", "backend=ddp"]
    assert cli.main([*words, "processes=2"]) == 0
    assert started == [([*words, "processes=2"], 2)]
    assert capfd.readouterr() == ("", "")


def test_a_mesh_is_every_rank_once() -> None:
    """Two replicas of two shards of two tensor ranks, which are neighbours."""
    meshes = [Mesh(rank, 2, 2, 2) for rank in range(8)]
    assert {mesh.size for mesh in meshes} == {8}
    assert [mesh.data_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [mesh.tensor_rank for mesh in meshes] == [0, 1] * 4
    assert [meshes[0].data_group(t) for t in (0, 1)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [meshes[0].tensor_group(d) for d in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_mesh_of_a_launcher() -> None:
    two_machines = LaunchedProcess(3, 4, 1, 2)
    assert mesh_of(settings(), two_machines) == Mesh(3, replicas=4)
    wide = SimpleNamespace(name="ddp", processes=None, tensor_parallel=2, replicas=1)
    assert mesh_of(wide, two_machines) == Mesh(3, replicas=2, tensor_size=2)
    with pytest.raises(ConfigError, match="tensor_parallel=2 does not divide 3 processes"):
        mesh_of(wide, LaunchedProcess(0, 3, 0, 3))
    with pytest.raises(ConfigError, match="stays inside one"):
        mesh_of(wide, LaunchedProcess(0, 4, 0, 1))


def test_the_base_is_cut_over_the_ranks_of_a_replica() -> None:
    fsdp = SimpleNamespace(name="fsdp", processes=None, tensor_parallel=2, replicas=2)
    assert mesh_of(fsdp, LaunchedProcess(5, 8, 1, 4)) == Mesh(5, 2, 2, 2)
    with pytest.raises(
        ConfigError, match="replicas=2 does not divide 6 processes / tensor_parallel=2"
    ):
        mesh_of(fsdp, LaunchedProcess(0, 6, 0, 6))
    fsdp.tensor_parallel = 1
    with pytest.raises(ConfigError, match=r"replicas=2 does not divide 3 processes$"):
        mesh_of(fsdp, LaunchedProcess(0, 3, 0, 3))
