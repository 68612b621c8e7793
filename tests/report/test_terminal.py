"""Tables for the terminal: complete, and unable to colour, move or ring anything a run did not
earn.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from lorry.report.table import (
    comparison_table,
    contracts_table,
    render_runs,
    sample_tables,
    summary_table,
)
from lorry.runs.read import read_readable_runs, read_run
from tests.support.runs import HOSTILE, dump, full, metrics


def printed(table: RenderableType, width: int = 220) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_in_full(tmp_path: Path) -> None:
    out = printed(render_runs([read_run(full(tmp_path / "people", text="T"))]))
    for said in (
        "people",
        "model T",
        "rank 16, alpha 32",
        "640 tokens/s",
        "3.00 GiB",
        "0.8125",
        "question T",
        "wrong T",
        "Right, T!",
    ):
        assert said in out, said
    assert out.count("✓ held") == 2
    assert "– not checked" in out


def test_several_runs(tmp_path: Path) -> None:
    out = printed(
        render_runs(read_readable_runs([full(tmp_path / "one"), full(tmp_path / "two", rank=4)])[0])
    )
    assert "What differs" in out
    assert "lora.r " in out
    assert "lora_alpha" not in out
    assert "one" in out
    assert "two" in out
    same = printed(render_runs(read_readable_runs([tmp_path / "one", full(tmp_path / "three")])[0]))
    assert "What differs" not in same


def test_a_failed_contract_stands_out(tmp_path: Path) -> None:
    assert "✗ failed" in printed(contracts_table(read_run(full(tmp_path / "r", failed=True))))


def test_a_run_of_metrics_alone_and_one_without_steps(tmp_path: Path) -> None:
    metrics(tmp_path / "r", 3)
    assert "last loss" in printed(render_runs([read_run(tmp_path / "r")]))
    metrics(tmp_path / "none", 0)
    assert printed(summary_table(read_run(tmp_path / "none"))).startswith("none")
    assert "–" in printed(
        comparison_table(read_readable_runs([tmp_path / "r", tmp_path / "none"])[0])
    )


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_cannot_reach_the_terminal(tmp_path: Path, hostile: str) -> None:
    run = read_run(full(tmp_path / "r", text=hostile))
    out = printed(render_runs([run]), width=4000)
    assert not {"\x1b", "\x07", "\x00", "\u202e", "\ud800"} & set(out)
    if "[bold red]" in hostile:
        assert "[bold red]rich[/bold red]" in out
    assert "\x1b" not in printed(
        render_runs(
            read_readable_runs([tmp_path / "r", full(tmp_path / "s", text=hostile, rank=2)])[0]
        )
    )


def test_long_groups_are_cut_and_say_so(tmp_path: Path) -> None:
    rows = [
        {"group": "g", "prompt": f"p{i}.", "reference": None, "before": None, "after": "a"}
        for i in range(20)
    ]
    dump(tmp_path / "samples.json", rows)
    (table,) = sample_tables(read_run(tmp_path), most=5)
    out = printed(table)
    assert "g (the first 5 of 20)" in out
    assert "p4." in out
    assert "p5." not in out
