"""A tokenizer with more tokens than a model has embeddings for: one line with the row and the
token, in every verb.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lorry
from lorry.errors import DataError
from tests.support.verbworld import World, model_directory, tokenizer, write_rows
from tests.support.verbworld import lorry as command

ROWS = [
    {"question": "Who steers?", "answer": "Oda."},
    {"question": "When?", "answer": "<tool>timetable</tool> At nine."},
]


@pytest.fixture(scope="module")
def larger(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The world's base beside a tokenizer with one more token, and rows of which the second holds
    it.
    """
    folder = tmp_path_factory.mktemp("larger")
    base = Path(shutil.copytree(world.base, folder / "base"))
    words = tokenizer()
    words.add_tokens(["<tool>"])
    words.save_pretrained(base)
    return base, write_rows(folder / "rows.jsonl", ROWS)


@pytest.mark.parametrize(
    "argv",
    [
        ["sft", "model={base}", "data={rows}", "max_steps=1", "output_dir={out}"],
        ["sft", "model={base}", "data={known}", "eval={rows}", "max_steps=1", "output_dir={out}"],
        [
            "distill",
            "model={base}",
            "teacher={base}",
            "data={rows}",
            "max_steps=1",
            "output_dir={out}",
        ],
        [
            "distill",
            "model={base}",
            "teacher={twin}",
            "data={rows}",
            "max_steps=1",
            "output_dir={out}",
        ],
        ["eval", "{base}", "data={rows}"],
    ],
    ids=["sft", "held out", "distill, shared", "distill, another teacher", "eval"],
)
def test_a_row_with_such_a_token_is_named(
    argv: list[str],
    larger: tuple[Path, Path],
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, rows = larger
    twin = shutil.copytree(base, tmp_path / "twin")
    words = {"base": base, "twin": twin, "rows": rows, "out": tmp_path / "run", "known": world.rows}
    assert command(*(word.format(**words) for word in argv), "dtype=float32", "threads=1") == 3
    err = capsys.readouterr().err
    assert f"{rows}:2: the token '<tool>' (id " in err
    assert "is beyond the model's embedding table" in err
    assert "Traceback" not in err


def test_a_teacher_with_fewer_embeddings_than_the_student(
    larger: tuple[Path, Path], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, rows = larger
    fewer = json.loads((base / "config.json").read_text())["vocab_size"]
    student = model_directory(tmp_path / "student", vocab_size=fewer + 1)
    shutil.copytree(
        base,
        student,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("config.json", "*.safetensors"),
    )
    settings = (f"model={student}", f"data={rows}", "max_steps=1", "dtype=float32", "threads=1")
    # the student itself knows the token
    assert command("sft", *settings, f"output_dir={tmp_path / 'alone'}") == 0
    capsys.readouterr()
    assert command("distill", *settings, f"teacher={base}", f"output_dir={tmp_path / 'run'}") == 3
    err = capsys.readouterr().err
    assert f"{rows}:2: the token '<tool>' (id " in err
    assert f"of {fewer} rows" in err


def test_generating_from_such_a_token_is_refused(larger: tuple[Path, Path]) -> None:
    model, words = lorry.load(larger[0], dtype="float32")
    for chat in (True, False):
        with pytest.raises(
            DataError,
            match=r"the token '<tool>' \(id \d+\) is beyond the model's embedding table of \d+ rows",
        ):
            lorry.generate(model, words, "What is <tool>?", chat=chat, max_new_tokens=2)
    assert isinstance(lorry.generate(model, words, "Who steers?", max_new_tokens=2), str)
