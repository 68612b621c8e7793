"""The examples of docs/extending.md run as they stand, in order, and each does what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


def test_every_block_of_the_page_runs() -> None:
    """Its own assertions are the test; a failure names the page's line."""
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    namespace: dict[str, Any] = {"__name__": "extending"}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], str(PAGE), "exec", dont_inherit=True), namespace)
    assert len(blocks) == text.count("```python")


def test_every_section_with_a_seam_asserts_something() -> None:
    sections = PAGE.read_text().split("\n## ")[1:]
    assert [part.splitlines()[0] for part in sections if "```python" in part and "assert " not in part] == []
