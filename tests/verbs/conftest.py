"""Every test of a verb lives in the same small world, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from lorry import report
from lorry.report import html
from lorry.report.inline_svg import render_chart
from lorry.report.markup import SafeHtml
from lorry.report.plots import encode_png, render_png
from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import world  # noqa: F401 - the fixture


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables on lines that do not wrap."""
    monkeypatch.setenv("COLUMNS", "200")


@cache
def blank_picture() -> bytes:
    """The smallest PNG that matplotlib writes for us."""
    from matplotlib.figure import Figure

    return encode_png(Figure(figsize=(0.1, 0.1)))


@pytest.fixture(autouse=True, scope="module")
def without_charts() -> Iterator[None]:
    """Reports without charts: half a second of matplotlib for a run of a few milliseconds.
    tests/report draws those of every kind of run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "render_chart", lambda *_: SafeHtml('<svg class="chart"></svg>'))
        patch.setattr(report, "render_png", lambda _: blank_picture())
        yield


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a verb leaves to look at: reports with their charts."""
    monkeypatch.setattr(html, "render_chart", render_chart)
    monkeypatch.setattr(report, "render_png", render_png)
