"""The report of a mixture: a confusion matrix and heat maps of what metrics.jsonl says of its router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorry.report.router_sections import read_router_shares, router_section
from lorry.runs.read import read_run
from tests.support.runs import full

LOAD = {
    "a": {"one": [0.9, 0.7], "two": [0.1, 0.3]},
    "b": {"one": [0.2, 0.0], "two": [0.8, 1.0]},
}


def with_router(folder: Path, said: Any) -> Path:
    run = full(folder)
    line = {"step": 10_000, "loss": 1.0, "learning_rate": 1e-3, "tokens": 1, "seconds": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "router": said}) + "\n")
    return run


def test_what_a_page_shows_of_a_router(tmp_path: Path) -> None:
    run = read_run(with_router(tmp_path / "run", {"load": LOAD, "gate": LOAD, "entropy": {}}))
    shares = read_router_shares(run, "load")
    assert shares is not None
    assert (shares.step, shares.experts) == (10_000, ["one", "two"])
    assert shares.mean("a", "one") == pytest.approx(0.8)
    page = router_section([run])
    assert page is not None
    # the confusion matrix, then a row for each layer of each domain
    assert (
        '<td>a</td><td class="number" style="background: rgba(58, 125, 204, 0.80)">0.80</td>'
        in page
    )
    assert page.count("<summary>a, by layer</summary>") == 2
    assert page.count("<td>1</td>") == 4


@pytest.mark.parametrize(
    "said",
    [
        3,
        {},
        {"load": []},
        {"load": {"a": 1}},
        {"load": {"a": {"one": ["<b>"]}}},
        {"load": {"a": {"one": []}}},
        {"load": {"a": {}}},
        {"load": {"a": {"one": [True]}}},
    ],
)
def test_lines_that_say_anything_else_have_no_section(tmp_path: Path, said: Any) -> None:
    assert router_section([read_run(with_router(tmp_path / "run", said))]) is None


def test_names_of_strangers_are_text(tmp_path: Path) -> None:
    said = {"load": {"<script>": {"<i>": [0.5, 0.25]}}}
    page = router_section([read_run(with_router(tmp_path / "run", said))])
    assert page is not None
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
