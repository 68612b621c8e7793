"""A policy for every test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.rollout_policy import Policy, small_policy


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return small_policy(tmp_path)
