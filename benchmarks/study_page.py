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
    names in benchmarks/results, of which the page shows the first that is there, or all; ``target``: of make, which
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
        first = self.find_records(root)[0]
        exists = (n for n in self.records if (root / "benchmarks/results" / f"{n}.json").exists())
        return next(exists), first

    def find_records(self, root: Path) -> list[dict[str, Any]]:
        """All that are there, in the order of their names. Exits where there is none."""
        paths = [root / "benchmarks/results" / f"{name}.json" for name in self.records]
        found = [dict(json.loads(path.read_text())) for path in paths if path.exists()]
        if not found:
            raise SystemExit(f"no record of the study is there; run make {self.target}")
        return found

    def put(self, text: str, section: str) -> str:
        """The page's text with another section. Exits where it lacks the marks."""
        before, mark, rest = text.partition(self.begin)
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise SystemExit(f"{self.path} lacks the lines {self.begin!r} and {END!r}")
        return before + self.begin + section + END + after
