"""Reports without charts: half a second of matplotlib for a run of a few milliseconds. tests/report draws
those of every kind of run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from lorry import report
from lorry.report import html
from lorry.report.markup import SafeHtml
from lorry.report.plots import encode_png


@cache
def blank_picture() -> bytes:
    """The smallest PNG that matplotlib writes for us."""
    from matplotlib.figure import Figure

    return encode_png(Figure(figsize=(0.1, 0.1)))


@contextmanager
def without_charts() -> Iterator[None]:
    """What is reported in the block has a mark in each chart's place, and a blank picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "render_chart", lambda *_: SafeHtml('<svg class="chart"></svg>'))
        patch.setattr(report, "render_png", lambda _: blank_picture())
        yield
