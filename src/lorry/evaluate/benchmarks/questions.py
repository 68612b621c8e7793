"""The questions of a named set: which rows, in which words, after which worked examples. No model
yet.

exam = load_benchmark("bool_q", DataLocations({"bool_q": "boolq.jsonl"}), limit=100, n_shot=2)
exam.questions[0].conversation()      # as it is asked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lorry.data.catalog import NamedSet, NamedSetItem, item_conversation
from lorry.data.reading.bad_rows import OnBadRow
from lorry.data.reading.content import Conversation
from lorry.data.reading.places import DataLocations, NumberedItem, read_items
from lorry.data.stream.pack import epoch_order
from lorry.errors import ConfigError, DataError
from lorry.evaluate.metrics.registry import check_metrics

FEWSHOT_POOL = 1000  # rows of the training split that worked examples are drawn from


@dataclass(frozen=True)
class BenchmarkQuestion:
    """An item with the worked examples before it, and where it stands."""

    item: NamedSetItem
    where: str
    shots: tuple[NamedSetItem, ...] = ()

    def conversation(self, answer: str | None = None) -> Conversation:
        """The question with its right answer, or another one in its place."""
        return item_conversation(
            self.item if answer is None else replace(self.item, answer=answer), self.shots
        )


@dataclass(frozen=True)
class Benchmark:
    """The questions of one set, and what was left out or is to be said of them."""

    one: NamedSet
    split: str
    source: str
    questions: list[BenchmarkQuestion]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def choice(self) -> bool:
        """Whether options are ranked; otherwise answers are generated."""
        return bool(self.questions[0].item.options)

    @property
    def references(self) -> list[list[str]]:
        """Every right answer of each question."""
        return [list(question.item.references) for question in self.questions]

    @property
    def concepts(self) -> list[tuple[str, ...]]:
        """The words that each answer has to use; empty where no question has any."""
        found = [question.item.concepts for question in self.questions]
        return found if any(found) else []


def load_benchmark(
    name: str, places: DataLocations, *, split: str = "auto", limit: int | None = None, n_shot: int = 0, template: int = 0,
    seed: int = 0, on_bad_row: OnBadRow = "error",
) -> Benchmark:  # fmt: skip
    """Read a set's questions. Worked examples come from the training split, drawn for each question
    by the seed; where that holds the very rows that are asked, from the other ones.

    Raises ConfigError (an unknown set, split or template), DataError (a missing file, a bad or no
    row, too few examples).
    """
    one = places.catalog.find_set(name)
    one.refuse_template(template, "template")
    chosen = places.to_ask(one) if split == "auto" else split
    source = places.open(one, chosen, limit=limit, on_bad_row=on_bad_row)
    asked = list(read_items(one, source, template=template))
    if not asked:
        raise DataError(
            f"{one.name} ({source.label}): no usable row; {source.bad.summary() or 'the set is empty'}"
        )
    exam = Benchmark(
        one,
        chosen,
        source.label,
        [BenchmarkQuestion(a.item, a.where) for a in asked],
        dict(source.bad.counts),
    )
    if not exam.choice:
        _check_metrics(exam)
    if shortened := sum(a.item.shortened for a in asked):
        exam.notes.append(f"{one.name}: {shortened} contexts were shortened to what the set allows")
    return _add_fewshot(exam, places, asked, n_shot, template, seed, on_bad_row) if n_shot else exam


def _check_metrics(exam: Benchmark) -> None:
    """Raises ConfigError for a metric that the set's file names and nobody has, DataError for rows
    without what one compares with: before a model is loaded, not after it has answered.
    """
    try:
        check_metrics(exam.one.metrics, exam.references, concepts=exam.concepts)
    except ConfigError as error:
        raise ConfigError(f"{exam.one.file}: metrics: {error}") from error


def _add_fewshot(
    exam: Benchmark,
    places: DataLocations,
    asked: Sequence[NumberedItem],
    n_shot: int,
    template: int,
    seed: int,
    on_bad_row: OnBadRow,
) -> Benchmark:
    one = exam.one
    shots_from = places.for_shots(one, exam.split)
    same = places.of(one, shots_from) == places.of(one, exam.split)
    pool = list(
        read_items(
            one,
            places.open(one, shots_from, limit=FEWSHOT_POOL, on_bad_row=on_bad_row),
            template=template,
        )
    )
    numbers = [a.number for a in pool]
    if same:
        exam.notes.append(
            f"{one.name}: worked examples come from the split that is asked, never the question's own row"
        )
    drawn = [
        _draw_shots(pool, numbers, n_shot, seed, place, one.name, a.number if same else None)
        for place, a in enumerate(asked)
    ]
    questions = [replace(q, shots=shots) for q, shots in zip(exam.questions, drawn, strict=True)]
    return replace(exam, questions=questions)


def _draw_shots(
    pool: Sequence[NumberedItem],
    numbers: Sequence[int],
    count: int,
    seed: int,
    place: int,
    name: str,
    own: int | None,
) -> tuple[NamedSetItem, ...]:
    """``count`` items of other rows than ``own``: a function of (name, seed, place)."""
    others = [item for item, number in zip(pool, numbers, strict=True) if number != own]
    if len(others) < count:
        raise DataError(
            f"{name}: n_shot={count} needs as many other rows; the split for examples has {len(others)}"
        )
    order = epoch_order(len(others), seed, place, name=f"shots/{name}")
    return tuple(others[at].item for at in order[:count])
