"""rich's console for text that is not Lorry's own: nothing of what is printed can move the cursor
or speak to the terminal.

Colours and progress bars are rich's own segments and pass; in every text the characters that
`make_visible` knows are replaced. What is no terminal (a log, a pipe) is wide: rich takes 80 columns
for it, in which a table's cells wrap, and grep wants a row in one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from lorry.visible import make_visible

WIDE_OUTPUT = 200  # columns of what is no terminal


class VisibleConsole(rich.console.Console):
    """`rich.console.Console`, all of whose texts pass `make_visible`. Without a ``width`` it is as
    wide as the terminal, as COLUMNS says, or `WIDE_OUTPUT`.
    """

    def __init__(self, *, width: int | None = None, **options: Any) -> None:
        super().__init__(width=width, **options)
        if width is None and not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = WIDE_OUTPUT

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of a renderable: rich calls this for all it prints, and for the parts of
        tables and bars.
        """
        for segment in super().render(renderable, options):
            # control segments are rich's own cursor moves; text never becomes one
            yield segment if segment.control else Segment(make_visible(segment.text), segment.style)
