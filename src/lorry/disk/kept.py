"""Answers that take long to find, kept in the user's cache: a small file each, named by a digest of
all that the answer hangs on.

    kept = KeptAnswers(lorry_home() / "proofs", most=300, largest=1000)
    if (answer := kept.read(digest)) is None:
        kept.save(digest, find_answer())

An answer cannot be out of date, since what it hangs on is its name. A file that is missing, cannot be
read or is no text is no answer, and one that cannot be written is found again the next time.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorry.disk import durable

DIGEST_PATTERN = re.compile("[0-9a-f]{64}")  # what files of answers are called


@dataclass(frozen=True)
class KeptAnswers:
    """A folder of them. ``most``: files that stay there, those used last; ``largest``: bytes of one."""

    folder: Path
    most: int
    largest: int

    def read(self, digest: str) -> str | None:
        """The answer of this name, which is used with that; None where there is none."""
        place = self.folder / digest
        try:
            if not place.is_file() or place.stat().st_size > self.largest:
                return None
            text = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        # of a folder that is only read, an image's, nobody says what was used last
        with suppress(OSError):
            os.utime(place)
        return text

    def save(self, digest: str, answer: str) -> None:
        """Keep an answer that is not too large, and forget those that were used longest ago. Replaced
        whole: another process may read it just now."""
        content = answer.encode()
        if len(content) > self.largest:
            return
        try:
            durable.make_directory(self.folder)
            durable.write_files(self.folder, {digest: content})
            ours = [
                entry
                for entry in os.scandir(self.folder)
                if DIGEST_PATTERN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            ]
            for entry in sorted(ours, key=lambda entry: entry.stat().st_mtime_ns)[: -self.most]:
                Path(entry.path).unlink(missing_ok=True)
        except OSError:
            return
