"""The names in a safetensors file's header, each there once: the library itself keeps the last of
two entries of one name.

    check_names(Path("model.safetensors"))

Everything else about a header (its size, offsets, overlaps and holes) is checked by
`safetensors.safe_open`, which every reader calls next. Used for base models and adapters alike, so
it knows neither torch nor any model.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lorry.disk.documents import first_repeated
from lorry.errors import ModelError

MOST_BYTES = 100_000_000  # of a header; the library's own limit


def check_names(path: Path) -> None:
    """Raise ModelError when two entries of the header have one name; OSError when the file cannot
    be read.

    A header that is no JSON at all is left to the library, which says what is wrong with it.
    """
    with path.open("rb") as file:
        head = file.read(8)
        # the format: 8 bytes of the header's length, little-endian, then the header
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(size) if size <= MOST_BYTES else b""
    repeated: list[str] = []

    # the hook sees every pair of an object as written; a dict would have dropped the first already
    def note_repeated(pairs: list[tuple[str, Any]]) -> None:
        if (name := first_repeated(key for key, _ in pairs)) is not None:
            repeated.append(name)

    try:
        json.loads(text, object_pairs_hook=note_repeated)
    except (ValueError, RecursionError):
        return
    if repeated:
        raise ModelError(
            f"{path}: its header holds {repeated[0]!r} twice, so it is ambiguous; save it again"
        )
