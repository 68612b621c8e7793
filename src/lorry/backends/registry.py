"""Backends by name: `backend.name` of a run chooses one. A new one is a module beside this one (or in
`distributed/`) and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from lorry.backends.distributed.ddp import DataParallelBackend
from lorry.backends.local import LocalBackend
from lorry.backends.protocol import Backend

# (model, names that train, {name: OptimSettings}) -> the backend
BACKENDS: dict[str, Callable[..., Backend]] = {"single": LocalBackend, "ddp": DataParallelBackend}
