"""How wide a console is that is no terminal, and how many of something are told."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from lorry.console import WIDE_OUTPUT, VisibleConsole
from lorry.formatting import format_count


def test_a_table_in_a_log_keeps_a_row_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("metric", "value")
    table.add_row("forget_truth_ratio " * 4, "0.1234 [0.1, 0.2] " * 3)
    out = io.StringIO()
    VisibleConsole(file=out).print(table)
    (line,) = [line for line in out.getvalue().splitlines() if "0.1234" in line]
    assert line.count("forget_truth_ratio") == 4
    assert line.count("[0.1, 0.2]") == 3
    assert VisibleConsole(file=out).width == WIDE_OUTPUT


def test_a_width_that_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert VisibleConsole(file=io.StringIO(), width=60).width == 60
    monkeypatch.setenv("COLUMNS", "70")
    assert VisibleConsole(file=io.StringIO()).width == 70


def test_one_is_no_plural() -> None:
    assert [format_count(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
