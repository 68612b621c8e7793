"""A receipt is read in one place: what is there has the type that a run writes, in every reader of
a run directory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorry.disk import receipt
from lorry.errors import RunFilesError
from lorry.runs.read import read_run
from lorry.train.card.card import render_run_card
from lorry.verbs import doctor, eval

GOOD: dict[str, Any] = {
    "data": {"source": "a.jsonl", "rows": 3, "left_out": {"empty answer": 1}},
    "base": {"name": "a", "family": None, "dtype": "float32", "sha256": "ab"},
    "code": {"sha256": "ab", "lorry": "1"},
    "environment": {"python": "3"},
    "seed": 3,
    "adapters": {"default": "ab"},
    "trainable_parameters": 10,
    "total_parameters": 100,
    "saved_bytes": 40,
}
WRONG = (None, [], 3, "x", True)


def receipts_that_no_run_writes() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [
        ("expected a JSON object", value) for value in ([], None, 3, "x")
    ]
    for key in GOOD:
        right = (int, float) if isinstance(GOOD[key], int) else dict
        wrong = [
            value
            for value in (*WRONG, {"a": []})
            if not isinstance(value, right) or isinstance(value, bool)
        ]
        found += [
            (f"'{key}'", {**GOOD, key: value})
            for value in wrong
            if value != {"a": []} or key != "seed"
        ]
    for part in ("base", "data", "code"):
        found += [
            (f"'{part}.sha256'", {**GOOD, part: {**GOOD[part], "sha256": value}})
            for value in ([], 3, True)
        ]
    found += [
        ("'base.dtype'", {**GOOD, "base": {"dtype": []}}),
        ("'adapters.a'", {**GOOD, "adapters": {"a": None}}),
    ]
    found += [("'data.left_out'", {**GOOD, "data": {"left_out": value}}) for value in WRONG]
    found += [
        ("'data.job.left_out'", {**GOOD, "data": {"job": {"left_out": []}}}),
        ("'seed'", {**GOOD, "seed": {"job": "x"}}),
    ]
    return found


@pytest.mark.parametrize(
    ("what", "content"), receipts_that_no_run_writes(), ids=lambda value: json.dumps(value)[:40]
)
def test_a_part_of_another_type_is_named_by_every_reader(
    tmp_path: Path, what: str, content: Any
) -> None:
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(content))
    found: Any = SimpleNamespace(source={"adapter": str(tmp_path), "dtype": "float32"})
    for read in (
        lambda: receipt.read(path),
        lambda: read_run(tmp_path),
        lambda: render_run_card(tmp_path),
        lambda: doctor.describe_decoder(read_run(tmp_path)),
        lambda: eval.note_other_dtype(found),
    ):
        with pytest.raises(RunFilesError, match=re.escape(str(path)) + ".*" + re.escape(what)):
            read()


@pytest.mark.parametrize(
    "content",
    [{}, GOOD, {**GOOD, "seed": {"a": 1}, "data": {"source": {"source": "a"}}, "more": [1]}],
)
def test_what_runs_write_is_read_as_it_is(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "receipt.json"
    assert receipt.read(path) is None
    path.write_text(json.dumps(content))
    assert receipt.read(path) == content == read_run(tmp_path).receipt


def test_a_run_in_another_number_format_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Any = SimpleNamespace(source={"adapter": str(tmp_path), "dtype": "bfloat16"})
    for content, said in ((GOOD, "note: trained in float32, evaluated in bfloat16"), ({}, "")):
        (tmp_path / "receipt.json").write_text(json.dumps(content))
        eval.note_other_dtype(found)
        assert said == capsys.readouterr().err[: len(said) or None]
