"""Where the shared data sets and the small trained model lie, if this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_shared_data() -> Path | None:
    """LORRY_DATA, or ../shared/data beside the checkout, or None on a stranger's machine. Absolute: tests
    link to what lies there, and start processes elsewhere."""
    path = Path(os.environ.get("LORRY_DATA", ROOT.parent / "shared" / "data")).absolute()
    return path if path.is_dir() else None


def find_stories() -> Path | None:
    """The directory of stories260K, if it lies there."""
    data = find_shared_data()
    return data / "models" / "stories260K" / "hf" if data else None
