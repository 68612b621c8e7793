"""rich's console for text that is not Lorry's own: nothing of what is printed can move the cursor
or speak to the terminal.

Colours and progress bars are rich's own segments and pass; in every text the characters that
`make_visible` knows are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from lorry.visible import make_visible


class VisibleConsole(rich.console.Console):
    """`rich.console.Console`, all of whose texts pass `make_visible`."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of a renderable: rich calls this for all it prints, and for the parts of
        tables and bars.
        """
        for segment in super().render(renderable, options):
            # control segments are rich's own cursor moves; text never becomes one
            yield segment if segment.control else Segment(make_visible(segment.text), segment.style)
