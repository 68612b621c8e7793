"""Run directories that are damaged or a stranger's: listed as damaged with the place, and they hide
no other run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lorry.cli import main
from lorry.errors import DataError
from lorry.report import write_report
from lorry.report.compare import compare_runs_table, comparison_row
from lorry.report.html import render_page
from lorry.report.plots import render_png
from lorry.report.table import render_runs
from lorry.runs import status
from lorry.runs.read import RUN_FILES, read_readable_runs, read_run
from lorry.runs.series import LONGEST_NAME, MOST_ADAPTERS, MOST_NAMES, read_metrics
from tests.support.runs import dump, full

YAML_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40)
)
SOUND = {
    "pid": 1,
    "born": 0.0,
    "host": "h",
    "folder": [1, 2],
    "command": [],
    "started": "2026-01-01T00:00:00+00:00",
}
DAMAGE = [
    ("run.yaml", YAML_BOMB, "its aliases expand to more than"),
    ("run.yaml", "train: &a {x: *a}", "an alias is inside the value that it names"),
    ("run.yaml", "seed: " + "9" * 5000, r"run\.yaml:1: .* too large for an integer"),
    ("run.yaml", "a: 1\na: 2", "given twice"),
    (
        "receipt.json",
        '{"trainable_parameters": ' + "9" * 5000 + "}",
        r"receipt\.json:1: .* too large",
    ),
    ("contracts.json", '[{"id": ' + "9" * 5000 + "}]", r"contracts\.json:1: .* too large"),
    ("contracts.json", json.dumps([{"id": 1, "name": "n", "status": "held"}] * 1001), "1001 items"),
    (
        "samples.json",
        '[{"prompt": "p", "tokens": [{"text": "a", "weight": ' + "1" * 400 + "}]}]",
        "too large for an integer",
    ),
    ("samples.json", '[{"prompt": "\\ud800"}]', "half a character"),
    ("evaluation.json", '[{"name": "e", "metrics": {"m": 1e999}}]', "too large for a float"),
    (
        "evaluation.json",
        json.dumps([{"name": "e", "metrics": {str(i): 1 for i in range(2001)}}]),
        "2001 metrics",
    ),
    ("process.json", "[" * 100_000, "nested too deeply"),
    ("process.json", json.dumps({**SOUND, "host": ["h"]}), "not written by a run"),
    (
        "process.json",
        json.dumps({**SOUND, "ended": {"at": SOUND["started"], "exit_code": 1, "reason": 5}}),
        "not written by a run",
    ),
    ("metrics.jsonl", '{"step": 1, "step": 2}\n', "given twice"),
]


def shown(*paths: Path) -> str:
    """Everything that any verb shows of runs, as text."""
    runs, damaged = read_readable_runs(paths)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(
            render_runs(runs, damaged=damaged),
            compare_runs_table([comparison_row(run) for run in runs]),
        )
    return captured.get() + render_page(runs, damaged)


@pytest.mark.parametrize(("file", "content", "why"), DAMAGE, ids=lambda value: str(value)[:20])
def test_a_damaged_run_is_listed_and_hides_no_other(
    tmp_path: Path, file: str, content: str, why: str
) -> None:
    good, bad = full(tmp_path / "good"), full(tmp_path / "bad")
    (bad / file).write_text(content)
    begun = time.process_time()
    with pytest.raises(DataError, match=why):
        read_run(bad)
    listed = {state.name: state for state in status.list_run_states(tmp_path)}
    assert listed["good"].state != "unreadable"
    assert listed["bad"].state == "unreadable"
    assert str(bad / file) in listed["bad"].detail
    assert "bad is damaged and not shown" in shown(good, bad)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("kind", ["fifo", "directory"])
@pytest.mark.parametrize("file", RUN_FILES)
def test_something_else_in_a_files_place(tmp_path: Path, file: str, kind: str) -> None:
    good, bad = full(tmp_path / "good"), full(tmp_path / "bad")
    (bad / file).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(bad / file)
    else:
        (bad / file).mkdir()
    assert {
        state.name: state.state == "unreadable" for state in status.list_run_states(tmp_path)
    } == {"good": False, "bad": True}
    assert f"{file} is not a regular file" in shown(good, bad)


def test_verbs_say_it_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = full(tmp_path / "good"), full(tmp_path / "bad")
    (bad / "run.yaml").write_text("train: &a {x: *a}")
    for arguments, code in (
        (["runs", str(tmp_path)], 0), (["report", str(good), str(bad)], 3), (["report", str(bad)], 3),
        (["compare", str(good), str(bad)], 3), (["compare", str(good), str(bad), "format=json"], 3), (["doctor", str(bad)], 3),
    ):  # fmt: skip
        assert main(arguments) == code, arguments
        said = capfd.readouterr()
        assert "an alias is inside the value that it names" in " ".join(
            (said.out + said.err).split()
        ), arguments
        assert "Traceback" not in said.err
    assert (tmp_path / "comparison.html").is_file()


def test_a_path_that_is_no_run_is_a_mistake_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        write_report([full(tmp_path / "good"), tmp_path / "typo"])


def test_metrics_with_very_many_or_very_long_names(tmp_path: Path) -> None:
    """Minutes before; what is left out is counted and said."""
    folder = full(tmp_path / "r")
    lines: list[dict[str, Any]] = [
        {"step": i, "loss": 1.0, **{f"m{j}": 1.0 for j in range(3000)}} for i in range(1, 4)
    ]
    lines.append(
        {
            "step": 4,
            "loss": 1.0,
            "adapters": {f"a{j}": {"loss": 1.0} for j in range(2000)},
            "n" * 100_000: 1.0,
        }
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_metrics(folder / "metrics.jsonl")
    assert len(log.names()) < MOST_NAMES  # step and adapters are names as well
    assert len(log.adapters()) == MOST_ADAPTERS
    assert max(map(len, log.names())) <= LONGEST_NAME
    assert [
        f"{3000 + 4 - MOST_NAMES} values" in log.notes[0],
        f"{2000 - MOST_ADAPTERS} adapters" in log.notes[1],
    ] == [True, True]
    begun = time.process_time()
    text = render_page([read_run(folder)])
    assert "Not drawn: " in text
    assert "values are not shown" in text
    assert time.process_time() - begun < 20
    assert render_png([read_run(folder)]).startswith(b"\x89PNG")


def test_two_hundred_thousand_equal_prompts_take_no_squared_time(tmp_path: Path) -> None:
    folder = full(tmp_path / "r")
    dump(folder / "samples.json", [{"group": "g", "prompt": "p", "after": "x"}] * 50_000)
    begun = time.process_time()
    assert "(the first 60 of 50000)" in render_page([read_run(folder)])
    assert time.process_time() - begun < 20


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**62,
    1e308,
    -1e-308,
    "",
    "x",
    "\x1b]0;t\x07",
    "9" * 400,
    [],
    {},
    [[]],
    {"a": {}},
    ["a", None],
]


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place of it exchanged, removed or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        if chance.random() < 0.2:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutated(value[at], chance), *value[at + chance.choice((0, 1, 1)) :]]
    return chance.choice(VALUES)


@pytest.mark.parametrize(
    "file", [*(name for name in RUN_FILES if name.endswith(".json")), "metrics.jsonl", "run.yaml"]
)
def test_fields_of_any_kind_are_shown_or_refused(tmp_path: Path, file: str) -> None:
    """Mutations by a kept seed: a run is read and everything of it shown, or it is a DataError;
    nothing else is raised.
    """
    whole = full(tmp_path / "whole")
    if file != "metrics.jsonl":  # one chart is enough: drawing takes most of the time
        (whole / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    if file == "process.json":
        (whole / file).write_text(
            json.dumps(
                {**SOUND, "begun": SOUND["started"], "done": 1, "total_steps": 9, "ended": None}
            )
        )
    for seed in range(10):
        chance = random.Random(f"{file} {seed}")
        folder = tmp_path / "r"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        text = (whole / file).read_text()
        if file == "metrics.jsonl":
            lines = text.splitlines()[:6]
            at = chance.randrange(len(lines))
            made = "\n".join(
                [*lines[:at], json.dumps(mutated(json.loads(lines[at]), chance)), *lines[at + 1 :]]
            )
        elif file == "run.yaml":
            made = yaml.safe_dump(mutated(yaml.safe_load(text), chance))
        else:
            made = json.dumps(mutated(json.loads(text), chance))
        (folder / file).write_text(made)
        with contextlib.suppress(DataError):
            shown(folder)
        status.list_run_states(folder)
