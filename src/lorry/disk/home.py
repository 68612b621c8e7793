"""Where Lorry keeps what it can make again: `$LORRY_HOME`, else `$XDG_CACHE_HOME/lorry`, else
`~/.cache/lorry`.
"""

from __future__ import annotations

import os
from pathlib import Path


def lorry_home() -> Path:
    """The directory; it need not exist yet."""
    if chosen := os.environ.get("LORRY_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "lorry"
