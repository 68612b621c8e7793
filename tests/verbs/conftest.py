"""Every test of a verb lives in the same small world, on one thread."""

from __future__ import annotations

import pytest

from lorry import report
from lorry.report import html
from lorry.report.inline_svg import render_chart
from lorry.report.plots import render_png
from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import world  # noqa: F401 - the fixture


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables on lines that do not wrap."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a verb leaves to look at: reports with their charts."""
    monkeypatch.setattr(html, "render_chart", render_chart)
    monkeypatch.setattr(report, "render_png", render_png)
