"""Runs to break contracts with."""

from tests.support.breaking import broken, models, start  # noqa: F401 - fixtures
