"""The questions of a named set: which rows, in which words, after which worked examples. No model
yet.

benchmark = load_benchmark("bool_q", DataLocations({"bool_q": "boolq.jsonl"}), limit=100, n_shot=2)
benchmark.questions[0].conversation()      # as it is asked
"""

from __future__ import annotations

import hashlib
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

    named_set: NamedSet
    split: str
    source: str
    questions: list[BenchmarkQuestion]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_choice(self) -> bool:
        """Whether options are ranked; otherwise answers are generated."""
        return bool(self.questions[0].item.options)

    @property
    def references(self) -> list[list[str]]:
        """Every right answer of each question."""
        return [list(question.item.references) for question in self.questions]

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked, wherever it was read."""
        asked = [(question.item, question.shots) for question in self.questions]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    @property
    def concepts(self) -> list[tuple[str, ...]]:
        """The words that each answer has to use; empty where no question has any."""
        concepts = [question.item.concepts for question in self.questions]
        return concepts if any(concepts) else []


def load_benchmark(
    name: str, places: DataLocations, *, split: str = "auto", limit: int | None = None, n_shot: int = 0, template: int = 0,
    seed: int = 0, on_bad_row: OnBadRow = "error",
) -> Benchmark:  # fmt: skip
    """Read a set's questions. Worked examples come from the training split, drawn for each question
    by the seed; where that holds the very rows that are asked, from the other ones.

    Raises ConfigError (an unknown set, split or template), DataError (a missing file, a bad or no
    row, too few examples).
    """
    named_set = places.catalog.find_set(name)
    named_set.refuse_template(template, "template")
    chosen = places.to_ask(named_set) if split == "auto" else split
    source = places.open(named_set, chosen, limit=limit, on_bad_row=on_bad_row)
    items = list(read_items(named_set, source, template=template))
    if not items:
        raise DataError(
            f"{named_set.name} ({source.label}): no usable row; {source.bad.summary() or 'the set is empty'}"
        )
    benchmark = Benchmark(
        named_set,
        chosen,
        source.label,
        [BenchmarkQuestion(item.item, item.where) for item in items],
        dict(source.bad.counts),
    )
    if not benchmark.is_choice:
        _check_metrics(benchmark)
    if shortened := sum(item.item.shortened for item in items):
        benchmark.notes.append(
            f"{named_set.name}: {shortened} contexts were shortened to the limit of the set"
        )
    return (
        _add_fewshot(benchmark, places, items, n_shot, template, seed, on_bad_row)
        if n_shot
        else benchmark
    )


def _check_metrics(benchmark: Benchmark) -> None:
    """Raises ConfigError for a metric that the set's file names and nobody has, DataError for rows
    without what one compares with: before a model is loaded, not after it has answered.
    """
    try:
        check_metrics(
            benchmark.named_set.metrics, benchmark.references, concepts=benchmark.concepts
        )
    except ConfigError as error:
        raise ConfigError(f"{benchmark.named_set.file}: metrics: {error}") from error


def _add_fewshot(
    benchmark: Benchmark,
    places: DataLocations,
    items: Sequence[NumberedItem],
    n_shot: int,
    template: int,
    seed: int,
    on_bad_row: OnBadRow,
) -> Benchmark:
    named_set = benchmark.named_set
    shots_from = places.for_shots(named_set, benchmark.split)
    same_split = places.of(named_set, shots_from) == places.of(named_set, benchmark.split)
    pool = list(
        read_items(
            named_set,
            places.open(named_set, shots_from, limit=FEWSHOT_POOL, on_bad_row=on_bad_row),
            template=template,
        )
    )
    # numbers of rows in the file, by which the question's own row is known where both are one split
    numbers = [item.number for item in pool]
    if same_split:
        benchmark.notes.append(
            f"{named_set.name}: few-shot examples come from the evaluated split, "
            "never from the question's own row"
        )
    shots_by_question = [
        _draw_shots(
            pool,
            numbers,
            n_shot,
            seed,
            position,
            named_set.name,
            item.number if same_split else None,
        )
        for position, item in enumerate(items)
    ]
    questions = [
        replace(q, shots=shots)
        for q, shots in zip(benchmark.questions, shots_by_question, strict=True)
    ]
    return replace(benchmark, questions=questions)


def _draw_shots(
    pool: Sequence[NumberedItem],
    numbers: Sequence[int],
    count: int,
    seed: int,
    position: int,
    name: str,
    own: int | None,
) -> tuple[NamedSetItem, ...]:
    """``count`` items of other rows than ``own``: a function of (name, seed, place)."""
    others = [item for item, number in zip(pool, numbers, strict=True) if number != own]
    if len(others) < count:
        raise DataError(
            f"{name}: n_shot={count} needs as many other rows; the split for examples has {len(others)}"
        )
    # of the set's name too, so that two sets with as many rows do not draw alike
    # and of the question's place: a limit changes nobody's examples
    order = epoch_order(len(others), seed, position, name=f"shots/{name}")
    return tuple(others[at].item for at in order[:count])
