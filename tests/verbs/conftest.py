"""Every test of a verb lives in the same small world, on one thread."""

from __future__ import annotations

import pytest

from tests.support.tiny import one_thread  # noqa: F401 - an autouse fixture
from tests.support.verbworld import world  # noqa: F401 - the fixture


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables on lines that do not wrap."""
    monkeypatch.setenv("COLUMNS", "200")
