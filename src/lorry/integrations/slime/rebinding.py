"""Functions of slime's replaced by ours in this process, by name, and told.

slime imports many of them by value, so each module that holds one is named; ours keeps the original,
and a second replacement starts from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorry.errors import ConfigError

_ORIGINAL = "lorry_original"


@dataclass
class Rebinding:
    """What was put in slime's place. ``names``: dotted, in order."""

    names: list[str] = field(default_factory=list)

    def put(
        self, owner: Any, name: str, replace: Callable[[Any], Any], *, static: bool = False
    ) -> None:
        """Put ``replace(original)`` where ``owner`` (a module or class) has ``name``; ``static``: a
        static method. Raises ConfigError where it has none."""
        original = original_of(owner, name)
        replacement = replace(original)
        setattr(replacement, _ORIGINAL, original)
        setattr(owner, name, staticmethod(replacement) if static else replacement)
        module = "" if not isinstance(owner, type) else f"{owner.__module__}."
        where = f"{module}{owner.__qualname__ if isinstance(owner, type) else owner.__name__}"
        self.names.append(f"{where}.{name}")


def original_of(owner: Any, name: str) -> Any:
    """slime's own, whatever stands in its place now. Raises ConfigError where it has none."""
    try:
        current = getattr(owner, name)
    except AttributeError:
        raise ConfigError(
            f"this slime's {owner.__name__} has no {name}, which the adapters' sync stands in for; "
            "docs/slime.md names the version that was tested"
        ) from None
    return getattr(current, _ORIGINAL, current)
