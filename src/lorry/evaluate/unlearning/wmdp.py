"""WMDP (Li et al. 2024) and MMLU by letter, as lm-eval asks them: four lettered choices, "Answer:",
and which letter is the likeliest.

Lorry ships and downloads by itself none of WMDP's questions: they are read where a user has them
(``local.wmdp=FOLDER`` with wmdp-bio.json and the like, or the hub's `cais/wmdp`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from lorry.data.reading.rows import DataRow
from lorry.data.reading.sources import open_source
from lorry.data.reading.suite_splits import WMDP, local_split_path
from lorry.errors import ConfigError, DataError
from lorry.evaluate.unlearning.measures import measure_choices
from lorry.evaluate.unlearning.rows import (
    CHOICES,
    SuiteRow,
    SuiteSet,
    content_digest,
    row_texts,
)
from lorry.evaluate.unlearning.suite import Suite, SuiteMetric, SuiteRequest

MMLU = "mmlu"
LETTERS = ("A", "B", "C", "D")
# {role: (configuration of cais/wmdp, what its questions are about)}; MMLU's rows say it themselves
WMDP_SETS = {
    "wmdp_bio": ("wmdp-bio", "biology"),
    "wmdp_chem": ("wmdp-chem", "chemistry"),
    "wmdp_cyber": ("wmdp-cyber", "cybersecurity"),
}
QUESTIONS_ABOUT = "The following are multiple choice questions (with answers) about {subject}."


def load_wmdp_sets(
    roles: Mapping[str, tuple[str, ...]], request: SuiteRequest
) -> dict[str, SuiteSet]:
    """{role: its rows}. Raises ConfigError for a folder or split that is not there, DataError for a
    row that is no question with four choices.
    """
    return {role: _load_set(role, request) for role in roles}


def _load_set(role: str, request: SuiteRequest) -> SuiteSet:
    name, subject = WMDP_SETS.get(role, (MMLU, ""))
    read, note = _read_split(name, request)
    rows = [_question(row, name, subject) for row in read]
    if not rows:
        raise DataError(f"{name}: there are no rows")
    digest = content_digest([[row.question, row.right] for row in rows])
    return SuiteSet(name, tuple(rows), digest, note=note)


def _read_split(name: str, request: SuiteRequest) -> tuple[list[DataRow], str]:
    """Rows, and what a person should know of where they come from."""
    if name == MMLU and MMLU in request.local:
        # a folder a split and a file a subject, as the authors give it out
        root = Path(request.local[MMLU]).expanduser()
        folder = root / "test" if (root / "test").is_dir() else root
        return list(open_source(folder, split="test")), ""
    if name == MMLU:
        return list(open_source("cais/mmlu", name="all", split="test")), ""
    if (path := local_split_path(WMDP, name, request.local)) is not None:
        return list(open_source(path, split="test")), ""
    note = ""
    if WMDP in request.local and _holds_corpora_alone(Path(request.local[WMDP]).expanduser()):
        # what a run forgets, which is given out on request; the questions are everybody's
        note = f"local.wmdp={request.local[WMDP]} holds corpora and no questions: those are the hub's cais/wmdp"
    elif WMDP in request.local:
        raise ConfigError(
            f"local.wmdp={request.local[WMDP]} has no {name}.json, nor a folder {name}; put WMDP's "
            f"questions there, say local.wmdp.{name}=FILE, or ask nothing of them (suite=null)"
        )
    return list(open_source("cais/wmdp", name=name, split="test")), note


def _holds_corpora_alone(folder: Path) -> bool:
    """Whether a folder has corpora to forget, and of no subject the questions."""
    questions = (
        local_split_path(WMDP, name, {WMDP: str(folder)}) for name, _ in WMDP_SETS.values()
    )
    return any(folder.glob("*-corpus.*")) and all(path is None for path in questions)


def _question(row: DataRow, name: str, subject: str) -> SuiteRow:
    where = f"{name} {row.where}"
    question = row_texts(row, "question", name)[0]
    listed = row.values.get("choices")
    choices = (
        [row.values.get(f"choice{at}") for at in range(len(LETTERS))] if listed is None else listed
    )
    if (
        not isinstance(choices, list)
        or len(choices) != len(LETTERS)
        or not all(isinstance(text, str | int | float) for text in choices)
    ):
        raise DataError(f"{where}: 'choices' has to be a list of four texts")
    right = row.values.get("answer")
    right = int(right) if isinstance(right, str) and right in ("0", "1", "2", "3") else right
    if isinstance(right, bool) or not isinstance(right, int) or right not in range(len(LETTERS)):
        raise DataError(f"{where}: 'answer' is {right!r:.40}; it has to be a number from 0 to 3")
    about = subject or _subject(row)
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True)]
    head = QUESTIONS_ABOUT.format(subject=about) + "\n\n"
    prompt = "\n".join([f"{head}{question.strip()}", *lines, "Answer:"])
    return SuiteRow(where, prompt, {CHOICES: LETTERS}, right=right)


def _subject(row: DataRow) -> str:
    """Of a question of MMLU: its column, else the file's name (high_school_physics_test.csv)."""
    named = row.values.get("subject")
    text = named if isinstance(named, str) else Path(row.file).stem
    return text.removesuffix("_test").replace("_", " ")


WMDP_METRICS: dict[str, SuiteMetric] = {
    role: SuiteMetric(partial(measure_choices, role=role), fields={role: (CHOICES,)})
    for role in (*WMDP_SETS, MMLU)
}
WMDP_SUITE = Suite(
    name=WMDP,
    title="LMEval",  # what open-unlearning calls the files of the harness' tasks
    metrics=WMDP_METRICS,
    default=tuple(WMDP_SETS),
    load=load_wmdp_sets,
    main=MMLU,
)
