"""Imports of a command, whose modules stay until its process ends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """Import in this block without collecting garbage, and leave what is there behind it out of later
    collections: torch and Lorry make 200,000 objects that stay, and looking through them again and
    again while they are made took a seventh of a run's start. For processes of Lorry's own: in another
    its garbage would stay as well.
    """
    collecting, imported = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > imported:
            gc.freeze()
        if collecting:
            gc.enable()
