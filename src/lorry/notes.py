"""Notes: what a person should know of their settings, their model or their data that is no error.

Whoever finds something worth a note calls the ``add_note`` that it was given, with one sentence;
whoever asked decides whether to show it, to log it or to collect it (``notes.append``). No
function writes into a list of its caller's.
"""

from __future__ import annotations

from typing import Protocol


class NoteCallback(Protocol):
    """Where a note goes: `list.append`, `logger.warning`, a listener's `note`."""

    def __call__(self, text: str, /) -> object: ...


def ignore_note(text: str) -> None:
    """A `NoteCallback` for what is opened a second time: its notes were shown the first time."""
