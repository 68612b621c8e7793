"""Where Lorry keeps what it can make again: `$LORRY_HOME`, else `$XDG_CACHE_HOME/lorry`, else
`~/.cache/lorry`.
"""

from __future__ import annotations

import os
from pathlib import Path

from lorry.errors import ConfigError


def lorry_home() -> Path:
    """The directory; it need not exist yet. Raises ConfigError where no home directory is known."""
    try:
        if chosen := os.environ.get("LORRY_HOME"):
            return Path(chosen).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache).expanduser() / "lorry"
    except RuntimeError as e:  # of a user without an entry, or of another's that does not exist
        raise ConfigError(
            "no home directory is known for Lorry's cache; set LORRY_HOME to a directory, as a whole path"
        ) from e
