"""Rows of a suite: a question with its right, paraphrased and wrong answers, and where each stands.

Try: ``load_tofu_split("retain95", {"tofu": "data/tofu"})`` is the first 3,800 rows of full.json.

**A split that is not on disk is derived from one that is**, since TOFU's are parts of each other:
retainNN is the beginning of full, forgetNN the end of full or of a larger forget split. A holdout
(rows that were never trained on) is not part of full: where there is none, the rows of forget10 just
before forgetNN stand in, with a note, since they are a holdout of a start that was trained on
retain90 and forgetNN alone and of no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.data.reading.rows import DataRow
from lorry.data.reading.sources import open_source
from lorry.errors import ConfigError, DataError

TOFU = "tofu"
TOFU_HUB = "locuslab/TOFU"
# 200 authors of 20 rows; the forget splits are ends of full, the retain splits what is before them
FORGET_ROWS = {"forget01": 40, "forget05": 200, "forget10": 400}
RETAIN_ROWS = {"retain99": 3960, "retain95": 3800, "retain90": 3600}
HOLDOUT_OF = {name: f"holdout{name.removeprefix('forget')}" for name in FORGET_ROWS}
PERTURBED = "_perturbed"
FILE_KINDS = (".json", ".jsonl", ".parquet", "")  # the last: a folder
ANSWER, PARAPHRASED, WRONG = "answer", "paraphrased_answer", "perturbed_answer"
ANSWER_FIELDS = (ANSWER, PARAPHRASED, WRONG)


@dataclass(frozen=True)
class SuiteRow:
    """A question; ``answers``: {field: one or several texts}; ``where`` it stands."""

    where: str
    question: str
    answers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class SuiteSet:
    """The rows of one part of a suite. ``name``: its split; ``note``: what to know of it, or "";
    ``digest``: SHA-256 of the questions asked and of all their answers, whichever are needed this
    time, not of where they stand: equal digests are the same rows.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    digest: str
    note: str = ""


def load_tofu_split(name: str, local: Mapping[str, str]) -> tuple[list[DataRow], str]:
    """(the rows of a split of TOFU, a note or ""). ``local``: {tofu: folder, tofu.SPLIT: file};
    without the first the hub's. Raises ConfigError for a split that neither is there nor can be
    derived, DataError for a file that cannot be read.
    """
    if (path := local_tofu_path(name, local)) is not None:
        return list(open_source(path)), ""
    if TOFU not in local and not name.startswith("holdout"):
        return list(open_source(TOFU_HUB, name=name)), ""
    if (derived := _derive(name, local)) is not None:
        return derived
    if name.startswith("holdout"):
        raise ConfigError(
            f"no {name}: membership (mia_*, privleak) needs rows that were never trained on; give "
            f"local.tofu.{name}=FILE, or ask for other metrics"
        )
    raise ConfigError(
        f"local.tofu={local[TOFU]} has no {name}.json, and nothing to derive it from; give "
        f"local.tofu.{name}=FILE"
    )


def local_tofu_path(name: str, local: Mapping[str, str]) -> str | None:
    """Where a split lies as a file or folder of its own; None where it does not. Raises ConfigError
    for a folder that is not there.
    """
    if f"{TOFU}.{name}" in local:
        return local[f"{TOFU}.{name}"]
    if TOFU not in local:
        return None
    folder = Path(local[TOFU]).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"local.tofu={local[TOFU]} is no folder; give the one that holds TOFU's splits"
        )
    found = (folder / f"{name}{kind}" for kind in FILE_KINDS)
    return next((str(path) for path in found if path.exists()), None)


def _derive(name: str, local: Mapping[str, str]) -> tuple[list[DataRow], str] | None:
    """A part of a split that is there; None where there is none."""
    stem, kind = name.removesuffix(PERTURBED), PERTURBED if name.endswith(PERTURBED) else ""
    if stem in FORGET_ROWS:
        rows = FORGET_ROWS[stem]
        larger = [split for split, count in FORGET_ROWS.items() if count > rows]
        for whole in ("full", *reversed(larger)):
            if (path := local_tofu_path(whole + kind, local)) is not None:
                return list(open_source(path))[-rows:], ""
    if stem in RETAIN_ROWS and not kind and (path := local_tofu_path("full", local)) is not None:
        return list(open_source(path, limit=RETAIN_ROWS[stem])), ""
    if stem not in ("holdout01", "holdout05"):  # forget10 has nothing beside itself
        return None
    if (path := local_tofu_path("forget10", local)) is None:
        return None
    forget = stem.replace("holdout", "forget")
    rows = FORGET_ROWS[forget]
    note = (
        f"no {stem} on disk: the {rows} rows of forget10 before {forget} stand in; they are a "
        "holdout only of a start that was not trained on them (TOFU's own full models were)"
    )
    return list(open_source(path))[-2 * rows : -rows], note


def load_tofu_sets(
    roles: Mapping[str, tuple[str, ...]],
    *,
    local: Mapping[str, str],
    forget_split: str,
    holdout_split: str | None = None,
    question_key: str = "question",
) -> dict[str, SuiteSet]:
    """{role: its rows} for the roles asked: forget, retain, ra (real authors), wf (world facts),
    holdout. ``roles``: with the answer fields each needs; ``question_key``: the column asked of
    forget and retain rows.

    Raises ConfigError (unknown or missing split), DataError for a row without a field that is
    needed, such as one without wrong answers.
    """
    if forget_split not in FORGET_ROWS:
        raise ConfigError(f"forget_split={forget_split}: TOFU has {', '.join(FORGET_ROWS)}")
    names = {
        "forget": forget_split + PERTURBED,
        "retain": "retain" + PERTURBED,
        "ra": "real_authors" + PERTURBED,
        "wf": "world_facts" + PERTURBED,
        "holdout": holdout_split or HOLDOUT_OF[forget_split],
    }
    made = {}
    for role, fields in roles.items():
        rows, note = load_tofu_split(names[role], local)
        # real authors, world facts and holdouts have no other wording
        key = question_key if role in ("forget", "retain") else "question"
        if not rows:
            raise DataError(f"{names[role]}: there are no rows")
        asked = tuple(_suite_row(row, key, fields, names[role]) for row in rows)
        made[role] = SuiteSet(names[role], asked, _rows_digest(rows, key), note)
    return made


def _suite_row(row: DataRow, key: str, fields: tuple[str, ...], name: str) -> SuiteRow:
    answers = {field: _texts(row, field, name) for field in fields}
    return SuiteRow(f"{name} {row.where}", _texts(row, key, name)[0], answers)


def _rows_digest(rows: Sequence[DataRow], key: str) -> str:
    content = [[row.values.get(column) for column in (key, *ANSWER_FIELDS)] for row in rows]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _texts(row: DataRow, field: str, name: str) -> tuple[str, ...]:
    """The text, or texts, of a column. Raises DataError."""
    value: Any = row.values.get(field)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        what = "wrong answers" if field == WRONG else "text"
        raise DataError(
            f"{name} {row.where}: no {what} in {field!r}; every row of this set needs them"
        )
    return tuple(texts)
