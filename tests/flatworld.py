"""The 150-line twin as a module, for the tests that hold it to others and others to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FLAT = Path(__file__).resolve().parent.parent / "examples" / "flat.py"


@pytest.fixture(scope="module")
def flat() -> Any:
    spec = importlib.util.spec_from_file_location("flat", FLAT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
