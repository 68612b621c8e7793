"""Where Lorry keeps what it can make again: `$LORRY_HOME`, else `$XDG_CACHE_HOME/lorry`, else
`~/.cache/lorry`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorry.errors import ConfigError

# A converted model's directory (models/gguf/embedded.py): what it is called, the digest of the file,
# and of the converter where one is named.
_CONVERTED = re.compile(r"(.+?)-[0-9a-f]{12}(?:-[0-9a-f]{8})?")


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


def name_of_converted(directory: str) -> str | None:
    """What the model of a converted directory is called, by the directory's name; None where it is none."""
    found = _CONVERTED.fullmatch(Path(directory).name)
    return None if found is None else found[1]
