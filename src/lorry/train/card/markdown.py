"""Markdown from values that nobody vetted: whatever a name or a message holds, it stays text in the
place it was put.

Try: ``table(["metric", "value"], [[plain("F1 | squad"), "0.5"]])``. What is written is GitHub's
Markdown, which the hub renders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# A character reference where a backslash would itself be ambiguous (in a table, beside another
# backslash), else a backslash.
_MARKDOWN_ESCAPES = {ord(c): f"&#{ord(c)};" for c in "\\`|<>&"} | {
    ord(c): f"\\{c}" for c in "*_[]~#$!"
}
EMPTY_CELL = "–"


def clean_line(value: object) -> str:
    """Any value as one printable line: control characters, half characters and reversing marks
    become U+FFFD.
    """
    return " ".join(
        "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in str(value)).split()
    )


def escape_markdown(value: object) -> str:
    """Any value as text of a paragraph, a heading or a table's cell."""
    return clean_line(value).translate(_MARKDOWN_ESCAPES) or EMPTY_CELL


def code_span(value: object) -> str:
    """Any value as a code span; as plain text where it holds what would end the span or the cell."""
    text = clean_line(value)
    return f"`{text}`" if text and not re.search("[`|]", text) else escape_markdown(text)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown cells, or nothing at all where there is no row."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]) if lines else ""


def fenced_code(language: str, lines: Iterable[str]) -> str:
    """A code block. The lines are the caller's own; a value in them must be a quoted literal of one
    line.
    """
    return "\n".join([f"```{language}", *lines, "```"])
