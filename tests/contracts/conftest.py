"""Runs to break contracts with."""

from breaking import broken, models, start  # noqa: F401 - fixtures
