"""losses.json by hand: the lists a plot needs, from lines as a run writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorry.errors import DataError
from lorry.runs.losses import collect_losses


def test_one_adapter(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 3.5, "tokens": 9}',
        '{"step": 2, "loss": 2.25}',
        '{"step": 2, "eval_loss": 2.5, "eval_accuracy": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([*lines, '{"step": 4, "eval_loss": "Infinity"}', '{"step": 5, "lo'])
    )
    found = collect_losses(tmp_path)
    assert found == {
        "step": [1, 2],
        "loss": [3.5, 2.25],
        "eval_step": [2, 4],
        "eval_loss": [2.5, None],
    }
    json.dumps(found, allow_nan=False)


def test_several_adapters(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "adapters": {"a": {"loss": 2.0}, "b": {"loss": 4.0}}}\n'
        '{"step": 2, "loss": 1.0, "adapters": {"b": {"loss": 1.0}}}\n'
        '{"step": 2, "eval_loss": 5.0, "adapters": {"b": {"eval_loss": 5.0}}}\n'
    )
    found = collect_losses(tmp_path)
    assert (found["step"], found["loss"], found["eval_loss"]) == ([1, 2], [3.0, 1.0], [5.0])
    assert found["adapters"] == {
        "a": {"step": [1], "loss": [2.0], "eval_step": [], "eval_loss": []},
        "b": {"step": [1, 2], "loss": [4.0, 1.0], "eval_step": [2], "eval_loss": [5.0]},
    }


def test_nothing_logged_and_a_damaged_line(tmp_path: Path) -> None:
    assert collect_losses(tmp_path) == {"step": [], "loss": [], "eval_step": [], "eval_loss": []}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not JSON"):
        collect_losses(tmp_path)
