"""The section of a page of docs/ that a study's record writes, between two marks.

page = StudyPage("docs/choosing.md", "variants_study.py", ("variants-study-cpu",), "study-variants")
name, record = page.find_record(ROOT)
text = page.put(text, section)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END = "<!-- end of what is made -->\n"


@dataclass(frozen=True)
class StudyPage:
    """``path``: the page; ``script``: of benchmarks/, which makes the section with --docs; ``records``:
    names in benchmarks/results, of which the first that is there is shown; ``target``: of make, which
    makes them."""

    path: str
    script: str
    records: tuple[str, ...]
    target: str

    @property
    def begin(self) -> str:
        """The mark before the section; `END` is behind it."""
        return f"<!-- made by: python benchmarks/{self.script} --docs -->\n"

    def find_record(self, root: Path) -> tuple[str, dict[str, Any]]:
        """(name, record) of what the page shows. Exits where there is none."""
        for name in self.records:
            path = root / "benchmarks/results" / f"{name}.json"
            if path.exists():
                return name, dict(json.loads(path.read_text()))
        raise SystemExit(f"no record of the study is there; run make {self.target}")

    def put(self, text: str, section: str) -> str:
        """The page's text with another section. Exits where it lacks the marks."""
        before, mark, rest = text.partition(self.begin)
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise SystemExit(f"{self.path} lacks the lines {self.begin!r} and {END!r}")
        return before + self.begin + section + END + after
