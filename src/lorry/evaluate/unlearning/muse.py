"""MUSE (Shi et al. 2024) as muse_bench writes it to disk and open-unlearning asks it.

    MUSE/News/{knowmem/forget_qa,knowmem/forget_qa_icl,verbmem/forget,privleak/holdout,...}.json

knowmem: questions behind ten worked examples, answers of 32 tokens cut at the next question;
verbmem: 128 tokens of what follows a passage, against the first 128 of the right ones; privleak:
Min-40% of whole texts, of which the first 2,048 tokens count. All of it plain text without a chat
template: the models that MUSE is about are base models.

Two choices differ from one of the two sources and are said in docs/unlearning-metrics.md: ROUGE has
a stemmer (open-unlearning's, not muse_bench's), and the last token of a plain text counts in EM, ES
and Min-K (open-unlearning drops it, as it would an end of turn, which these texts have not).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lorry.data.reading.rows import DataRow
from lorry.data.reading.sources import open_source
from lorry.data.reading.suite_splits import MUSE
from lorry.errors import DataError
from lorry.evaluate.metrics.memorization import exact_memorization
from lorry.evaluate.unlearning import measures
from lorry.evaluate.unlearning.rows import (
    ANSWER,
    SuiteRow,
    SuiteSet,
    content_digest,
    row_texts,
)
from lorry.evaluate.unlearning.suite import Suite, SuiteMetric, SuiteRequest

# {role: (configuration, split)}; the last two are texts for membership inference
MUSE_SETS = {
    "forget_knowmem": ("knowmem", "forget_qa"),
    "retain_knowmem": ("knowmem", "retain_qa"),
    "forget_verbmem": ("verbmem", "forget"),
    "forget": ("privleak", "forget"),
    "holdout": ("privleak", "holdout"),
}
EXAMPLES_SUFFIX = "_icl"  # of the split with a knowmem split's worked examples
# the columns of (question, answer)
MUSE_COLUMNS = {
    "knowmem": ("question", "answer"),
    "verbmem": ("prompt", "gt"),
    "privleak": ("", "text"),
}
# as in muse_bench's eval.py: tokens of an answer, and texts that end one
NEW_TOKENS = {"knowmem": 32, "verbmem": 128, "privleak": 0}
KNOWMEM_STOPS = ("\n\n", "\nQuestion", "Question:")
TEXT_TOKENS = 2048


def load_muse_sets(
    roles: Mapping[str, tuple[str, ...]], request: SuiteRequest
) -> dict[str, SuiteSet]:
    """{role: its rows}. Raises ConfigError for a folder or split that is not there, DataError for a
    row without a field.
    """
    return {role: _load_set(*MUSE_SETS[role], request) for role in roles}


def _load_set(kind: str, split: str, request: SuiteRequest) -> SuiteSet:
    column, field = MUSE_COLUMNS[kind]
    before = _worked_examples(f"{split}{EXAMPLES_SUFFIX}", request) if kind == "knowmem" else ""
    name = f"{kind}/{split}"
    rows = []
    for row in _read_split(kind, split, request):
        question = row_texts(row, column, name)[0] if column else ""
        if kind == "knowmem":
            question = f"{before}Question: {question}\nAnswer: "
        answers = {ANSWER: row_texts(row, field, name)[:1]}
        rows.append(SuiteRow(f"{name} {row.where}", question, answers, plain=True))
    return SuiteSet(
        name,
        tuple(rows),
        content_digest([[row.question, *row.answers[ANSWER]] for row in rows]),
        new_tokens=NEW_TOKENS[kind],
        stops=KNOWMEM_STOPS if kind == "knowmem" else (),
        gold_tokens=NEW_TOKENS["verbmem"] if kind == "verbmem" else None,
        answer_tokens=TEXT_TOKENS,
    )


def _worked_examples(split: str, request: SuiteRequest) -> str:
    """The examples before every question of knowmem, as text."""
    examples, name = "", f"knowmem/{split}"
    for row in _read_split("knowmem", split, request):
        question, answer = (row_texts(row, field, name)[0] for field in MUSE_COLUMNS["knowmem"])
        examples += f"Question: {question}\nAnswer: {answer}\n\n"
    return examples


def _read_split(kind: str, split: str, request: SuiteRequest) -> list[DataRow]:
    rows = list(open_source(f"{MUSE}:{request.corpus}/{kind}/{split}", local=request.local))
    if not rows:
        raise DataError(f"{kind}/{split}: there are no rows")
    return rows


def _rouge(role: str) -> SuiteMetric:
    # F1, as MUSE has it: of a text that goes on and on everything could be recalled
    return SuiteMetric(
        partial(measures.measure_rouge, role=role, field=ANSWER, value="rougeL_f1"),
        fields={role: (ANSWER,)},
        generates=True,
    )


VERBATIM = {"forget_verbmem": (ANSWER,)}
MUSE_METRICS: dict[str, SuiteMetric] = {
    **{f"{role}_ROUGE": _rouge(role) for role in list(MUSE_SETS)[:3]},
    "extraction_strength": SuiteMetric(
        partial(measures.measure_extraction, role="forget_verbmem"), fields=VERBATIM
    ),
    "exact_memorization": SuiteMetric(
        partial(measures.measure_memorization, metric=exact_memorization, role="forget_verbmem"),
        fields=VERBATIM,
    ),
    **measures.attack_metrics(["mia_loss", "mia_min_k", "mia_min_k_plus_plus"]),
}
MUSE_SUITE = Suite(
    name=MUSE,
    title="MUSE",
    metrics=MUSE_METRICS,
    default=(
        "forget_knowmem_ROUGE",
        "retain_knowmem_ROUGE",
        "forget_verbmem_ROUGE",
        "privleak",
        "extraction_strength",
    ),
    load=load_muse_sets,
    main="retain_knowmem_ROUGE",
)
