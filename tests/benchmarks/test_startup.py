"""The stopwatch of a start: stages inside others are taken out of them, and nothing is counted twice."""

from __future__ import annotations

import builtins
import importlib
import sys
import time
from pathlib import Path

import pytest
import startup


def work(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_stage_within_another_is_taken_out_of_it() -> None:
    clock = startup.Stopwatch()
    inner = clock.watch(work, "inner")
    began = time.process_time()
    with clock.stage("outer"):
        work(0.05)
        inner(0.1)
        work(0.02)
    taken = time.process_time() - began
    assert clock.seconds["outer"] == pytest.approx(0.07, abs=0.03)
    assert clock.seconds["inner"] == pytest.approx(0.1, abs=0.03)
    assert clock.seconds["outer"] + clock.seconds["inner"] == pytest.approx(taken, abs=0.01)


def test_imports_are_stages_by_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slowly_imported.py").write_text(
        "import time\nuntil = time.process_time() + 0.05\nwhile time.process_time() < until: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for module, name in ((builtins, "__import__"), (importlib, "import_module")):
        monkeypatch.setattr(module, name, getattr(module, name))  # as they are again afterwards
    clock = startup.Stopwatch()
    clock.watch_imports()
    importlib.import_module("slowly_imported")
    monkeypatch.delitem(sys.modules, "slowly_imported")
    assert clock.seconds["import: others"] >= 0.05
    importlib.import_module("json")
    assert "import: torch" not in clock.seconds


def test_every_stage_is_where_it_is_looked_for() -> None:
    for place, name, _ in startup.STAGES:
        assert callable(getattr(importlib.import_module(place), name))


def test_both_runs_are_in_the_table_stage_by_stage() -> None:
    runs = [
        {"total": 9.5, "others_cores": 0.1, "seconds": {"base: read": 8.25, "adapter": 1.25}},
        {"total": 2.0, "others_cores": 0.4, "seconds": {"adapter": 1.5, "the first step": 0.5}},
    ]
    made = startup.table(runs, 7)
    assert made["rows"] == [
        ["base: read", "8.25", "0.00"],
        ["adapter", "1.25", "1.50"],
        ["the first step", "0.00", "0.50"],
        ["all", "9.50", "2.00"],
    ]
    assert "7 rows" in made["text"]
    assert "had 0.4 cores" in made["text"]
