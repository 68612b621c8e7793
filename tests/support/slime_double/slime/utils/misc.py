"""slime's own way from a dotted path to a function."""

from __future__ import annotations

import importlib
from typing import Any


def load_function(path: str) -> Any:
    """`package.module.function`, cut at its last dot: `file.py:function` is no module."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
