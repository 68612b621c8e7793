"""What several modules of this room need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorry.evaluate.metrics import bootstrap


@pytest.fixture(scope="module")
def intervals_of_any_rows() -> Iterator[None]:
    """Intervals of as few rows as a test can work out by hand, or hold to a library's; which of
    them people are shown is another matter (test_bootstrap.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "MIN_INTERVAL_ROWS", 1)
        yield
