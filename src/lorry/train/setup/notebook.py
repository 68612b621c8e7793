"""What a person should know of a run, collected while it is set up and told to who listens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorry.train.monitoring.events import TrainingListener


@dataclass
class Notebook:
    """What a person should know of a run, and who hears it. Notes of the set-up are collected by
    `add` and passed on by `tell`, each once.
    """

    listeners: Sequence[TrainingListener] = ()
    # a dict for its order: {note: whether the listeners have heard it}
    notes: dict[str, bool] = field(default_factory=dict)

    def add(self, *texts: str) -> None:
        """Collect notes for the next `tell`."""
        for text in texts:
            self.notes.setdefault(text, False)

    def tell(self, *texts: str | None) -> None:
        """Pass on the notes that have come since the last time, then these."""
        self.add(*(text for text in texts if text))
        for text, heard in self.notes.items():
            if not heard:
                self.notes[text] = True
                self.repeat(text)

    def repeat(self, text: str) -> None:
        """Pass on something that may be true again."""
        for listener in self.listeners:
            listener.note(text)
